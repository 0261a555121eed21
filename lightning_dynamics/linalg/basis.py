"""An orthonormal basis of long vectors: the only place where a method touches more than one of them."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 16  # rows allocated at a time: growth without copying what is there
_SLICE = 1 << 22  # entries of the basis that `replace` holds twice at a time


class Basis:
    """Orthonormal vectors of one length, kept as rows of contiguous blocks.

    Everything that a Krylov method does with long vectors passes through here (dot products, combinations,
    orthogonalization), so that the rows could live elsewhere than in one tensor on one device. Coefficients are small:
    they are returned and taken as float64 on the CPU.

    Args:
        size: Length n of the vectors.
        dtype: Their floating type.
        device: Where they live.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self._blocks: list[Tensor] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of a basis with {self._length} rows")
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def append(self, vector: Tensor) -> int:
        """Store ``vector``, shape ``(size,)``, which the caller has made orthonormal to the others; return its row."""
        if self._length % _BLOCK == 0:
            rows = min(_BLOCK, self.size)
            self._blocks.append(torch.empty(rows, self.size, dtype=self.dtype, device=self.device))
        index = self._length
        self._blocks[index // _BLOCK][index % _BLOCK].copy_(vector)
        self._length += 1
        return index

    def dots(self, vector: Tensor) -> Tensor:
        """Inner products with every row, shape ``(len(self),)``, float64 on the CPU."""
        parts = [block @ vector for block in self._filled()]
        return torch.cat(parts).to("cpu", torch.float64) if parts else torch.empty(0, dtype=torch.float64)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Rows ``coefficients @ basis``, shape ``(r, size)``, from coefficients of shape ``(r, len(self))``."""
        out = torch.zeros(coefficients.shape[0], self.size, dtype=self.dtype, device=self.device)
        start = 0
        for block in self._filled():
            part = coefficients[:, start : start + len(block)].to(self.device, self.dtype)
            out.addmm_(part, block)
            start += len(block)
        return out

    def subtract(self, vector: Tensor, coefficients: Tensor) -> None:
        """Take the combination with these coefficients, shape ``(len(self),)``, off ``vector``, in place."""
        start = 0
        for block in self._filled():
            part = coefficients[start : start + len(block)].to(self.device, self.dtype)
            vector.addmv_(block.mT, part, alpha=-1)
            start += len(block)

    def orthogonalize(self, vector: Tensor) -> tuple[Tensor, float]:
        """Make ``vector`` orthogonal to every row, in place.

        Classical Gram-Schmidt run twice ("twice is enough", Giraud et al. 2005) and a third time where almost nothing
        is left, since then what remains is rounding error of the first passes.

        Returns:
            The coefficients along the rows, shape ``(len(self),)``, and the norm of what remains.
        """
        total = torch.zeros(self._length, dtype=torch.float64)
        before = norm(vector)
        after = before
        for sweep in range(3):
            if sweep == 2 and after > 1e-2 * before:
                break
            coefficients = self.dots(vector)
            self.subtract(vector, coefficients)
            total += coefficients
            after = norm(vector)
        return total, after

    def replace(self, coefficients: Tensor) -> None:
        """Make the basis ``coefficients @ basis``, coefficients of shape ``(r, len(self))`` with orthonormal rows.

        Works on slices of the vectors, so that no second basis is ever held.
        """
        rows = coefficients.shape[0]
        narrow = coefficients.to(self.device, self.dtype)
        width = max(1, _SLICE // max(1, self._length))
        for left in range(0, self.size, width):
            window = slice(left, left + width)
            old = torch.cat([block[:, window] for block in self._filled()])
            new = narrow @ old
            for start in range(0, rows, _BLOCK):
                part = new[start : start + _BLOCK]
                self._blocks[start // _BLOCK][: len(part), window] = part
        self._length = rows
        del self._blocks[(rows + _BLOCK - 1) // _BLOCK :]

    def _filled(self) -> list[Tensor]:
        return [
            block[: min(_BLOCK, self._length - start)]
            for start, block in zip(range(0, self._length, _BLOCK), self._blocks, strict=False)
        ]


def inner(first: Tensor, second: Tensor) -> float:
    """Inner product, accumulated in float64; on the CPU for devices that have none."""
    if first.device.type == "mps":
        first, second = first.cpu(), second.cpu()
    return float(first.double().dot(second.double()))


def norm(vector: Tensor) -> float:
    """Euclidean norm, accumulated in float64 where the vector's own type would lose digits."""
    if vector.dtype is torch.float64:
        return float(torch.linalg.vector_norm(vector))
    # float32 sums of squares are pairwise: good to about 1e-7·log₂ n, while a float64 copy would double the traffic
    return float(torch.linalg.vector_norm(vector.float()))
