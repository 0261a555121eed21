"""The noise of mini-batch gradients, from numbers of independently drawn batches, with errors.

At weights θ, g_B is the gradient of a batch of b samples, g that of all N, gᵢ that of sample i. Cov_B is the covariance
of g_B over uniform b-subsets and Σ = (1/N)Σᵢ(gᵢ - g)(gᵢ - g)ᵀ that of samples: Cov_B = Σ·(N - b)/(b(N - 1)).
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
    checked,
    column,
    mean_estimate,
    norm_pseudovalues,
    ratio_estimate,
    resolved_ratio,
    squared_gradient_norm,
    variance_pseudovalues,
)
from lightning_dynamics.metrics.reshuffling import drift_weight

_TAIL = 0.1  # share of the values that a tail index is fitted to


@dataclass(frozen=True)
class DrawnGradients:
    """Numbers of M independently drawn batches at one θ.

    Every draw is a uniform b-subset of the population, independent of the others; ḡ is the mean of their gradients gₘ.
    Columns have shape ``(M,)`` and become float64 on the CPU. Groups of all errors are draws.

    Attributes:
        squared_norms: ‖gₘ‖².
        squared_deviations: ‖gₘ - ḡ‖².
        dots_mean: gₘ·ḡ.
        mean_squared_norm: ‖ḡ‖².
        batch_size: b.
        population: N, or None where it is infinite or not known.
        along: vᵢ·gₘ for q unit vectors, shape ``(M, q)``, or None.

    Raises:
        ValueError: If columns differ in length or are not finite, M < 3, or not 1 ≤ b ≤ N.
    """

    squared_norms: Tensor
    squared_deviations: Tensor
    dots_mean: Tensor
    mean_squared_norm: float
    batch_size: int
    population: int | None = None
    along: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.squared_norms)
        if count < 3:
            raise ValueError(f"At least 3 draws are needed, got {count}.")
        for name in ("squared_norms", "squared_deviations", "dots_mean"):
            object.__setattr__(self, name, column(name, getattr(self, name), count))
        object.__setattr__(self, "mean_squared_norm", checked("mean_squared_norm", self.mean_squared_norm))
        _check_sizes(self.batch_size, self.population)
        if self.along is not None:
            along = self.along.detach().to("cpu", torch.float64)
            if along.dim() != 2 or len(along) != len(self) or not bool(along.isfinite().all()):
                raise ValueError(f"`along` must be finite and of shape ({len(self)}, q), got {tuple(along.shape)}.")
            object.__setattr__(self, "along", along)

    def __len__(self) -> int:
        return len(self.squared_norms)

    @property
    def samples_per_batch(self) -> float:
        """Tr Σ/tr Cov_B = b(N - 1)/(N - b); b where N is None, infinite at b = N."""
        b, n = self.batch_size, self.population
        if n is None:
            return float(b)
        return b * (n - 1) / (n - b) if n > b else math.inf


@dataclass(frozen=True)
class SampleMoments:
    """Numbers of the single samples in M drawn batches: for each batch a sum over its b samples.

    A sample may be in several batches; errors are therefore over batches.

    Attributes:
        draws: The same batches.
        squared_norms: Σ_{i∈m}‖gᵢ‖², shape ``(M,)``.
        squared_deviations: Σ_{i∈m}‖gᵢ - ḡ‖², shape ``(M,)``; None: from the other columns, which gₘ = mean of the gᵢ
            allows, at the price of the digits that ‖ḡ‖² and tr Σ have in common.

    Raises:
        ValueError: If columns differ in length or are not finite.
    """

    draws: DrawnGradients
    squared_norms: Tensor
    squared_deviations: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.draws)
        object.__setattr__(self, "squared_norms", column("squared_norms", self.squared_norms, count))
        if self.squared_deviations is not None:
            deviations = column("squared_deviations", self.squared_deviations, count)
            object.__setattr__(self, "squared_deviations", deviations)


def noise_trace(draws: DrawnGradients) -> Estimate:
    """Tr Cov_B without bias, 1/(M - 1)·Σ‖gₘ - ḡ‖².

    Source: own; the sample variance.
    """
    return mean_estimate(variance_pseudovalues(draws.squared_deviations))


def sample_noise_trace(draws: DrawnGradients) -> Estimate:
    """Tr Σ from gradients of batches: tr Cov_B·b(N - 1)/(N - b), or b·tr Cov_B where N is None; unbiased.

    The factor is that of independently drawn subsets, not that of disjoint batches of one epoch.

    Raises:
        UnresolvedGradientError: If b = N: then batches do not differ.
    """
    if math.isinf(draws.samples_per_batch):
        raise UnresolvedGradientError("Batches of the whole population do not differ: their noise tells nothing.")
    return noise_trace(draws).scaled(draws.samples_per_batch)


def squared_batch_norm(draws: DrawnGradients) -> Estimate:
    """E‖g_B‖² = ‖g‖² + tr Cov_B."""
    return mean_estimate(draws.squared_norms)


def signal_to_noise(draws: DrawnGradients) -> Estimate:
    """‖g‖²/tr Cov_B, numerator and denominator each without bias; may come out negative where noise dominates.

    Raises:
        UnresolvedGradientError: If batches do not differ.
    """
    return ratio_estimate(norm_pseudovalues(draws), _noise(draws))


def noise_scale(draws: DrawnGradients) -> Estimate:
    """Noise scale tr Σ/‖g‖², in samples: the batch size at which noise and gradient are of one size.

    Numerator and denominator are each without bias. For independent draws they are those of the two-size estimator with
    the sizes b and Mb, averaged over the draws.

    Source: own, on a question of McCandlish et al., arXiv 1812.06162.

    Raises:
        UnresolvedGradientError: If ‖g‖² is not resolved, less than 3 of its errors from zero, or b = N.
    """
    if math.isinf(draws.samples_per_batch):
        raise UnresolvedGradientError("Batches of the whole population do not differ: their noise tells nothing.")
    found = resolved_ratio(
        variance_pseudovalues(draws.squared_deviations),
        norm_pseudovalues(draws),
        "The squared norm of the full gradient",
    )
    return found.scaled(draws.samples_per_batch)


def directional_variances(draws: DrawnGradients) -> list[Estimate]:
    """cᵢ = vᵢᵀCov_B vᵢ, unbiased, for each of the q vectors in ``along``.

    Raises:
        ValueError: If ``along`` is None.
    """
    return [mean_estimate(column) for column in _direction_pseudovalues(draws).T]


def noise_share(draws: DrawnGradients) -> Estimate:
    """Σcᵢ/tr Cov_B: the share of the noise in the span of the q vectors, which must be orthonormal.

    Raises:
        ValueError: If ``along`` is None.
        UnresolvedGradientError: If batches do not differ.
    """
    return ratio_estimate(_direction_pseudovalues(draws).sum(1), _noise(draws))


def weighted_noise_trace(draws: DrawnGradients, eigenvalues: Tensor, lr: float, batches_per_epoch: int) -> Estimate:
    """Σ w(ηkλᵢ)·cᵢ + ½·(tr Cov_B - Σcᵢ) with its error; see :func:`weighted_trace`.

    Args:
        draws: With ``along`` for the eigenvectors of λᵢ.
        eigenvalues: λᵢ, shape ``(q,)``.
        lr: η.
        batches_per_epoch: k.

    Raises:
        ValueError: If ``along`` is None or has another number of vectors.
    """
    along = _direction_pseudovalues(draws)
    if along.shape[1] != len(eigenvalues):
        raise ValueError(f"{len(eigenvalues)} eigenvalues for {along.shape[1]} vectors.")
    excess = drift_weight(lr * batches_per_epoch * eigenvalues.detach().to("cpu", torch.float64)) - 0.5
    return mean_estimate(along @ excess + variance_pseudovalues(draws.squared_deviations) / 2)


def modified_loss_terms(draws: DrawnGradients, lr: float) -> tuple[Estimate, Estimate]:
    """((η/4)‖g‖², (η/4)E‖g_B‖²): by what the loss that SGD follows differs from L, to first order in η.

    The first is that of gradient descent. The second is (η/4k)Σⱼ‖∇Lⱼ‖² over the k batches of an epoch, in the mean over
    permutations; it is the first plus (η/4)·tr Cov_B. For plain SGD.

    Source: own, on a question of Smith et al., arXiv 2101.12176.

    Raises:
        ValueError: If ``lr`` is not positive.
    """
    checked("lr", lr, positive=True)
    return squared_gradient_norm(draws).scaled(lr / 4), squared_batch_norm(draws).scaled(lr / 4)


def fisher_trace(samples: SampleMoments) -> Estimate:
    """(1/N)Σᵢ‖gᵢ‖² without bias: the trace of the empirical Fisher matrix, tr Σ + ‖g‖².

    With gradients for labels drawn from the model it is that of the true Fisher matrix.
    """
    return mean_estimate(samples.squared_norms / samples.draws.batch_size)


def trace_from_samples(samples: SampleMoments) -> Estimate:
    """Tr Σ from gradients of samples, (1/N)Σᵢ‖gᵢ‖² - ‖g‖² with both terms unbiased; for any b and N, b = N too.

    Source: own.
    """
    return mean_estimate(_sample_pseudovalues(samples))


def mean_of_subset(values: Tensor, population: int | None = None) -> Estimate:
    """Mean over a population from n distinct members of it, drawn uniformly without replacement; unbiased.

    Args:
        values: Shape ``(n,)``.
        population: N, or None where it is infinite or not known. At n = N the error is zero.

    Raises:
        ValueError: If there is no value, or N < n.
    """
    _check_sizes(len(values), population)
    found = mean_estimate(values)
    if found.error is None:
        return Estimate(found.value, 0.0 if population == 1 else None)
    return Estimate(found.value, found.error * _finite(len(values), population))


def trace_of_subset(squared_deviations: Tensor, population: int | None = None) -> Estimate:
    """Tr Σ, with 1/N, from n distinct samples drawn uniformly without replacement; unbiased.

    (N - 1)/N · 1/(n - 1) · Σ‖gᵢ - ḡ‖², ḡ the mean over the n samples. The error is a jackknife with the factor
    √(1 - n/N), so that it is zero at n = N.

    Source: own.

    Args:
        squared_deviations: ‖gᵢ - ḡ‖², shape ``(n,)``.
        population: N, or None where it is infinite or not known.

    Raises:
        ValueError: If n < 3, or N < n.
    """
    count = len(squared_deviations)
    _check_sizes(count, population)
    if count < 3:
        raise ValueError(f"At least 3 samples are needed, got {count}.")
    found = mean_estimate(variance_pseudovalues(squared_deviations.detach().to("cpu", torch.float64)))
    assert found.error is not None
    factor = 1.0 if population is None else (population - 1) / population
    return Estimate(factor * found.value, factor * found.error * _finite(count, population))


def tail_index(values: Tensor, share: float = _TAIL) -> Estimate:
    """Index α of a tail P(X > x) ∝ x^-α, by Hill's estimator on the largest tenth of independent positive values.

    With the k = ⌈share · n⌉ largest values it is (k - 1)/Σ ln(X₍ᵢ₎/X₍ₖ₊₁₎), and its error α/√(k - 2). Both are exact
    where the tail is a power beyond X₍ₖ₊₁₎. Elsewhere α says how fast the tail falls at that quantile, and nothing of
    a power: for tails that fall faster (normal, exponential) it grows without bound as ``share`` falls, and where a
    power is only approached, x^-α·(1 + c·x^-τ), it is off by a part of the order of that share to the power of τ/α. A
    moment of the norm is finite only for orders below α.

    Source: Hill (1975); without bias for exact powers.

    Args:
        values: For example ‖gₘ - ḡ‖, shape ``(n,)``.
        share: Part of the values that counts as the tail, in (0, 1).

    Raises:
        ValueError: If a value is not positive, ``share`` not in (0, 1), or the tail has fewer than 5 values.
        UnresolvedGradientError: If the largest values are all equal.
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must lie in (0, 1), got {share!r}.")
    x = values.detach().to("cpu", torch.float64).sort(descending=True).values
    if not bool(((x > 0) & x.isfinite()).all()):
        raise ValueError("All values must be positive and finite.")
    k = min(math.ceil(share * len(x)), len(x) - 1)
    if k < 5:
        raise ValueError(f"The tail has {k} of {len(x)} values; at least 5 are needed.")
    excess = float((x[:k] / x[k]).log().sum())
    if excess <= 0:
        raise UnresolvedGradientError("The largest values are all equal.")
    index = (k - 1) / excess
    return Estimate(index, index / math.sqrt(k - 2))


