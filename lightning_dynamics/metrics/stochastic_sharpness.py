"""Curvature that mini-batches feel, from numbers of independently drawn batches, with errors.

At weights θ, batch B of b samples has the loss L_B, the gradient g_B and the Hessian H_B; the whole data set has L, g
and H. E_B is the mean over uniform b-subsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dynamics.metrics.estimates import (
    Estimate,
    UnresolvedGradientError,
    check_resolved,
    checked,
    column,
    mean_estimate,
    norm_pseudovalues,
    over_partners,
    partner,
    ratio_estimate,
    resolved_ratio,
)

_NORM = "The squared norm of the full gradient"


@dataclass(frozen=True)
class DrawnCurvature:
    """Numbers of M independently drawn batches at one θ, M even; draws 2j and 2j + 1 are partners.

    Every draw is a uniform b-subset of the population, independent of the others. p is the partner of m, ḡ the mean of
    the gradients gₘ, H̄ that of the Hessians Hₘ. With a positive diagonal C, the same numbers of C^½gₘ and C^½HₘC^½ give
    the C-weighted quantities. All columns have shape ``(M,)`` and become float64 on the CPU.

    Attributes:
        squared_norms: ‖gₘ‖².
        along_own: gₘᵀHₘgₘ.
        along_partner: gₚᵀHₘgₚ. Since the two batches are independent, its mean is E_B[g_BᵀHg_B].
        dots_mean: gₘ·ḡ.
        mean_squared_norm: ‖ḡ‖².
        along_mean: ḡᵀHₘḡ, or None if not measured.
        dots_image: gₘ·(H̄ḡ), or None if not measured.
        along_cross: gₘᵀHₘḡ, or None if not measured; from the product that gives ``along_mean``.

    Raises:
        ValueError: If columns differ in length, are not finite, or M is odd or below 4.
    """

    squared_norms: Tensor
    along_own: Tensor
    along_partner: Tensor
    dots_mean: Tensor
    mean_squared_norm: float
    along_mean: Tensor | None = None
    dots_image: Tensor | None = None
    along_cross: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.squared_norms)
        if count < 4 or count % 2:
            raise ValueError(f"An even number of draws is needed, at least 4; got {count}.")
        for name in ("squared_norms", "along_own", "along_partner", "dots_mean"):
            object.__setattr__(self, name, column(name, getattr(self, name), count))
        for name in ("along_mean", "dots_image", "along_cross"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, column(name, getattr(self, name), count))
        object.__setattr__(self, "mean_squared_norm", checked("mean_squared_norm", self.mean_squared_norm))

    def __len__(self) -> int:
        return len(self.squared_norms)


def batch_sharpness(draws: DrawnCurvature) -> Estimate:
    """Batch Sharpness E_B[g_BᵀH_Bg_B/‖g_B‖²], the mean of ratios; unbiased.

    At most MiniBS. With b = N it is gᵀHg/‖g‖², which is at most the sharpness. Groups are draws.

    Source: Andreyev and Beneventano, arXiv 2412.20553.

    Raises:
        UnresolvedGradientError: If a batch has no gradient.
    """
    return mean_estimate(draws.along_own / _nonzero(draws.squared_norms))


def batch_sharpness_ratio_of_means(draws: DrawnCurvature) -> Estimate:
    """E_B[g_BᵀH_Bg_B]/E_B‖g_B‖²: another quantity than :func:`batch_sharpness`, weighted by ‖g_B‖².

    May exceed MiniBS. Where every L_B is quadratic, the mean change of L_B in a step of size η along -g_B vanishes at η
    = 2 over this. Groups are draws; its bias is of the order of 1/M.

    Source: reference implementation of Andreyev and Beneventano, arXiv 2412.20553.

    Raises:
        UnresolvedGradientError: If no batch has a gradient.
    """
    if float(draws.squared_norms.sum()) == 0:
        raise UnresolvedGradientError("No batch has a gradient.")
    return ratio_estimate(draws.along_own, draws.squared_norms)


def gni(draws: DrawnCurvature) -> Estimate:
    """Gradient-noise interaction E_B[g_BᵀHg_B]/‖g‖², numerator and denominator each without bias.

    For plain SGD on a quadratic the mean loss neither rises nor falls at η = 2/GNI; so that 2/η is a balance, which
    holds in every stationary regime, and no edge. Groups are pairs of partners.

    Source: Andreyev and Beneventano, arXiv 2412.20553; the estimator is own.

    Raises:
        UnresolvedGradientError: If ‖g‖² is not resolved: less than 3 of its errors from zero.
    """
    return resolved_ratio(over_partners(draws.along_partner), over_partners(norm_pseudovalues(draws)), _NORM)


def ias(draws: DrawnCurvature) -> Estimate:
    """Interaction-aware sharpness E_B[g_BᵀHg_B]/E_B‖g_B‖², the full Hessian along gradients of batches.

    It has no threshold. Groups are pairs of partners; its bias is of the order of 1/M.

    Source: Lee and Jang, ICLR 2023 (its verbal definition); the estimator is own.

    Raises:
        UnresolvedGradientError: If no batch has a gradient.
    """
    if float(draws.squared_norms.sum()) == 0:
        raise UnresolvedGradientError("No batch has a gradient.")
    return ratio_estimate(over_partners(draws.along_partner), over_partners(draws.squared_norms))


def gradient_curvature(draws: DrawnCurvature) -> Estimate:
    """gᵀHg without bias: from products gᵢᵀHₘgⱼ of three different draws. Groups are pairs of partners.

    Of all gᵢᵀHₘgᵢ, which have to be taken out of the sums that the columns hold, only those of partners are known; they
    stand for the others, which have the same mean.

    The plug-in ḡᵀH̄ḡ would be too large by about tr(H·Cov g_B)/M.

    Source: own.

    Raises:
        ValueError: If ``along_mean``, ``along_cross`` or ``dots_image`` was not measured.
    """
    return mean_estimate(over_partners(_curvature_pseudovalues(draws)))


def gradient_sharpness(draws: DrawnCurvature) -> Estimate:
    """gᵀHg/‖g‖², the curvature along the full gradient, numerator and denominator each without bias.

    Groups are pairs of partners.

    Source: own.

    Raises:
        UnresolvedGradientError: If ‖g‖² is not resolved: less than 3 of its errors from zero.
        ValueError: If ``along_mean``, ``along_cross`` or ``dots_image`` was not measured.
    """
    below = over_partners(norm_pseudovalues(draws))
    check_resolved(below, _NORM)
    return ratio_estimate(over_partners(_curvature_pseudovalues(draws)), below)


def minibatch_sharpness(tops: Tensor) -> Estimate:
    """MiniBS, E_B[λmax(H_B)], from the largest eigenvalues of independently drawn batches, shape ``(S,)``.

    At least the sharpness (Jensen), non-increasing in b, and the sharpness at b = N. Batches that could not be solved
    may be left out if that does not depend on their eigenvalue.

    Source: Andreyev and Beneventano, arXiv 2412.20553, version 1.

    Raises:
        ValueError: If there is none.
    """
    return mean_estimate(column("tops", tops))


def sharpness_gap(tops: Tensor, along_top: Tensor) -> Estimate:
    """How far MiniBS lies above the sharpness of the pool of all draws: the mean of λmax(Hₘ) - v₁ᵀHₘv₁.

    v₁ is the top eigenvector of H̄, the Hessian of the pool, so that the mean of v₁ᵀHₘv₁ over all draws is λmax(H̄). No
    term is negative. This estimates MiniBS minus E λmax(H̄) over pools of as many draws; the gap to the sharpness of the
    whole data set is larger, by what λmax(H̄) exceeds that, which falls as the inverse number of draws. The error is
    that of the influence function λmax(Hₘ) - v₁ᵀHₘv₁: to first order in H̄ - H the turn of v₁ plays no part.

    Source: own.

    Args:
        tops: λmax(Hₘ), shape ``(M,)``.
        along_top: v₁ᵀHₘv₁ of the same draws, shape ``(M,)``.

    Raises:
        ValueError: If the shapes differ, or there is no draw.
    """
    tops = column("tops", tops)
    return mean_estimate(tops - column("along_top", along_top, len(tops)))


def update_edge(slopes: Tensor, bends: Tensor) -> Estimate:
    """R = -½ΔᵀHΔ/(gᵀΔ) of an update Δ: 1 where the step gains nothing to second order, ½ where its length is best.

    For gradient descent r is η/2 times the curvature along g. Δ must not depend on the draws. The ratio of two means
    over draws has a bias of the order of 1/M. Groups are draws; a single one (the whole data set) has no error.

    Source: own.

    Args:
        slopes: gₘ·Δ, shape ``(M,)``.
        bends: ΔᵀHₘΔ, shape ``(M,)``.

    Raises:
        UnresolvedGradientError: If gᵀΔ is not resolved: less than 3 of its errors from zero.
        ValueError: If the shapes differ.
    """
    slopes, bends = _slopes_and_bends(slopes, bends)
    return resolved_ratio(-bends / 2, slopes, "The slope of the loss along the update")


def predicted_change(slopes: Tensor, bends: Tensor) -> Estimate:
    """gᵀΔ + ½ΔᵀHΔ, the change of the loss by an update Δ to second order; arguments of :func:`update_edge`.

    Raises:
        ValueError: If the shapes differ.
    """
    slopes, bends = _slopes_and_bends(slopes, bends)
    return mean_estimate(slopes + bends / 2)


def plateaus(lr: float, momentum: float = 0.0, nesterov: bool = False) -> tuple[float, float]:
    """Where Batch Sharpness is observed to level off: (2(1 - β)/η for small batches, 2(1 + β)/η for large ones).

    The upper is the edge of the deterministic optimizer, which for Nesterov momentum is 2(1 + β)/(η(1 + 2β)). Both are
    2/η without momentum. Observed, not proved: on quadratics Batch Sharpness decides nothing about stability.

    Source: abstract of arXiv 2604.14108.

    Raises:
        ValueError: If the learning rate is not positive, or the momentum not in [0, 1).
    """
    _check_optimizer(lr, momentum)
    high = 2 * (1 + momentum) / lr
    return 2 * (1 - momentum) / lr, high / (1 + 2 * momentum) if nesterov else high


def predicted_gni(lr: float, momentum: float, gradient_sharpness: float) -> float:
    """What GNI is in a stationary regime: 2(1 - β)/η + 2β/(1 + β) · gᵀHg/‖g‖².

    Exact on quadratics under white noise and heavy-ball momentum, where GNI and gᵀHg/‖g‖² are ratios of time averages.

    Source: own.

    Raises:
        ValueError: If the learning rate is not positive, or the momentum not in [0, 1).
    """
    _check_optimizer(lr, momentum)
    return 2 * (1 - momentum) / lr + 2 * momentum / (1 + momentum) * gradient_sharpness


def balance_ratio(points: Sequence[DrawnCurvature], lr: float | Sequence[float], momentum: float = 0.0) -> Estimate:
    """GNI over :func:`predicted_gni`, with sums over several points in time: 1 in a stationary regime, and no edge.

        Σₜ E_B[g_BᵀHg_B] / Σₜ (2(1 - β)/ηₜ · ‖g‖² + 2β/(1 + β) · gᵀHg)

    A group is column pair j of every point. The error is right both where all points used the same draws and where each
    had its own. It is that of the average over these very points: how much another stretch of training would differ is
    not in it.

    Source: own.

    Args:
        points: With as many draws each; with momentum the columns for gᵀHg are needed.
        lr: η, or one for each point.
        momentum: β.

    Raises:
        UnresolvedGradientError: If the denominator is not resolved: less than 3 of its errors from zero.
        ValueError: If there is no point, numbers differ, or a column is missing.
    """
    rates = [float(lr)] * len(points) if isinstance(lr, int | float) else [float(rate) for rate in lr]
    if not points or len(rates) != len(points):
        raise ValueError(f"One learning rate for each point is needed, got {len(rates)} for {len(points)}.")
    if len({len(point) for point in points}) > 1:
        raise ValueError(f"Points must have as many draws each, got {sorted({len(point) for point in points})}.")
    above = torch.zeros(len(points[0]) // 2, dtype=torch.float64)
    below = torch.zeros_like(above)
    for point, rate in zip(points, rates, strict=True):
        _check_optimizer(rate, momentum)
        above += over_partners(point.along_partner)
        below += 2 * (1 - momentum) / rate * over_partners(norm_pseudovalues(point))
        if momentum:
            below += 2 * momentum / (1 + momentum) * over_partners(_curvature_pseudovalues(point))
    return resolved_ratio(above, below, "The predicted numerator")


def gap_exponent(batch_sizes: Sequence[int], gaps: Sequence[float], errors: Sequence[float]) -> Estimate:
    """C of gap ∝ b^c, by weighted least squares in log-log; -1 for a gap that falls as 1/b.

    To be fitted over b ≪ N only, since at b = N the gap is zero. The error follows from those of the gaps, taken as
    independent, and is to be read with the normal quantile; where the points scatter more than that around the line it
    is widened by √(χ²/(n - 2)).

    Source: own.

    Args:
        batch_sizes: b, three different ones at least.
        gaps: Positive, one for each.
        errors: Their standard errors, positive.

    Raises:
        ValueError: If there are fewer than three sizes, or something is not positive.
    """
    if not len(batch_sizes) == len(gaps) == len(errors):
        raise ValueError(f"As many sizes, gaps and errors are needed: {len(batch_sizes)}, {len(gaps)}, {len(errors)}.")
    if len(set(batch_sizes)) < 3:
        raise ValueError(f"At least three different batch sizes are needed, got {len(set(batch_sizes))}.")
    size, gap, error = (torch.tensor([*values], dtype=torch.float64) for values in (batch_sizes, gaps, errors))
    for name, values in (("batch sizes", size), ("gaps", gap), ("errors", error)):
        if not bool(((values > 0) & values.isfinite()).all()):
            raise ValueError(f"All {name} must be positive and finite, got {values.tolist()}.")
    x, y, weights = size.log(), gap.log(), (gap / error).square()
    x = x - (weights * x).sum() / weights.sum()
    spread = (weights * x.square()).sum()
    slope = (weights * x * y).sum() / spread
    level = (weights * y).sum() / weights.sum()
    excess = (weights * (y - level - slope * x).square()).sum() / (len(size) - 2)
    return Estimate(float(slope), math.sqrt(max(1.0, float(excess)) / float(spread)))


def _curvature_pseudovalues(draws: DrawnCurvature) -> Tensor:
    """Jackknife pseudo-values of gᵀHg, shape ``(M,)``; their mean is the U-statistic over three draws.

    Draw m takes part as the Hessian's batch, and twice as a gradient's. What no column knows is replaced by something
    of the same mean over draws, so that only the error is touched: gₘᵀHₙgₘ summed over n by (M - 1) times that of the
    partner, and gₘ·mean(Hₙgₙ) by the mean of ``along_cross``.
    """
    along, cross, image = draws.along_mean, draws.along_cross, draws.dots_image
    if along is None or cross is None or image is None:
        raise ValueError("`along_mean`, `along_cross` and `dots_image` are needed for gᵀHg, and were not measured.")
    count, own, by_partner = len(draws), draws.along_own, draws.along_partner
    hessian = count**2 * along - 2 * count * cross + own - (count - 1) * by_partner
    gradient = count**2 * image - count * (cross + cross.mean()) + own - (count - 1) * partner(by_partner)
    triples = (count - 1) * (count - 2)
    value = hessian.mean() / triples
    # Sₘ, the sum over triples with m, is M(M - 1)(M - 2)·U - (M - 1)(M - 2)(M - 3)·U without m
    taking_part = (hessian + 2 * gradient) / triples
    pseudo: Tensor = ((count - 1) * taking_part - 2 * count * value) / (count - 3)
    return pseudo


def _nonzero(squared_norms: Tensor) -> Tensor:
    missing = int((squared_norms == 0).sum())
    if missing:
        raise UnresolvedGradientError(f"{missing} of {len(squared_norms)} batches have no gradient.")
    return squared_norms


def _slopes_and_bends(slopes: Tensor, bends: Tensor) -> tuple[Tensor, Tensor]:
    slopes = column("slopes", slopes)
    return slopes, column("bends", bends, len(slopes))


def _check_optimizer(lr: float, momentum: float) -> None:
    checked("lr", lr, positive=True)
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must lie in [0, 1), got {momentum!r}.")
