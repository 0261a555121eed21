"""The nc1 that noise alone would show: what differences of class means look like when there are none."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dynamics.metrics.class_sums import ScatterSums

_DRAWS = 64  # sketches drawn from a covariance that is known whole
_DELETED = 8  # rows that the jackknife leaves out in turn, at most
_WINDOWS = 8  # choices of the rows that are regressed on, that are averaged
_RESAMPLED = 8  # covariances that show how much the data matter
_NEGLIGIBLE = 1e-11  # relative eigenvalue of a sketch that float32 products cannot tell from zero


class UnknownFloorError(Exception):
    """There is no floor; the message says why."""


def noise_floor(scatter: ScatterSums) -> tuple[float, float]:
    """Expected nc1 of classes with equal means, and the standard error of this estimate.

    The means of n_c samples differ even where the classes do not. For Gaussian features of covariance Σ in all classes,
    the p = K - 1 independent differences are rows of Z Σ^½ with Z standard normal, up to the numbers of samples, and

        E nc1 = (N - K)/N · (N - Σ_c n_c²/N)/p · F(p),    F(p) = E tr[(ZΣZᵀ)⁻² ZΣ²Zᵀ],

    where the second factor is n_c for equal classes. Far from the number of directions in which features vary, p ≪
    d_eff = (tr Σ)²/tr Σ², F is p/d_eff, and for Σ ∝ I it is p/(d - p - 1) (inverse Wishart). Spectra of real features
    decay: with λ_i ∝ 1/i (512 of them, d_eff = 28) and K = 10, F is 0.157, where p/d_eff says 0.32 and the inverse
    Wishart mean at d_eff 0.49. Therefore neither is used.

    Instead: if ω is one more standard normal row, F(p) = E‖(ZΣZᵀ)⁻¹ ZΣω‖². That is the squared norm of the coefficients
    which regress a further row of a Gaussian sketch ΩΣΩᵀ on p others, so that :class:`ScatterSums` has all that is
    needed. Its sketch is of the sample covariance with ν = N - K degrees of freedom, which adds s·tr(G⁻¹)/(ν - p) to
    the squared norm in the mean (G the p × p part, s the residual variance of the regression); this is taken off. The
    estimate is then unbiased for any Σ and any ν > p + 1; where it comes out negative, nothing is known. Where features
    vary in ρ < p directions, F = ρ/(p - ρ - 1).

    The formula for F, and both regressions, are derived here and checked by simulation in the tests. The error is a
    jackknife over the rows of the sketch, which grows with d_eff/N, and what covariances of as many Gaussian samples
    differ in it.

    Raises:
        UnknownFloorError: If it is not known; the message says why.
    """
    counts = scatter.centers.counts[scatter.centers.present]
    p, total = len(counts) - 1, float(counts.sum())
    if p < 1:
        raise UnknownFloorError("fewer than two classes have samples")
    if not scatter.is_of_centers:
        raise UnknownFloorError("the centres are those of other data")
    freedom = int(total) - len(counts)
    sketch = scatter["sketch"]
    values = torch.linalg.eigvalsh(sketch)
    if float(values[-1]) <= 0:
        raise UnknownFloorError("the classes have no variance")
    rank = int((values > _NEGLIGIBLE * values[-1]).sum())
    if scatter.is_exact_sketch and p <= rank - 2:
        rows = min(p + 4, rank)
        value, error = _by_drawing(sketch, p, freedom, rows)
        again = lambda c: _by_drawing(c, p, freedom, rows, _RESAMPLED)[0]  # noqa: E731
        error = math.hypot(error, _data_error(sketch, freedom, again))
    elif p <= rank - 2 and freedom > p + 1:
        sketch = sketch[:rank, :rank]
        value, error = _by_jackknife(sketch, p, freedom)
        error = math.hypot(error, _data_error(sketch, freedom, lambda c: _of_sketch(c, p, freedom)))
    elif p >= rank + 2 and rank < freedom:
        value, error = rank / (p - rank - 1), 0.0
    elif rank >= freedom:
        raise UnknownFloorError("too few samples")
    else:
        raise UnknownFloorError("as many classes as directions in which features vary: the expectation is infinite")
    if value <= 0:
        raise UnknownFloorError("features vary in too many directions for so few samples")
    factor = freedom / total * (total - float(counts.square().sum()) / total) / p
    return factor * value, factor * error


def _data_error(sketch: Tensor, freedom: int, value: Callable[[Tensor], float]) -> float:
    """Standard deviation of a value over covariances of as many Gaussian samples as these are of."""
    generator = torch.Generator().manual_seed(1)
    values, vectors = torch.linalg.eigh(sketch)
    root = vectors * values.clamp(min=0).sqrt()
    found = []
    for _ in range(_RESAMPLED):
        draw = root @ _wishart_root(len(root), freedom, generator)
        found.append(value(draw @ draw.mT / freedom))
    return float(torch.tensor(found, dtype=torch.float64).std())


def _wishart_root(size: int, freedom: int, generator: torch.Generator) -> Tensor:
    """A, with AAᵀ a Wishart matrix of covariance I (Bartlett's decomposition where that has full rank)."""
    if freedom < size:
        return torch.randn(size, freedom, generator=generator, dtype=torch.float64)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).tril(-1)
    degrees = freedom - torch.arange(size, dtype=torch.float64)
    spread = 2 / (9 * degrees)  # χ² by the approximation of Wilson and Hilferty
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    squares = degrees * (1 - spread + normal * spread.sqrt()).clamp(min=0) ** 3
    return lower + squares.sqrt().diag()


