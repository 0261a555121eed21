"""Leaving a saddle by SGD: reshuffled batches push, batches drawn with replacement only shake.

The loss is ½θᵀHθ with one negative eigenvalue, the mean of k batches ½θᵀH_aθ + c_aᵀθ whose gradients at the saddle sum
to zero. Training starts there. Four ways: gradient descent, SGD with batches drawn with replacement (WR), reshuffled
every epoch (RR), and gradient descent with injected Gaussian noise of the batches' own covariance.

    python examples/saddle.py     # three tables and a picture
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_dynamics.metrics import epoch_drift
from lightning_dynamics.recording.figures.style import BLUE, GREEN, GREY, VERMILION

BATCHES, LR = 8, 0.1
CURVATURES = (1.0, 0.3, -0.05)  # of the mean loss; the last direction leads down
COUPLING = 0.6  # between the first direction and the last, of random sign
ESCAPED = 1.0  # distance along the last direction
LIMIT = 4_000  # steps
WAYS = {"GD": GREY, "WR": BLUE, "RR": VERMILION, "noise": GREEN}


class Saddle(NamedTuple):
    """Batches of quadratic losses, in float64."""

    hessians: Tensor  # H_a, shape (k, 3, 3)
    gradients: Tensor  # c_a, shape (k, 3)


def saddle(along: float, size: float = 1.0) -> Saddle:
    """A saddle whose batches differ by ``size``, with ``along`` times as much noise downhill as across.

    Where H_a is larger than the mean across, so is c_a: this covariance of Hessian and gradient is what drifts.
    """
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(BATCHES // 2)
    others = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(BATCHES // 4)
    hessians = torch.diag(torch.tensor(CURVATURES, dtype=torch.float64)).repeat(BATCHES, 1, 1)
    hessians[:, 0, 2] += size * COUPLING * signs
    hessians[:, 2, 0] += size * COUPLING * signs
    gradients = size * torch.stack([signs, others * signs, along * others], dim=1)
    return Saddle(hessians, gradients)


def follow(problem: Saddle, orders: Tensor, start: Tensor | None = None) -> Tensor:
    """Where SGD is after these batches; shapes ``(runs, steps)`` and ``(runs, 3)``."""
    at = torch.zeros(len(orders), 3, dtype=torch.float64) if start is None else start
    for chosen in orders.T:
        at = at - LR * (torch.einsum("rij,rj->ri", problem.hessians[chosen], at) + problem.gradients[chosen])
    return at


def exact_mean(problem: Saddle) -> Tensor:
    """Mean after one epoch over all k! orders."""
    return follow(problem, torch.tensor(list(itertools.permutations(range(BATCHES))))).mean(0)


class Escape(NamedTuple):
    """What many runs of one way do."""

    steps: Tensor  # to leave, shape (runs,); infinite where a run stayed
    distances: Tensor  # median distance downhill after each step
    first: Tensor  # position downhill after one epoch, shape (runs,)

    @property
    def mean(self) -> float:
        return float(self.steps.mean())

    @property
    def error(self) -> float:
        return float(self.steps.std()) / math.sqrt(len(self.steps))


def escape(problem: Saddle, way: str, runs: int) -> Escape:
    """Let many runs go until all have left, or for so many steps."""
    draw = torch.Generator().manual_seed(0)
    mean_hessian, mean_gradient = problem.hessians.mean(0), problem.gradients.mean(0)
    at = torch.zeros(runs, 3, dtype=torch.float64)
    steps = torch.full((runs,), math.inf, dtype=torch.float64)
    distances, first, order = [], at[:, 2], torch.zeros(runs, BATCHES, dtype=torch.long)
    for step in range(LIMIT):
        if way == "RR" and step % BATCHES == 0:
            order = torch.rand(runs, BATCHES, generator=draw).argsort(1)
        if way in ("WR", "RR"):
            one = torch.randint(BATCHES, (runs,), generator=draw) if way == "WR" else order[:, step % BATCHES]
            at = at - LR * (torch.einsum("rij,rj->ri", problem.hessians[one], at) + problem.gradients[one])
        else:
            gradient = at @ mean_hessian + mean_gradient
            if way == "noise":
                # weights of the batches, of mean 1/k and covariance (I - 11ᵀ/k)/k: then Cov of the sum is Cov_a(g_a)
                z = torch.randn(runs, BATCHES, generator=draw, dtype=torch.float64)
                weights = (z - z.mean(1, keepdim=True)) / math.sqrt(BATCHES)
                gradient = gradient + weights @ problem.gradients
                hessians = (weights @ problem.hessians.flatten(1)).view(runs, 3, 3)
                gradient = gradient + torch.einsum("rij,rj->ri", hessians, at)
            at = at - LR * gradient
        if step == BATCHES - 1:
            first = at[:, 2]
        distance = at[:, 2].abs()
        distances.append(distance.median())
        steps[(distance > ESCAPED) & steps.isinf()] = step + 1
        if not steps.isinf().any():
            break
    return Escape(steps, torch.stack(distances), first)


def print_epoch(runs: int) -> None:
    """The mean after one epoch: of all orders, and as the formula has it."""
    print(f"Mean position downhill after one epoch of {BATCHES} steps, noise only across")
    print("  size of noise   RR, all orders         formula   relative error   WR, simulated")
    for size in (1.0, 0.3, 0.1, 0.03):
        problem = saddle(0.0, size)
        exact = float(exact_mean(problem)[2])
        formula = float(epoch_drift(problem.hessians, problem.gradients, LR)[2])
        first = escape_first(problem, runs)
        print(
            f"  {size:13.2f} {exact:16.4e} {formula:15.4e} {abs(exact / formula - 1):16.1e}   "
            f"{float(first.mean()):.1e} ± {float(first.std()) / math.sqrt(len(first)):.1e}"
        )


def escape_first(problem: Saddle, runs: int) -> Tensor:
    """Positions downhill after one epoch with replacement."""
    draw = torch.Generator().manual_seed(1)
    return follow(problem, torch.randint(BATCHES, (runs, BATCHES), generator=draw))[:, 2]


def shown(found: Escape) -> str:
    stayed = int(found.steps.isinf().sum())
    if stayed:
        return "never" if stayed == len(found.steps) else f"> {LIMIT} ({stayed} stay)"
    return f"{found.mean:.1f} ± {found.error:.1f}"


def picture(example: dict[str, Escape], table: dict[float, dict[str, Escape]], along: float) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = {"WR": "with replacement", "RR": "reshuffled", "noise": "injected noise"}
    for way, label in labels.items():
        left.plot(range(1, len(example[way].distances) + 1), example[way].distances, color=WAYS[way], label=label)
        values = [(a, found[way].mean, found[way].error) for a, found in table.items()]
        right.errorbar(*zip(*values, strict=True), fmt="o-", color=WAYS[way], markersize=3.5, label=label)
    left.axhline(ESCAPED, color=GREY, linestyle="--", linewidth=1)
    left.set_yscale("log")
    left.set_ylim(1e-4, 3)
    left.set_xlim(0, max(float(found.mean) for way, found in example.items() if way != "GD") * 1.3)
    left.set_xlabel("steps from the saddle")
    left.set_ylabel("median distance downhill")
    left.set_title(f"noise downhill / noise across = {along:g}", fontsize=10)
    right.set_xscale("symlog", linthresh=min(a for a in table if a))
    right.set_xlabel("noise downhill / noise across")
    right.set_ylabel("mean steps to leave")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[float, dict[str, Escape]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=600, help="runs of each way")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    print_epoch(20 * options.runs)
    table = {}
    print(f"\nSteps until {ESCAPED:g} downhill, mean of {options.runs} runs ± standard error")
    print("  noise downhill/across      GD  with replacement      reshuffled  injected noise   RR/WR")
    for along in (0.0, 0.03, 0.1, 0.3, 0.5, 1.0):
        problem = saddle(along)
        table[along] = found = {way: escape(problem, way, 1 if way == "GD" else options.runs) for way in WAYS}
        ratio = found["RR"].mean / found["WR"].mean
        columns = [shown(found[way]) for way in ("WR", "RR", "noise")]
        print(f"  {along:21g} {shown(found['GD']):>7} " + " ".join(f"{c:>16}" for c in columns) + f" {ratio:7.2f}")

    path = options.folder / "saddle.png"
    picture(table[0.0], table, 0.0).savefig(path)
    print(f"\nPicture     {path}")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a problem
    main()
