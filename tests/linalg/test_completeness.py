import math
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch
from helpers.operators import DiagonalOperator, generator, network_like, random_symmetric

from lightning_dynamics.linalg import MatrixOperator, bound_complement, eigenpairs


def coordinates(count, size, dtype=torch.float64):
    return torch.eye(size, dtype=dtype)[:count]


def test_a_small_complement_is_bounded_exactly():
    spectrum = [5.0, 4.0, 1.5, 0.3, -0.2, -2.0]
    bounds = bound_complement(
        DiagonalOperator(spectrum), coordinates(2, 6), generator(), stop_above=3.0, stop_below=-3.0, max_products=50
    )
    # stops as soon as nothing beyond 3 in absolute value is possible
    assert 1.5 <= bounds.upper <= 3.0
    assert -3.0 <= bounds.lower <= -2.0
    assert bounds.products <= 4
    assert len(bounds.witnesses) == 0
    exact = bound_complement(
        DiagonalOperator(spectrum), coordinates(2, 6), generator(), stop_above=1.5, stop_below=-2.0, max_products=50
    )
    assert exact.upper == pytest.approx(1.5, abs=1e-12)
    assert exact.lower == pytest.approx(-2.0, abs=1e-12)


def test_nothing_is_left_of_the_whole_space():
    bounds = bound_complement(DiagonalOperator([1.0, 2.0]), coordinates(2, 2), generator())
    assert bounds.upper == -math.inf
    assert bounds.products == 0


def test_a_second_copy_of_a_known_eigenvalue_is_met():
    spectrum = network_like([1.0, 1.0, 0.8])
    bounds = bound_complement(
        DiagonalOperator(spectrum), coordinates(1, len(spectrum)), generator(), stop_above=0.95, max_products=40
    )
    assert len(bounds.witnesses) == 1
    assert bounds.seen_top > 0.95
    # most of it lies in the eigenspace that was not locked
    assert float(bounds.witnesses[0][1] ** 2) > 0.5


def test_a_side_that_is_not_asked_for_stays_open():
    bounds = bound_complement(
        MatrixOperator(random_symmetric(torch.linspace(-1, 1, 30))),
        torch.empty(0, 30, dtype=torch.float64),
        generator(),
        stop_above=1.5,
    )
    assert bounds.lower == -math.inf
    assert bounds.upper < math.inf


@pytest.mark.parametrize("outliers", [[1.0], [1.0, 0.99, 0.5], [1.0] * 5, [1.0, 0.3]])
@pytest.mark.parametrize("products", [3, 6, 10])
def test_the_bound_fails_no_more_often_than_stated(outliers, products):
    """With a low confidence failures are frequent enough to be counted."""
    confidence, trials = 0.6, 150
    operator = DiagonalOperator(network_like(outliers, bulk=250))
    empty = torch.empty(0, operator.size, dtype=torch.float64)
    failures = 0
    for seed in range(trials):
        bounds = bound_complement(
            operator, empty, generator(seed), confidence=confidence, stop_above=1.0 + 1e-9, max_products=products
        )
        failures += bounds.upper < 1.0 - 1e-12
    allowed = (1 - confidence) / 2  # the other half is spent on the lower side
    assert failures / trials <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / trials)


def test_the_bound_is_not_far_from_the_truth():
    """A bound that never fails because it is infinite would be of no use."""
    operator = DiagonalOperator(network_like([1.0, 0.9]))
    empty = torch.empty(0, operator.size, dtype=torch.float64)
    reached = [
        bound_complement(operator, empty, generator(0), stop_above=1e-9 + limit, max_products=30).products
        for limit in (1.5, 1.1, 1.01)
    ]
    assert reached == sorted(reached)
    assert reached[-1] <= 16


