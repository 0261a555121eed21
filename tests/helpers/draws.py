"""Mini-batches of a least-squares problem drawn independently, and what dense algebra says about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.operators import generator
from lightning_dynamics.metrics import DrawnCurvature, DrawnGradients, SampleMoments


@dataclass(frozen=True)
class Population:
    """Losses ½(xᵢᵀθ - yᵢ)² at one θ: gradients ``(N, p)`` and inputs; gᵢ and Hᵢ = xᵢxᵢᵀ depend on each other."""

    inputs: Tensor
    gradients: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def gradient(self) -> Tensor:
        return self.gradients.mean(0)

    @property
    def hessian(self) -> Tensor:
        return self.inputs.mT @ self.inputs / len(self)

    @property
    def covariance(self) -> Tensor:
        """Σ, with 1/N."""
        away = self.gradients - self.gradient
        return away.mT @ away / len(self)

    def batch_covariance(self, b: int) -> Tensor:
        return self.covariance * (len(self) - b) / (b * (len(self) - 1))

    def of(self, subsets: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(..., p)`` and Hessians ``(..., p, p)`` of batches, given by indices ``(..., b)``."""
        x = self.inputs[subsets]
        return self.gradients[subsets].mean(-2), x.mT @ x / subsets.shape[-1]

    def draw(self, *shape: int, b: int, seed: int) -> Tensor:
        """Independent uniform b-subsets, shape ``(*shape, b)``."""
        return torch.rand(*shape, len(self), generator=generator(seed)).argsort(-1)[..., :b]


def heterogeneous(n: int = 200, p: int = 10, seed: int = 0, push: float = 1.0) -> Population:
    """Inputs that differ in length, anisotropic; ``push`` is the size of the full gradient beside the noise."""
    g = generator(seed)
    x = torch.randn(n, p, generator=g, dtype=torch.float64) * torch.linspace(1.5, 0.5, p, dtype=torch.float64)
    residual = torch.randn(n, generator=g, dtype=torch.float64)
    residual = residual + push * x @ torch.ones(p, dtype=torch.float64) / p**0.5
    return Population(x, residual[:, None] * x)


def curvature(g: Tensor, h: Tensor) -> DrawnCurvature:
    """The table of M batches from their gradients ``(M, p)`` and Hessians ``(M, p, p)``."""
    mean = g.mean(0)
    other = g[torch.arange(len(g)) ^ 1]
    image = h @ mean
    return DrawnCurvature(
        squared_norms=g.square().sum(1),
        along_own=((h @ g[..., None])[..., 0] * g).sum(1),
        along_partner=((h @ other[..., None])[..., 0] * other).sum(1),
        dots_mean=g @ mean,
        mean_squared_norm=float(mean @ mean),
        along_mean=image @ mean,
        dots_image=g @ image.mean(0),
        along_cross=(g * image).sum(1),
    )


def gradients(g: Tensor, b: int, n: int | None = None, vectors: Tensor | None = None) -> DrawnGradients:
    """The table of M batches from their gradients ``(M, p)``; ``vectors`` are rows ``(q, p)``."""
    mean = g.mean(0)
    return DrawnGradients(
        squared_norms=g.square().sum(1),
        squared_deviations=(g - mean).square().sum(1),
        dots_mean=g @ mean,
        mean_squared_norm=float(mean @ mean),
        batch_size=b,
        population=n,
        along=None if vectors is None else g @ vectors.mT,
    )


def moments(population: Population, subsets: Tensor, vectors: Tensor | None = None) -> SampleMoments:
    """Sums over the samples of each of M batches, given by indices ``(M, b)``."""
    each = population.gradients[subsets]
    g = each.mean(1)
    return SampleMoments(
        gradients(g, subsets.shape[1], len(population), vectors),
        each.square().sum((1, 2)),
        (each - g.mean(0)).square().sum((1, 2)),
    )
