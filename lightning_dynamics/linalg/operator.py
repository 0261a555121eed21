"""A symmetric operator: all that the Krylov methods ever ask of a Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Space(Protocol):
    """Where vectors live: what an operator has besides its product."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


@runtime_checkable
class SymmetricOperator(Space, Protocol):
    """A symmetric linear map A of ℝⁿ into itself, known only by its products.

    Attributes:
        size: The dimension n.
        dtype: Floating type of the vectors that it takes and returns.
        device: Device of those vectors.
    """

    def __call__(self, vector: Tensor) -> Tensor:
        """Return A·v, shape ``(size,)``; ``vector`` is left as it was."""
        ...


class OnSpaceOf:
    """Base of operators on the space that something else acts on."""

    def __init__(self, space: Space) -> None:
        self._space = space

    @property
    def size(self) -> int:
        return self._space.size

    @property
    def dtype(self) -> torch.dtype:
        return self._space.dtype

    @property
    def device(self) -> torch.device:
        return self._space.device


@dataclass(frozen=True, eq=False)
class MatrixOperator:
    """A dense symmetric matrix as an operator.

    Args:
        matrix: Shape ``(n, n)``, symmetric.

    Raises:
        ValueError: If ``matrix`` is not square or not symmetric to rounding.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` must be square, got shape {tuple(matrix.shape)}.")
        defect = float((matrix - matrix.mT).abs().max()) if matrix.numel() else 0.0
        if defect > 64 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max() if matrix.numel() else 0.0):
            raise ValueError(
                f"`matrix` must be symmetric, but |A - Aᵀ| reaches {defect:.3g}. Pass (A + Aᵀ) / 2 if that is meant."
            )

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def __call__(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


class CongruentOperator(OnSpaceOf):
    """S (A + D) S for diagonal S and D: the form that a preconditioned Hessian C^½ (H + W) C^½ takes.

    It is symmetric whenever A is, and has the eigenvalues of S² (A + D).

    Args:
        operator: A, of size n.
        scale: Diagonal of S, shape ``(n,)``.
        shift: Diagonal of D, shape ``(n,)``; zero by default.
    """

    def __init__(self, operator: SymmetricOperator, scale: Tensor, shift: Tensor | None = None) -> None:
        for name, diagonal in (("scale", scale), ("shift", shift)):
            if diagonal is not None and diagonal.shape != (operator.size,):
                raise ValueError(
                    f"`{name}` must have the operator's size, ({operator.size},), got {tuple(diagonal.shape)}."
                )
        super().__init__(operator)
        self._operator = operator
        self._scale = scale.to(operator.device, operator.dtype)
        self._shift = None if shift is None else shift.to(operator.device, operator.dtype)

    def __call__(self, vector: Tensor) -> Tensor:
        scaled = self._scale * vector
        image = self._operator(scaled)
        if self._shift is not None:
            image = image + self._shift * scaled
        return self._scale * image


class BlockOperator(OnSpaceOf):
    """A diagonal block of A: the rows and columns of a range of coordinates.

    Args:
        operator: A, of size n.
        start: First coordinate of the block.
        stop: The one after its last.
    """

    def __init__(self, operator: SymmetricOperator, start: int, stop: int) -> None:
        if not 0 <= start < stop <= operator.size:
            raise ValueError(f"A block must lie within 0 … {operator.size}, got {start} … {stop}.")
        super().__init__(operator)
        self._operator = operator
        self._window = slice(start, stop)

    @property
    def size(self) -> int:
        return self._window.stop - self._window.start

    def __call__(self, vector: Tensor) -> Tensor:
        whole = torch.zeros(self._operator.size, dtype=vector.dtype, device=vector.device)
        whole[self._window] = vector
        return self._operator(whole)[self._window]


def diagonal_entries(operator: SymmetricOperator, coordinates: Tensor) -> Tensor:
    """Exact diagonal entries eᵢᵀ A eᵢ, shape ``(m,)``, float64: one product each.

    Args:
        operator: A, of size n.
        coordinates: The i, shape ``(m,)``, integers.
    """
    entries = torch.empty(len(coordinates), dtype=torch.float64)
    unit = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    for position, i in enumerate(coordinates.tolist()):
        unit[i] = 1.0
        entries[position] = float(operator(unit)[i])
        unit[i] = 0.0
    return entries
