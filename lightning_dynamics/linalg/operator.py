"""A symmetric operator: all that the Krylov methods ever ask of a Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric linear map A of ℝⁿ into itself, known only by its products.

    Attributes:
        size: The dimension n.
        dtype: Floating type of the vectors that it takes and returns.
        device: Device of those vectors.
    """

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, vector: Tensor) -> Tensor:
        """Return A·v, shape ``(size,)``; ``vector`` is left as it was."""
        ...


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


class CongruentOperator:
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
        self._operator = operator
        self._scale = scale.to(operator.device, operator.dtype)
        self._shift = None if shift is None else shift.to(operator.device, operator.dtype)

    @property
    def size(self) -> int:
        return self._operator.size

    @property
    def dtype(self) -> torch.dtype:
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        return self._operator.device

    def __call__(self, vector: Tensor) -> Tensor:
        scaled = self._scale * vector
        image = self._operator(scaled)
        if self._shift is not None:
            image = image + self._shift * scaled
        return self._scale * image