def autocorrelation(series: Tensor, lags: Sequence[int]) -> list[Estimate]:
    """Autocorrelation ρ(h) of a stationary series, with errors by Bartlett's formula, 1/n · Σⱼ(ρⱼ₊ₕ + ρⱼ₋ₕ - 2ρⱼρₕ)².

    The ρⱼ in the formula are the series' own, damped to zero where they can no longer be told from it. Both covariances
    are corrected for the mean having been estimated. The series should be longer than 10 times the lags asked for and
    the time in which it forgets. A series that changes in size or mean is not stationary.

    Source: Bartlett (1946) for the formula; the damping and the correction are own.

    Args:
        series: Consecutive values, shape ``(n,)``, n ≥ 8.
        lags: h ≥ 0.

    Raises:
        ValueError: If the series is too short, constant or not finite, or a lag negative or above n/2.
    """
    x = series.detach().to("cpu", torch.float64)
    n = len(x) if x.dim() == 1 else 0
    if n < 8 or not bool(x.isfinite().all()):
        raise ValueError(f"At least 8 finite values are needed, got shape {tuple(x.shape)}.")
    if not all(0 <= lag <= n // 2 for lag in lags):
        raise ValueError(f"Lags must lie between 0 and half of the length {n}, got {[*lags]}.")
    x = x - x.mean()
    power = torch.fft.rfft(x, 2 * n).abs().square()
    sums = torch.fft.irfft(power, 2 * n)[:n]
    if not float(sums[0]) > 0:
        raise ValueError("The series is constant.")
    raw = sums / (n - torch.arange(n)) / (sums[0] / n)
    damped = _damped(raw, n)
    excess = float(damped.sum() * 2 - 1) / n  # Var x̄ in units of the variance
    excess = min(max(excess, 0.0), 0.5)
    rho = (raw + excess) / (1 + excess)
    damped = _damped(rho, n)
    both = torch.cat([damped.flip(0)[:-1], damped])  # at -(n - 1) ... n - 1
    found = []
    for lag in lags:
        if lag == 0:
            found.append(Estimate(1.0, 0.0))
            continue
        j = torch.arange(1, n)
        ahead = torch.where(j + lag < n, damped[(j + lag).clamp(max=n - 1)], 0.0)
        terms = ahead + both[j - lag + n - 1] - 2 * damped[j] * rho[lag]
        found.append(Estimate(float(rho[lag]), math.sqrt(float(terms.square().sum()) / (n - lag))))
    return found


def _damped(rho: Tensor, n: int) -> Tensor:
    """ρⱼ up to the last lag that stands out from noise, falling to zero at twice that."""
    limit = 2 * math.sqrt(math.log10(n) / n)
    run = max(5, math.ceil(math.sqrt(math.log10(n))))
    small = rho[1 : n // 2].abs() < limit
    last = n // 4
    for q in range(len(small)):
        if bool(small[q : q + run].all()):
            last = q
            break
    j = torch.arange(n, dtype=torch.float64)
    return rho * (2 - j / last).clamp(0, 1) if last else torch.where(j == 0, rho, 0.0)


def reshuffling_autocorrelation(batches_per_epoch: int, lags: Sequence[int]) -> Tensor:
    """ρ(h) = -(1 - h/k)/(k - 1) for 1 ≤ h < k, 0 beyond, 1 at h = 0; shape ``(len(lags),)``, float64.

    Of the noise of gradients at *frozen* weights under random reshuffling, averaged over the position in the epoch. It
    follows from the sampler alone, whatever the loss, and 1 + 2·Σρ = 0.

    Source: own; for the question see Kühn and Rosenow, arXiv 2306.05300.

    Raises:
        ValueError: If there are fewer than two batches, or a lag is negative.
    """
    k = batches_per_epoch
    if k < 2:
        raise ValueError(f"At least two batches in an epoch are needed, got {k}.")
    h = torch.tensor([*lags], dtype=torch.float64)
    if bool((h < 0).any()):
        raise ValueError("Lags must not be negative.")
    return torch.where(h == 0, 1.0, -(1 - h / k).clamp(min=0) / (k - 1))


def _direction_pseudovalues(draws: DrawnGradients) -> Tensor:
    """Of cᵢ, shape ``(M, q)``."""
    if draws.along is None:
        raise ValueError("`along` is needed: the gradients' components along the vectors.")
    return variance_pseudovalues((draws.along - draws.along.mean(0)).square())


def _noise(draws: DrawnGradients) -> Tensor:
    """Of tr Cov_B, shape ``(M,)``."""
    if math.isinf(draws.samples_per_batch) or not float(draws.squared_deviations.sum()) > 0:
        raise UnresolvedGradientError("The batches do not differ: nothing can be divided by their noise.")
    return variance_pseudovalues(draws.squared_deviations)


def _sample_pseudovalues(samples: SampleMoments) -> Tensor:
    """Of tr Σ = mean ‖gᵢ - ḡ‖² + tr Cov_B/M, which is mean ‖gᵢ‖² less the unbiased ‖g‖²; shape ``(M,)``."""
    draws, b = samples.draws, samples.draws.batch_size
    count, deviations = len(draws), samples.squared_deviations
    if deviations is None:
        deviations = samples.squared_norms + b * (draws.mean_squared_norm - 2 * draws.dots_mean)
    spread = draws.squared_deviations
    trace = spread.sum() / (count - 1)
    pseudo: Tensor = deviations / b + (2 * spread - trace) / (count - 2)
    return pseudo


def _finite(count: int, population: int | None) -> float:
    return 1.0 if population is None else math.sqrt(1 - count / population)


def _check_sizes(batch_size: int, population: int | None) -> None:
    if batch_size < 1 or (population is not None and population < batch_size):
        raise ValueError(f"1 ≤ batch size ≤ population is needed, got {batch_size} and {population}.")
