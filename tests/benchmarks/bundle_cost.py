"""What the top ten eigenvalues, the trace and the density cost together, against each bought from another package.

python tests/benchmarks/bundle_cost.py [--rounds 3] [--only MLP]

Ours, as a HessianMonitor measures them: eleven top eigenpairs to 1e-3 with the check that none was missed, then 8
random vectors x 16 steps on the complement of their eigenvectors. Others are asked for the ten top eigenvalues to 1e-3
(hessian-eigenthings has no stop rule: its number of steps is the smallest that an oracle finds sufficient, and only
that run is charged; curvlinops goes through `eigsh`), for the trace, and for the density, under three rules:

- probes: 8 random vectors for the trace, 8 x 16 steps for the density.
- error: as many vectors for the trace as give our standard error; the density as before.
- resolution: the trace as before; for the density 8 runs, each with as many steps as it takes to have the ten top
  eigenvalues among its nodes to 1e-3, as ours has.

Only the first rule is run; the other two change how many products are bought, at the seconds of a product of the same
part. For each part the cheapest package counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import loss, workloads

from lightning_dynamics.linalg import KrylovSpace, SymmetricOperator, eigenpairs, spectral_density
from lightning_dynamics.objective import Objective, hessian

TOP, VECTORS, STEPS, TOLERANCE = 10, 8, 16, 1e-3
MOST_STEPS = 200
REFERENCE_PROBES = 32  # for the variance of a probe, which 8 of them would only hint at


@dataclass
class Bill:
    """Products and seconds of one part."""

    products: int
    seconds: float

    def for_products(self, products: float) -> Bill:
        return Bill(round(products), self.seconds * products / self.products)


class Counting:
    """A symmetric operator that counts."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator, self.products = operator, 0
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.operator(vector)


def timed(part: Callable[[], int]) -> Bill:
    begin = time.perf_counter()
    products = part()
    return Bill(products, time.perf_counter() - begin)


def train(module: nn.Module, batch: Any) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
    module.zero_grad()


@dataclass
class Reference:
    """What is true, as far as the comparison needs it.

    Attributes:
        top: The ten largest eigenvalues.
        steps: Steps that a run from one random vector takes to have them to 1e-3.
        theirs: Standard deviation of a trace probe (random signs).
        ours: The same on the complement of eleven eigenvectors.
    """

    top: Tensor
    steps: int
    theirs: float
    ours: float


def reference(objective: Objective) -> Reference:
    with hessian(objective) as h:
        pairs = eigenpairs(h, TOP + 1, tolerance=1e-4, generator=torch.Generator().manual_seed(7)).top
        exact = pairs.values[:TOP]
        space = KrylovSpace(h, torch.Generator().manual_seed(8))
        space.append_random()
        steps = 0
        while steps < TOP or float(((space.ritz().values[:TOP] - exact) / exact).abs().max()) > TOLERANCE:
            space.expand()
            steps += 1
        draw = torch.Generator().manual_seed(9)
        samples = []
        for _ in range(REFERENCE_PROBES):
            sign = torch.randint(0, 2, (h.size,), generator=draw).to(h.dtype) * 2 - 1
            samples.append(float(sign @ h(sign)))
        rest = spectral_density(
            h, known=pairs.values, vectors=pairs.vectors, num_vectors=REFERENCE_PROBES, num_steps=1, generator=draw
        )
    return Reference(exact, steps, statistics.stdev(samples), rest.trace.error * math.sqrt(REFERENCE_PROBES))


def ours(objective: Objective) -> tuple[Bill, float, float]:
    """The whole of it, the trace and its standard error."""
    found: list[float] = []

    def part() -> int:
        with hessian(objective) as h:
            counted = Counting(h)
            pairs = eigenpairs(counted, TOP + 1, tolerance=TOLERANCE)
            density = spectral_density(
                counted,
                known=pairs.top.values,
                vectors=pairs.top.vectors,
                num_vectors=VECTORS,
                num_steps=STEPS,
                generator=torch.Generator().manual_seed(1),
            )
        found[:] = [density.trace.value, density.trace.error]
        return counted.products

    return timed(part), found[0], found[1]


def eigenthings(module: nn.Module, batch: Any, true: Reference) -> Callable[[], dict[str, Bill]]:
    import hessian_eigenthings as package

    operator = package.HessianOperator(module, [batch], loss)

    def values(steps: int) -> Tensor:
        found = package.lanczos(operator, k=TOP, which="LA", max_iter=steps, reorthogonalize=True, seed=0)
        return torch.as_tensor(found.eigenvalues).double().sort(descending=True).values

    steps = max(TOP, true.steps - 8)
    while float(((values(steps) - true.top) / true.top).abs().max()) > TOLERANCE:
        steps += 4
        if steps > MOST_STEPS:
            raise RuntimeError(f"hessian-eigenthings has not reached {TOLERANCE:g} after {MOST_STEPS} steps.")

    def top() -> int:
        values(steps)
        return steps

    def trace() -> int:
        package.trace(operator, num_matvecs=VECTORS, method="hutchinson", seed=0)
        return VECTORS

    def density() -> int:
        package.spectral_density(operator, num_runs=VECTORS, lanczos_steps=STEPS, seed=0)
        return VECTORS * STEPS

    return lambda: {"top": timed(top), "trace": timed(trace), "density": timed(density)}