def _families():
    """Spectra of size n by name, each a function of a generator and n."""

    def uniform(draw, *shape):
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    def normal(draw, n):
        return torch.randn(n, generator=draw, dtype=torch.float64)

    def bulk(draw, n):
        return 0.4 * uniform(draw, max(n, 0)) ** 4 - 0.04

    def network(draw, n):
        count = min(n // 2, 10)
        return torch.cat([0.5 + 2.5 * uniform(draw, count), bulk(draw, n - count)])

    def clustered(draw, n):
        count, center = min(n // 3, 6), 1 + uniform(draw, 1)
        groups = [scale * center * (1 - 1e-3 * uniform(draw, count)) for scale in (1, -0.5)]
        return torch.cat([*groups, bulk(draw, n - 2 * count)])

    def multiple(draw, n):
        count = min(n // 3, 1 + int(5 * uniform(draw, 1)))
        copies = [torch.full((count,), value, dtype=torch.float64) for value in (1.0, 0.6)]
        pair = torch.full((min(2, n - 2 * count),), -0.3, dtype=torch.float64)
        return torch.cat([*copies, pair, bulk(draw, n - 2 * count - len(pair))])

    def nearly_multiple(draw, n):
        count, distance = min(n // 3, 1 + int(5 * uniform(draw, 1))), 10 ** (-10 + 6 * float(uniform(draw, 1)))
        groups = [center + distance * uniform(draw, count) for center in (1.0, -0.7)]
        return torch.cat([*groups, bulk(draw, n - 2 * count)])

    def rank_deficient(draw, n):
        rank = max(1, min(n // 4, int(12 * uniform(draw, 1))))
        return torch.cat([normal(draw, rank), torch.zeros(n - rank, dtype=torch.float64)])

    return {
        "random": normal,
        "network": network,
        "clustered": clustered,
        "multiple": multiple,
        "nearly multiple": nearly_multiple,
        "indefinite": lambda draw, n: normal(draw, n) ** 3,
        "rank deficient": rank_deficient,
        "decaying": lambda draw, n: 1 / torch.arange(1, n + 1).double() ** (0.5 + 1.5 * float(uniform(draw, 1))),
        "negative": lambda draw, n: -network(draw, n),
        "tiny": lambda draw, n: normal(draw, 5 + n % 4),
    }


FAMILIES = _families()
MOVES = (None, 1e-4, 1e-2, 1e-1)  # of the matrix whose vectors a warm run starts from, relative to its norm
SHAPES = ((3, 1), (5, 3), (1, 0), (10, 5), (0, 4), (2, 2), (4, 1))


@dataclass
class Tally:
    """What went wrong, each with the seed that repeats it; and how many could have."""

    ends: int = 0
    values: dict[str, int] = field(default_factory=lambda: {"top": 0, "bottom": 0})
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def share(self, kind, of):
        return len(self.wrong[kind]) / max(1, of)

    def most(self, rate, of):
        """Failures beyond which a binomial of this rate would go by chance once in some thousand times."""
        return rate * of + 3.1 * math.sqrt(rate * (1 - rate) * of) + 1


def problem(seed):
    """Family, matrix, what is asked of it, and the nearby matrix whose vectors a warm run starts from."""
    draw = generator(seed)
    name = list(FAMILIES)[seed % len(FAMILIES)]
    size = int(5 * 80 ** float(torch.rand(1, generator=draw, dtype=torch.float64)))
    dtype = (torch.float64, torch.float32)[seed // 10 % 2]
    move = MOVES[seed // 20 % len(MOVES)]
    spectrum = FAMILIES[name](draw, size)
    size = len(spectrum)
    matrix = random_symmetric(spectrum, seed=seed, dtype=dtype)
    top, bottom = SHAPES[int(torch.randint(len(SHAPES), (1,), generator=draw))]
    top = min(top, size // 2)
    bottom = min(bottom, size - top)
    other = None
    if move is not None:
        change = torch.randn(size, size, generator=draw, dtype=torch.float64)
        change = (change + change.mT) / torch.linalg.matrix_norm(change + change.mT, 2)
        other = (matrix.double() + move * float(spectrum.abs().max()) * change).to(dtype)
    return f"{name}, n = {size}, {dtype}, moved by {move}, {top} + {bottom}, seed {seed}", matrix, top, bottom, other


def judge(seed, tally):
    """Solve one problem and enter everything that is not as :class:`Eigenpairs` says."""
    name, matrix, top, bottom, other = problem(seed)
    start = None
    if other is not None:
        start = eigenpairs(MatrixOperator(other), top, bottom, generator=generator(seed + 1)).subspace
    found = eigenpairs(MatrixOperator(matrix), top, bottom, start=start, generator=generator(seed + 2))
    # of the matrix as it is rounded, float32 included
    exact, vectors = torch.linalg.eigh(matrix.double())
    norm = float(exact.abs().max())
    for side, end, true, basis, outwards, relative, floor in (
        ("top", found.top, exact.flip(0), vectors.flip(1), 1, 1e-3, 0.1),
        ("bottom", found.bottom, exact, vectors, -1, 1e-2, 1.0),
    ):
        count = len(end)
        if not count:
            continue
        tally.ends += 1
        tally.values[side] += count
        true = true[:count]

        def enter(kind, side=side):
            tally.wrong[kind].append(f"{side} of {name}")

        nearest = (end.values[:, None] - exact[None, :]).abs().amin(1)
        if bool((nearest > end.residuals + found.product_error).any()):
            enter("inclusion")
        if bool((outwards * (end.values - true) > 2 * found.product_error).any()):
            enter("not inside")
        missed = outwards * (true - end.values)
        within = missed <= end.bounds
        for _ in range(int((~within).sum())):
            enter(f"bounds at the {side}")
        if end.converged:
            allowed = relative * true.abs().clamp(min=floor * norm)
            if bool((end.bounds > allowed * (1 + relative)).any()):
                enter("converged without a bound")
            if bool((missed > allowed).any()):
                enter("converged too early")
        if end.limits is None:
            enter("unchecked")
        elif bool((true > end.limits).any() if outwards > 0 else (true < end.limits).any()):
            enter("limits")
        # a subspace can be judged where nothing was missed down to the value that its gap is measured to
        for k in range(1, count):
            if bool(within[: k + 1].all()):
                gap = abs(float(end.values[k - 1] - end.values[k])) - float(end.bounds[k])
                rounding = 2 * math.sqrt(k) * found.product_error / gap if gap > 0 else math.inf
                rounding += 8 * math.sqrt(k) * torch.finfo(matrix.dtype).eps
                outside = end.vectors[:k].double() @ basis[:, k:]
                if float(outside.norm()) > end.subspace_error(k) + rounding:
                    enter("subspace")
        # the last gap is what was met: of use where the values that were met are all there are, once each
        following = (exact.flip(0) if side == "top" else exact)[count : count + 1]
        if end.gap is not None and len(following) and bool(within.all()):
            if outwards * float(end.values[-1] - following[0]) + 2 * found.product_error < end.gap:
                enter("gap")
            elif end.gap > 0:
                rounding = 2 * math.sqrt(count) * (found.product_error / end.gap + 4 * torch.finfo(matrix.dtype).eps)
                if float((end.vectors.double() @ basis[:, count:]).norm()) > end.subspace_error(count) + rounding:
                    enter("subspace by gap")


def assert_as_stated(tally):
    def report(kind):
        return "\n".join([kind, *tally.wrong[kind]])

    for kind in ("inclusion", "not inside", "converged without a bound", "subspace", "subspace by gap"):
        assert not tally.wrong[kind], report(kind)
    assert len(tally.wrong["limits"]) <= tally.most(0.01, tally.ends), report("limits")
    # estimates that trust the values met, on spectra of which half were made to deceive them
    assert len(tally.wrong["bounds at the top"]) <= tally.most(0.04, tally.values["top"]), report("bounds at the top")
    assert len(tally.wrong["bounds at the bottom"]) <= tally.most(0.08, tally.values["bottom"]), report("bounds below")
    assert len(tally.wrong["converged too early"]) <= tally.most(0.02, tally.ends), report("converged too early")
    assert len(tally.wrong["unchecked"]) <= tally.most(0.01, tally.ends), report("unchecked")


def test_fifty_spectra_are_judged_as_stated():
    tally = Tally()
    for seed in range(0, 150, 3):
        judge(seed, tally)
    assert_as_stated(tally)
    assert tally.ends > 60


@pytest.mark.slow
def test_a_thousand_spectra_are_judged_as_stated():
    """Ten families, both precisions, cold and warm; the numbers of failures stand in the message of what fails."""
    tally = Tally()
    for seed in range(1200):
        judge(seed, tally)
    print({kind: len(cases) for kind, cases in tally.wrong.items()}, tally.values, tally.ends)
    assert_as_stated(tally)


def test_more_locked_rows_than_the_solver_expects():
    """Seventy coordinates of two hundred: what is left begins at the seventy-first."""
    spectrum = torch.linspace(1, 0, 200, dtype=torch.float64)
    locked = torch.eye(200, dtype=torch.float64)[:70]
    bounds = bound_complement(DiagonalOperator(spectrum), locked, generator(), stop_above=0.7, max_products=40)
    assert float(spectrum[70]) <= bounds.upper
    assert bounds.products > 3
