"""Operators whose spectra are known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalOperator:
    """diag(values): the cheapest operator with a prescribed spectrum; ``noise`` is the size of a random error."""

    def __init__(
        self, values: Sequence[float] | Tensor, dtype: torch.dtype = torch.float64, noise: float = 0.0
    ) -> None:
        self.values = torch.as_tensor(values, dtype=dtype)
        self.noise = noise
        self.products = 0
        self._generator = torch.Generator().manual_seed(7)

    @property
    def size(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        image = self.values * vector
        if self.noise:
            error = torch.randn(self.size, generator=self._generator, dtype=self.dtype)
            image += self.noise * error / error.norm()
        return image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_symmetric(spectrum: Sequence[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense matrix with this spectrum in a random basis."""
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    gaussian = torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(gaussian)
    matrix = basis @ torch.diag(values) @ basis.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def network_like(outliers: Sequence[float], bulk: int = 400, seed: int = 0) -> Tensor:
    """A spectrum as loss Hessians have them: outliers, a bulk near zero that thins out, a small negative part."""
    tail = torch.rand(bulk, generator=generator(seed), dtype=torch.float64) ** 4
    return torch.cat([torch.as_tensor(outliers, dtype=torch.float64), 0.4 * tail - 0.04])
