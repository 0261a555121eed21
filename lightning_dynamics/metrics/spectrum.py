"""Numbers from a Hessian's spectrum and its leading eigenvectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dynamics.linalg import Estimate, SpectralDensity


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """‖V W ᵀ‖²_F / k of two k-dimensional subspaces, between 0 (orthogonal) and 1 (the same).

    k/n is what two independent random subspaces of ℝⁿ have on average.

    Args:
        first: Orthonormal rows V, shape ``(k, n)``.
        second: Orthonormal rows W, shape ``(k, n)``.

    Raises:
        ValueError: If the shapes differ.
    """
    return float(principal_cosines(first, second).square().mean())


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the k angles between two subspaces, shape ``(k,)``, float64, largest first.

    Args:
        first: Orthonormal rows, shape ``(k, n)``.
        second: Orthonormal rows, shape ``(k, n)``.

    Raises:
        ValueError: If the shapes differ.
    """
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"Two subspaces of the same dimension are needed, got shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    product = first @ second.to(first.device, first.dtype).mT
    cosines: Tensor = torch.linalg.svdvals(product.cpu().double()).clamp(max=1.0)
    return cosines


def overlap_error(first: float, second: float, k: int) -> float:
    """How far the overlap of approximate subspaces can be from that of the true ones, to first order.

    Args:
        first: ‖sin Θ‖_F of the first subspace (:meth:`Eigenpairs.subspace_error`).
        second: That of the second.
        k: Their dimension.
    """
    return math.sqrt(2 / k) * (first + second)


def effective_parameters(density: SpectralDensity, alpha: float) -> Estimate:
    """Σ λ/(λ + α) over the positive eigenvalues: how many directions the loss determines, against a prior of width α.

    α → 0 gives the number of positive eigenvalues, α → ∞ gives 0; an eigenvalue of α counts one half. Negative
    eigenvalues count as zero (:func:`negative_mass` says what that leaves out).

    Source: MacKay (1992); Maddox, Benton and Wilson, arXiv 2003.02139.

    Args:
        density: The spectrum.
        alpha: α > 0, in units of the eigenvalues.

    Returns:
        The number, with its standard error and an estimate of the quadrature's error, added in quadrature.

    Raises:
        ValueError: If ``alpha`` is not positive.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be positive and finite, got {alpha!r}.")
    return density.sum_beyond_polynomials(lambda values: values.clamp(min=0.0) / (values.clamp(min=0.0) + alpha))


def negative_mass(density: SpectralDensity) -> float:
    """Sum of the moduli of the negative eigenvalues, as a share of that over all."""
    absolute = density.sum(torch.abs).value
    return density.sum(lambda values: (-values).clamp(min=0.0)).value / absolute if absolute > 0 else 0.0


def spectral_sparsity(density: SpectralDensity, threshold: float) -> Estimate:
    """Share of the eigenvalues whose modulus lies below ``threshold``, between 0 and 1."""
    count = density.sum_beyond_polynomials(lambda values: (values.abs() < threshold).double())
    return Estimate(count.value / density.size, count.error / density.size)


def median_ratio(diagonal: Tensor, weights: Tensor | None = None) -> float:
    """R_med, the largest over the median modulus of diagonal entries: how unevenly coordinates share curvature.

    Source: Jiang, Malik and Li, arXiv 2211.02254. Over a random subset of the coordinates the maximum, and with it the
    ratio, is at most that over all.

    Args:
        diagonal: Entries Hᵢᵢ, shape ``(m,)``.
        weights: How many coordinates each entry stands for, shape ``(m,)``; one by default.

    Returns:
        The ratio, at least 1; infinite where at least half of the coordinates have none.
    """
    absolute, order = diagonal.double().abs().sort()
    mass = torch.ones_like(absolute) if weights is None else weights.double()[order]
    middle = float(absolute[int((mass.cumsum(0) < mass.sum() / 2).sum())])
    return float(absolute.max()) / middle if middle > 0 else math.inf
