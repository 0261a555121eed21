"""What an epoch of SGD without replacement does in the mean that SGD with replacement does not: its drift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dynamics.metrics.estimates import checked

_SERIES = 20  # terms of w that are exact to rounding for |x| < 1


def drift_weight(x: Tensor | float) -> Tensor:
    """w(x) = (e^-x - 1 + x)/x², with w(0) = ½; elementwise, float64 on the CPU.

    About 1/x for x ≫ 1 and e^|x|/x² for x ≪ -1: of the noise, what lies along flat directions and those of negative
    curvature counts most. Infinite where e^|x| overflows (x < -709).

    Source: own; a continuous form of :func:`epoch_drift`, on a question of Beneventano, arXiv 2312.16143.
    """
    x = torch.as_tensor(x, dtype=torch.float64).detach().cpu()
    series = torch.ones_like(x)
    for n in range(_SERIES, 2, -1):  # ½·(1 - x/3·(1 - x/4·(...)))
        series = 1 - x.clamp(-1, 1) / n * series
    far = torch.where(x.abs() < 1, 1.0, x)
    return torch.where(x.abs() < 1, series / 2, (torch.expm1(-far) + far) / far / far)


def weighted_trace(
    variances: Tensor | Sequence[float],
    eigenvalues: Tensor | Sequence[float],
    residual: float,
    lr: float,
    batches_per_epoch: int,
) -> float:
    """Σ w(ηkλᵢ)·cᵢ + ½·residual: the noise of batches, each direction weighted by what it drifts in an epoch.

    Up to the factor η²k²/(2(k - 1)) it is the regularizer that SGD without replacement follows, apart from how far
    the weights move within the epoch. Directions not given are counted as flat.

    Source: own, on a question of Beneventano, arXiv 2312.16143; see :func:`drift_weight`.

    Args:
        variances: cᵢ = vᵢᵀCov_B vᵢ along unit eigenvectors of the Hessian, shape ``(q,)``.
        eigenvalues: λᵢ, shape ``(q,)``.
        residual: tr Cov_B - Σcᵢ.
        lr: η.
        batches_per_epoch: k.

    Raises:
        ValueError: If the shapes differ.
    """
    shares, values = (torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in (variances, eigenvalues))
    if shares.dim() != 1 or shares.shape != values.shape:
        raise ValueError(f"One eigenvalue per variance is needed, got {tuple(values.shape)}, {tuple(shares.shape)}.")
    return float(drift_weight(lr * batches_per_epoch * values) @ shares) + residual / 2


def epoch_drift(hessians: Tensor, gradients: Tensor, lr: float) -> Tensor:
    """E[θ after an epoch of random reshuffling] - (θ after k steps of gradient descent), to first order in the noise.

    For k batches with quadratic losses. With M = I - ηH, and the gradients g_a at the i-th iterate of gradient descent,
    it is for any ηkH

        -η²/(k - 1) · Σ_{i<j} M^(k-1-j) Cov_a(H_a, M^(j-i-1) g_a),    Cov_a(H_a, A g_a) = mean(H_a A g_a) - H A g,

    0 ≤ i < j ≤ k - 1, with an error smaller by the relative size of the noise. For ηkH → 0 it is the gradient step
    -ηk·∇[(η/4)·tr Cov_a(g_a)]. With replacement there is no drift: E θ is that of gradient descent.

    Source: own, on a question of Beneventano, arXiv 2312.16143.

    Args:
        hessians: H_a, shape ``(k, p, p)``.
        gradients: g_a at the start of the epoch, shape ``(k, p)``.
        lr: η, of plain SGD.

    Returns:
        Shape ``(p,)``, float64.

    Raises:
        ValueError: If shapes do not fit, or k < 2.
    """
    checked("lr", lr)
    h, g = (v.detach().to("cpu", torch.float64) for v in (hessians, gradients))
    if h.dim() != 3 or g.dim() != 2 or h.shape != (*g.shape, g.shape[1]) or len(h) < 2:
        raise ValueError(
            f"Shapes (k, p, p) and (k, p) with k of at least 2 are needed, got {tuple(h.shape)} and {tuple(g.shape)}."
        )
    count, mean = len(h), h.mean(0)
    moved = torch.zeros_like(g[0])  # of gradient descent
    drift, passed = torch.zeros_like(g[0]), torch.zeros_like(g)  # passed: Σ_{i<j} M^(j-i-1) g_a
    for _ in range(count):
        covariance = (h @ passed[..., None])[..., 0].mean(0) - mean @ passed.mean(0)
        drift = drift - lr * (mean @ drift) - lr**2 / (count - 1) * covariance
        current = g + h @ moved
        passed = passed - lr * passed @ mean + current
        moved = moved - lr * current.mean(0)
    return drift