def curvlinops(module: nn.Module, batch: Any, true: Reference) -> Callable[[], dict[str, Bill]]:
    import curvlinops as package
    from scipy.sparse.linalg import eigsh

    columns = 0

    class Counted(package.HessianLinearOperator):
        def _matmat(self, matrix: list[Tensor]) -> list[Tensor]:
            nonlocal columns
            columns += matrix[0].shape[-1]
            return super()._matmat(matrix)

    parameters = [p for p in module.parameters() if p.requires_grad]
    operator = Counted(module, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False)
    ends = (-0.1 * float(true.top[0]), float(true.top[0]))  # given, so that it need not look for them

    def counting(call: Callable[[], Any]) -> Callable[[], int]:
        def part() -> int:
            nonlocal columns
            columns = 0
            call()
            return columns

        return part

    def top() -> None:
        values = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=TOLERANCE, return_eigenvectors=False)
        error = (torch.tensor(values.copy()).double().sort(descending=True).values - true.top) / true.top
        if float(error.abs().max()) > TOLERANCE:
            print(f"    curvlinops: its top {TOP} are off by {float(error.abs().max()):.1e}")

    parts = {
        "top": top,
        "trace": lambda: package.hutchinson_trace(operator, num_matvecs=VECTORS),
        "density": lambda: package.lanczos_approximate_spectrum(operator, STEPS, num_repeats=VECTORS, boundaries=ends),
    }
    return lambda: {name: timed(counting(call)) for name, call in parts.items()}


PEERS = {"hessian-eigenthings": eigenthings, "curvlinops": curvlinops}


def median(bills: list[Bill]) -> Bill:
    return Bill(round(statistics.median(b.products for b in bills)), statistics.median(b.seconds for b in bills))


def compare(name: str, module: nn.Module, batch: Any, rounds: int) -> None:
    train(module, batch)
    module.eval()  # batch norm with fixed statistics: some of them refuse it otherwise
    objective = Objective(module, loss, [batch])
    true = reference(objective)
    print(f"\n{name}: {sum(p.numel() for p in module.parameters())} parameters, top {float(true.top[0]):.3g}")
    running = {}
    for peer, make in PEERS.items():
        try:
            running[peer] = make(module, batch, true)
        except ImportError:
            print(f"    {peer}: not importable")
    mine, theirs = [], {peer: [] for peer in running}
    for _ in range(rounds):  # side by side, so that a busy machine slows all of them
        bill, trace, error = ours(objective)
        mine.append(bill)
        for peer, run in running.items():
            theirs[peer].append(run())
    whole = median(mine)
    print(f"    ours: {whole.products} products, {whole.seconds:.1f} s; trace {trace:.4g} ± {error:.2g}")
    if not running:
        return
    bills = {peer: {part: median([one[part] for one in each]) for part in each[0]} for peer, each in theirs.items()}
    for peer, parts in bills.items():
        print(f"    {peer}: " + ", ".join(f"{part} {b.products} ({b.seconds:.1f} s)" for part, b in parts.items()))
    vectors = VECTORS * (true.theirs / true.ours) ** 2
    print(
        f"    a trace probe of theirs deviates by {true.theirs:.3g}, of ours by {true.ours:.3g} "
        f"({REFERENCE_PROBES} of each): {vectors:.0f} of theirs are as good as {VECTORS};\n"
        f"    a run from one vector has the top {TOP} to {TOLERANCE:g} after {true.steps} steps"
    )
    wanted: dict[str, dict[str, float]] = {
        "probes": {},
        "error": {"trace": max(1.0, vectors)},
        "resolution": {"density": VECTORS * max(STEPS, true.steps)},
    }
    print(
        f"    {'rule':12s} {'products':>9s} {'ratio':>6s} {'seconds':>8s} {'ratio':>6s}    (of the cheapest, to ours)"
    )
    for rule, counts in wanted.items():
        chosen = [
            [bill.for_products(counts.get(part, bill.products)) for bill in (parts[part] for parts in bills.values())]
            for part in ("top", "trace", "density")
        ]
        products = sum(min(bill.products for bill in part) for part in chosen)
        seconds = sum(min(bill.seconds for bill in part) for part in chosen)
        print(
            f"    {rule:12s} {products:9d} {products / whole.products:6.2f} "
            f"{seconds:8.1f} {seconds / whole.seconds:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each measurement")
    parser.add_argument("--only", default="", help="only workloads whose name begins so")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, (module, batch) in workloads().items():
        if name.startswith(options.only):
            # other kinds of attention have no second derivative; ours switches by itself
            with sdpa_kernel(SDPBackend.MATH):
                compare(name, module, batch, options.rounds)


if __name__ == "__main__":
    main()