def _of_sketch(sketch: Tensor, p: int, freedom: int) -> float:
    return _regressions(torch.linalg.inv(sketch), p, freedom)


def _by_jackknife(sketch: Tensor, p: int, freedom: int) -> tuple[float, float]:
    size = len(sketch)
    inverse = torch.linalg.inv(sketch)
    value = _regressions(inverse, p, freedom)
    deleted = min(size, _DELETED) if size - 1 >= p + 1 else 0
    others = []
    for i in range(deleted):
        kept = torch.arange(size) != i
        column = inverse[kept, i]
        # inverse of the matrix without row and column i
        reduced = inverse[kept][:, kept] - column[:, None] * column / inverse[i, i]
        others.append(_regressions(reduced, p, freedom))
    spread = torch.tensor(others, dtype=torch.float64).var(correction=0)
    return value, float(((size - 1) * spread).sqrt())


def _by_drawing(covariance: Tensor, p: int, freedom: int, rows: int, draws: int = _DRAWS) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        draw = torch.randn(rows, len(covariance), generator=generator, dtype=torch.float64)
        found.append(_regressions(torch.linalg.inv(draw @ covariance @ draw.mT), p, freedom))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std() / draws**0.5)


def _regressions(inverse: Tensor, p: int, freedom: int) -> float:
    """Mean of ‖G⁻¹g‖² - s·tr(G⁻¹)/(ν - p), over windows of rows that are regressed on the p others."""
    size = len(inverse)
    starts = torch.arange(0, size, max(1, size // _WINDOWS))
    orders = (starts[:, None] + torch.arange(size)) % size
    inside, rest = orders[:, :p], orders[:, p:]
    residuals = torch.linalg.inv(inverse[rest[:, :, None], rest[:, None]])
    across = inverse[inside[:, :, None], rest[:, None]]
    coefficients = across @ residuals
    traces = inverse.diagonal()[inside].sum(1) - (coefficients * across).sum((1, 2))
    variances = residuals.diagonal(dim1=1, dim2=2).sum(1)
    excess = coefficients.square().sum((1, 2)) - variances * traces / (freedom - p)
    return float(excess.mean()) / (size - p)
