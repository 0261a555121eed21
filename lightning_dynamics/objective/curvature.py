"""Second derivatives of an objective as symmetric operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lightning_dynamics.linalg.basis import inner
from lightning_dynamics.linalg.krylov import random_vector
from lightning_dynamics.linalg.operator import OnSpaceOf, Space, SymmetricOperator
from lightning_dynamics.objective.linearization import Part, Sum
from lightning_dynamics.objective.loss import Objective
from lightning_dynamics.objective.mini_batch import MiniBatch, MiniBatchReader, Pieces
from lightning_dynamics.objective.outputs import Kind
from lightning_dynamics.objective.parameters import Layout

NO_LOSS = "No batch of the probe gave a loss"


class Evaluation(Space, Protocol):
    """A :class:`Linearization`, or what stands for one over several processes."""

    layout: Layout
    weights: dict[Part, float]
    reached: bool

    @property
    def is_kept(self) -> bool: ...

    def evaluate(self, keep: bool | None = None, reserve: int = 0) -> tuple[float, Tensor]: ...

    def product(self, vector: Tensor, part: Part = "all", kind: Sum = "hessian") -> Tensor: ...

    @property
    def mini_batches(self) -> list[int]: ...

    def pieces_of(self, number: int) -> Pieces: ...


class HessianOperator(OnSpaceOf):
    """∇²L at fixed weights, by reverse over reverse: exact up to rounding, almost everywhere where L has kinks.

    Attributes:
        loss: L(θ).
        gradient: ∇L(θ), shape ``(size,)``.

    Args:
        at: An objective opened at its weights.
        reserve: Bytes that the caller will need besides the gradient graphs.
        keep: Whether to keep the graphs; None lets the objective decide.

    Raises:
        ValueError: If every batch was skipped, or the loss depends on none of the parameters.
    """

    def __init__(self, at: Evaluation, *, reserve: int = 0, keep: bool | None = None) -> None:
        super().__init__(at)
        total, gradient = at.evaluate(keep, reserve)
        if not at.weights["all"]:
            raise ValueError(f"{NO_LOSS} (or all weigh nothing): there is nothing to measure.")
        if not at.reached:
            names = at.layout.names
            raise ValueError(
                "The loss depends on none of the measured parameters "
                f"({', '.join(names[:6])}{', …' if len(names) > 6 else ''})."
            )
        self.loss = total / at.weights["all"]
        self.gradient = gradient.div_(at.weights["all"])
        self._at = at

    @property
    def layout(self) -> Layout:
        """How vectors map onto the parameters."""
        return self._at.layout

    @property
    def has_halves(self) -> bool:
        """Whether there are batches with even and with odd numbers, so that :meth:`product` can take either half."""
        return self._at.weights["even"] > 0 and self._at.weights["odd"] > 0

    @property
    def is_kept(self) -> bool:
        """Whether products come from kept gradient graphs."""
        return self._at.is_kept

    def __call__(self, vector: Tensor) -> Tensor:
        return self.product(vector)

    def product(self, vector: Tensor, part: Part = "all", kind: Kind = "hessian") -> Tensor:
        """∇²L·v, or the product with another matrix of the same loss, or with that of half of the batches."""
        return self._at.product(vector, part, kind).div_(self._at.weights[part])

    def operator(self, kind: Kind = "hessian", part: Part = "all") -> SymmetricOperator:
        """Another matrix of the same loss at the same weights, see :data:`Kind`; or that of half of the batches."""
        return _MatrixOfLoss(self, kind, part)

    def survey(self, reader: MiniBatchReader) -> None:
        """Show the mini-batches to a reader in pairs, numbers 2j and 2j + 1, which are at hand together.

        A pair with one that the step skips is left out.
        """
        numbers = self._at.mini_batches
        for number in (n for n in numbers if n % 2 == 0 and n + 1 in numbers):
            pair = [MiniBatch(each, self._at.pieces_of(each)) for each in (number, number + 1)]
            try:
                if all(each.weight for each in pair):
                    reader.update(*pair)
            finally:
                for each in pair:
                    each.close()

    def slope(self, vector: Tensor) -> Tensor:
        """∇(vᵀ∇²L v), shape ``(size,)``: how the curvature along a fixed direction changes with the weights.

        A third derivative; PyTorch computes some of them wrongly (batch and layer norm, at times). For the symmetric
        form T that it is the diagonal of, T(v, v, w) can be had from ``slope(v)`` and, by polarization, from
        ``slope(v + w)`` and ``slope(v - w)``: compare.
        """
        return self._at.product(vector, "all", "slope").div_(self._at.weights["all"])


class _MatrixOfLoss(OnSpaceOf):
    def __init__(self, hessian: HessianOperator, kind: Kind, part: Part) -> None:
        super().__init__(hessian)
        self._hessian = hessian
        self._kind = kind
        self._part = part

    def __call__(self, vector: Tensor) -> Tensor:
        return self._hessian.product(vector, self._part, self._kind)


@contextmanager
def hessian(objective: Objective) -> Iterator[HessianOperator]:
    """The Hessian of an objective at the module's current weights, for as long as the context is open.

    Example:
        >>> from lightning_dynamics.linalg import eigenpairs
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> loss = lambda module, batch: (module(batch[0]) - batch[1]).square().mean() / 2
        >>> with hessian(Objective(module, loss, [(x, y)])) as H:  # XᵀX / n = diag(4, 1) / 2
        ...     print(eigenpairs(H, top=2).top.values)
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    with objective.linearize() as at:
        yield HessianOperator(at)


@contextmanager
def curvature_matrix(objective: Objective, kind: Kind) -> Iterator[SymmetricOperator]:
    """Another curvature matrix of an objective with ``output_fn``, see :data:`Kind`, while the context is open.

    Example:
        >>> module = torch.nn.Linear(2, 3, bias=False)
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> cross_entropy = torch.nn.functional.cross_entropy
        >>> loss = lambda module, batch: cross_entropy(module(batch[0]), batch[1])
        >>> outputs = lambda module, batch: (module(batch[0]), lambda z: cross_entropy(z, batch[1]))
        >>> with curvature_matrix(Objective(module, loss, [(x, y)], output_fn=outputs), "gauss_newton") as G:
        ...     G(torch.ones(6)).shape
        torch.Size([6])
    """
    with hessian(objective) as operator:
        yield operator.operator(kind)


def symmetry_defect(operator: SymmetricOperator, generator: torch.Generator) -> float:
    """``|uᵀAv - vᵀAu|`` for random u and v, relative to its natural size ‖Au‖‖v‖/√n. Costs two products.

    Rounding gives about 1e-7 in float32 and 1e-2 in bfloat16. A second derivative that PyTorch computes wrongly is as a
    rule not symmetric: it gives 1e-2 and more.
    """
    u, v = random_vector(operator, generator), random_vector(operator, generator)
    image_u, image_v = operator(u), operator(v)
    scale = math.sqrt(float(image_u.norm() * v.norm()) * float(image_v.norm() * u.norm()) / operator.size)
    difference = abs(inner(u, image_v) - inner(v, image_u))
    return difference / scale if scale > 0 else difference
