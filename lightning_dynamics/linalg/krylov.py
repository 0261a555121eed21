"""The one Krylov kernel: Lanczos, block Lanczos, warm and deflated runs are ways to feed it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dynamics.linalg.basis import Basis, norm
from lightning_dynamics.linalg.operator import SymmetricOperator


@dataclass(frozen=True)
class RitzPairs:
    """Rayleigh-Ritz approximations from a Krylov space with m products and b pending directions.

    Attributes:
        values: Shape ``(m,)``, descending, float64.
        coefficients: Shape ``(m, m)``; column i holds the vector of value i in the processed rows.
        coupling: Shape ``(b, m)``; A y_i - θ_i y_i in the pending rows.
    """

    values: Tensor
    coefficients: Tensor
    coupling: Tensor

    @property
    def residuals(self) -> Tensor:
        """Residual norms ‖A y_i - θ_i y_i‖, shape ``(m,)``: an eigenvalue lies within each of its value."""
        norms: Tensor = torch.linalg.vector_norm(self.coupling, dim=0)
        return norms


class KrylovSpace:
    """An orthonormal basis grown by products with A, each new direction kept until it is multiplied in its turn.

    Rows are *locked* (deflated: the space stays orthogonal to them), *processed* (their image A·w is known and lies in
    the span of the basis) or *pending* (in the basis, image unknown). With one random pending row and repeated
    :meth:`expand` this is the Lanczos process with full reorthogonalization; with b of them it is band Lanczos of width
    b; with old eigenvectors as pending rows, each multiplied once, it is a Rayleigh-Ritz step, and :meth:`steer` turns
    what follows into the (unpreconditioned) Davidson process.

    Whatever the order, A·W = W·H + P·C holds for the processed rows W, the pending rows P, the projected matrix H and
    the coupling C, so residual norms cost nothing.

    Args:
        operator: A.
        generator: Source of the random start vectors; a CPU generator that belongs to the caller.
        locked: Orthonormal rows to stay orthogonal to, shape ``(g, n)``; the space is then that of P A P on the
            complement.
    """

    def __init__(self, operator: SymmetricOperator, generator: torch.Generator, locked: Tensor | None = None) -> None:
        self.operator = operator
        self.products = 0
        self._generator = generator
        self._basis = Basis(operator.size, operator.dtype, operator.device)
        self._num_locked = 0
        self._processed: list[int] = []
        self._pending: list[int] = []
        self._projected = torch.zeros(32, 32, dtype=torch.float64)
        self._scale = 0.0  # largest ‖A·w‖ seen: what a vanishing remainder is compared with
        self._defect = 0.0
        if locked is not None:
            for row in locked:
                self._basis.append(row)
            self._num_locked = len(self._basis)

    @property
    def dimension(self) -> int:
        """Number of processed rows, the size of the Rayleigh-Ritz problem."""
        return len(self._processed)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_rows(self) -> int:
        """All rows held: the memory is this many vectors."""
        return len(self._basis)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is pending: the processed rows span an invariant subspace."""
        return not self._pending

    @property
    def is_full(self) -> bool:
        """Whether the basis spans everything, so that no new direction exists."""
        return len(self._basis) >= self.operator.size

    @property
    def product_error(self) -> float:
        """Size of the error of one product, from how far the projected matrix is from symmetric.

        wᵢᵀ(A wⱼ) and wⱼᵀ(A wᵢ) are computed from different products; exactly they are equal.
        """
        floor = 32 * torch.finfo(self.operator.dtype).eps * self._scale
        return max(self._defect, floor)

    def append(self, vector: Tensor) -> bool:
        """Add a pending direction, shape ``(n,)``; return False if it lies in the span already."""
        if self.is_full:
            return False
        work = vector.to(self.operator.device, self.operator.dtype, copy=True)
        before = norm(work)
        if not 0 < before < float("inf"):
            return False
        work.div_(before)
        _, after = self._basis.orthogonalize(work)
        if after < 1e3 * torch.finfo(work.dtype).eps:
            return False
        work.div_(after)
        self._pending.append(self._basis.append(work))
        self._grow()
        return True

    def append_random(self) -> bool:
        """Add a direction drawn uniformly from the complement of the basis."""
        return self.append(random_vector(self.operator, self._generator))

    def expand(self, position: int = 0) -> None:
        """Multiply a pending row: the oldest by default, else the one at ``position`` in their order.

        Raises:
            IndexError: If there is no such row.
            FloatingPointError: If the product is not finite.
        """
        row = self._pending.pop(position)
        image = self.operator(self._basis[row]).clone()
        self.products += 1
        size = norm(image)
        if not size < float("inf"):
            raise FloatingPointError("A product with the operator is not finite.")
        self._scale = max(self._scale, size)
        coefficients, remainder = self._basis.orthogonalize(image)
        if self._processed:
            mirrored = self._projected[row, self._processed] - coefficients[self._processed]
            self._defect = max(self._defect, float(mirrored.abs().max()))
        self._projected[: len(coefficients), row] = coefficients
        self._processed.append(row)
        if remainder > 1e2 * torch.finfo(image.dtype).eps * self._scale and not self.is_full:
            image.div_(remainder)
            new = self._basis.append(image)
            self._grow()
            self._projected[new, row] = remainder
            self._pending.append(new)
        else:
            self._defect = max(self._defect, remainder)

    def ritz(self) -> RitzPairs:
        """Solve the Rayleigh-Ritz problem on the processed rows."""
        rows = torch.tensor(self._processed)
        square = self._projected[rows][:, rows]
        values, vectors = torch.linalg.eigh((square + square.mT) / 2)
        vectors = vectors.flip(1)
        coupling = self._projected[torch.tensor(self._pending, dtype=torch.long)][:, rows] @ vectors
        return RitzPairs(values.flip(0), vectors, coupling)

    def vectors(self, coefficients: Tensor) -> Tensor:
        """Rows with these coefficients in the processed rows: shape ``(r, n)`` from ``(r, dimension)``."""
        return self._basis.combine(self._embed(coefficients))

    def pending(self) -> Tensor:
        """The pending rows, shape ``(num_pending, n)``: where the images of the processed ones leave their span."""
        rows = torch.zeros(self.num_pending, len(self._basis), dtype=torch.float64)
        rows[torch.arange(self.num_pending), self._pending] = 1.0
        return self._basis.combine(rows)

    def tridiagonal(self) -> tuple[Tensor, Tensor]:
        """Diagonal and subdiagonal of H, where the space grew from a single vector by :meth:`expand` alone.

        Returns:
            Shapes ``(m,)`` and ``(m,)``; the last subdiagonal entry couples to the pending row, 0 if there is none.
        """
        rows = torch.tensor(self._processed)
        diagonal = self._projected[rows, rows]
        following = torch.cat([rows[1:], torch.tensor(self._pending[:1], dtype=torch.long)])
        below = torch.zeros(len(rows), dtype=torch.float64)
        below[: len(following)] = self._projected[following, rows[: len(following)]]
        return diagonal, below

    def steer(self, direction: Tensor) -> None:
        """Turn the pending rows within their span so that the next to be multiplied is this combination of them.

        Args:
            direction: Coefficients in the pending rows, shape ``(num_pending,)``, such as a column of
                :attr:`RitzPairs.coupling`.
        """
        count = self.num_pending
        length = torch.linalg.vector_norm(direction)
        if count < 2 or float(length) == 0.0:
            return
        # an orthogonal matrix whose first row is the direction (a Householder reflection)
        unit = direction / length
        axis = unit.clone()
        axis[0] += 1.0 if unit[0] >= 0 else -1.0
        turn = torch.eye(count, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.dot(axis)
        rows = torch.tensor(self._pending)
        old = torch.stack([self._basis[row] for row in self._pending])
        new = turn.to(old.device, old.dtype) @ old
        for row, vector in zip(self._pending, new, strict=True):
            self._basis[row].copy_(vector)
        self._projected[rows] = turn @ self._projected[rows]

    def restart(self, pairs: RitzPairs, keep: Tensor) -> None:
        """Thick restart: replace the processed rows by the Ritz vectors ``keep`` (indices into ``pairs``).

        The kept vectors couple to the pending rows as before, so no product is lost on them (Wu and Simon, 2000).
        """
        locked, pending, kept = self._num_locked, self.num_pending, len(keep)
        transform = torch.zeros(locked + kept + pending, len(self._basis), dtype=torch.float64)
        transform[:locked, :locked] = torch.eye(locked, dtype=torch.float64)
        transform[locked : locked + kept] = self._embed(pairs.coefficients[:, keep].mT)
        for offset, row in enumerate(self._pending):
            transform[locked + kept + offset, row] = 1.0
        self._basis.replace(transform)
        projected = torch.zeros_like(self._projected)
        self._processed = list(range(locked, locked + kept))
        self._pending = list(range(locked + kept, locked + kept + pending))
        projected[self._processed, self._processed] = pairs.values[keep]
        for offset, row in enumerate(self._pending):
            projected[row, self._processed] = pairs.coupling[offset, keep]
        # a processed row's image has the same component along a pending row as the other way round
        self._projected = projected

    def _embed(self, coefficients: Tensor) -> Tensor:
        full = torch.zeros(coefficients.shape[0], len(self._basis), dtype=torch.float64)
        full[:, torch.tensor(self._processed)] = coefficients.to(torch.float64)
        return full

    def _grow(self) -> None:
        have = self._projected.shape[0]
        if len(self._basis) >= have:
            # locked rows may be more than twice as many
            size = 2 * len(self._basis)
            larger = torch.zeros(size, size, dtype=torch.float64)
            larger[:have, :have] = self._projected
            self._projected = larger


def random_vector(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A standard normal vector of the operator's size, drawn on the generator's own device."""
    vector = torch.randn(operator.size, generator=generator, device=generator.device, dtype=torch.float32)
    return vector.to(operator.device, operator.dtype)
