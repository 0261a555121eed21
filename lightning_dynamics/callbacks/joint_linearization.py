"""An objective of which every rank holds a part: losses, gradients and products are sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_dynamics.callbacks.joint import RankPart, make_way
from lightning_dynamics.linalg import OnSpaceOf
from lightning_dynamics.objective import HessianOperator, Layout, Linearization, MiniBatchSums, Objective, Part, Sum

_PARTS: tuple[Part, ...] = ("all", "even", "odd")
_SUMS: tuple[Sum, ...] = ("hessian", "gauss_newton", "residual", "fisher", "empirical_fisher", "slope")
_FIT, _EVALUATE, _PRODUCT, _SURVEY = 1, 2, 3, 4


class LinearizationPart(RankPart[Linearization]):
    """A rank's part of an objective, opened at its weights."""

    @staticmethod
    def open(objective: Objective) -> AbstractContextManager[Linearization]:
        return objective.linearize()

    def subject(self, interrupted: Callable[[], bool], vectors: int) -> HessianOperator:
        assert self.local is not None
        reserve = vectors * self.local.size * self.local.dtype.itemsize
        return HessianOperator(JointLinearization(self, interrupted), reserve=reserve)

    def carry_out(self, code: int, numbers: list[int]) -> BaseException | None:
        first, size, part, kind = numbers
        if code == _FIT:
            self.fit(first)
            return None
        if code == _SURVEY:
            return self.survey(self.ranks.share(None))
        like = torch.empty(size, dtype=torch.float64 if first // 8 else torch.float32, device=self.ranks.device)
        if code == _EVALUATE:
            return self.evaluate(bool(first % 8), like)[2]
        return self.product(self.ranks.broadcast(like), _PARTS[part], _SUMS[kind])[2]

    def fit(self, reserve: int) -> bool:
        """Whether the gradient graphs fit into the memory of every rank; known on rank zero."""
        refused = torch.zeros(1, dtype=torch.float64)
        try:
            assert self.local is not None
            # processes on one host share its memory
            sharers = self.ranks.world_size if self.ranks.device.type == "cpu" else 1
            refused += not self.local.graphs_fit(reserve, sharers)
        except Exception:
            refused += 1  # the evaluation meets the same error, and reports it
        return not self.ranks.sum(refused)

    def evaluate(self, keep: bool, like: Tensor) -> tuple[Tensor, Tensor, BaseException | None]:
        """This rank's part of an evaluation, and the sum over all of them on rank zero."""
        stats = torch.zeros(6, dtype=torch.float64)
        gradient, error = None, None
        try:
            assert self.local is not None
            loss, gradient = self.local.evaluate(keep)
            weights = [self.local.weights[part] for part in _PARTS]
            stats = torch.tensor([loss, *weights, float(self.local.reached), 0.0], dtype=torch.float64)
        except Exception as caught:
            error = caught
            stats[5] = 1.0
        if gradient is None:
            gradient = torch.zeros_like(like)
        return self.ranks.sum(stats), self.ranks.sum(gradient), error

    def survey(self, into: MiniBatchSums) -> BaseException | None:
        """Show this rank's mini-batches to an accumulator; on rank zero it is then the sum over all of them."""
        return self.summed(into, lambda local: local.survey(into))

    def product(self, vector: Tensor, part: Part, kind: Sum) -> tuple[Tensor, Tensor, BaseException | None]:
        """This rank's part of a product, and the sum over all of them on rank zero."""
        failed, image, error = torch.zeros(1, dtype=torch.float64), None, None
        try:
            assert self.local is not None
            image = self.local.product(vector, part, kind)
        except Exception as caught:
            error = caught
            failed += 1
        if image is None:
            image = torch.zeros_like(vector)
        return self.ranks.sum(failed), self.ranks.sum(image), error


class JointLinearization(OnSpaceOf):
    """An objective over all ranks, as rank zero sees it: :class:`Linearization` with every sum taken over the ranks.

    Args:
        part: Rank zero's own part.
        interrupted: Whether to make way, asked before every evaluation.
    """

    def __init__(self, part: LinearizationPart, interrupted: Callable[[], bool]) -> None:
        assert part.local is not None
        super().__init__(part.local)
        self.layout: Layout = part.local.layout
        self.weights: dict[Part, float] = dict.fromkeys(_PARTS, 0.0)
        self.reached = False
        self.products = 0
        self._part = part
        self._local = part.local
        self._interrupted = interrupted

    @property
    def is_kept(self) -> bool:
        return self._local.is_kept

    def evaluate(self, keep: bool | None = None, reserve: int = 0) -> tuple[float, Tensor]:
        make_way(self._interrupted)
        if keep is None:
            self._part.command(_FIT, reserve)
            keep = self._part.fit(reserve)
        like = torch.empty(self.size, dtype=self.dtype, device=self.device)
        self._part.command(_EVALUATE, _width(like) + int(keep), self.size)
        stats, gradient, error = self._part.evaluate(keep, like)
        self._part.check(float(stats[5]), error)
        self.weights = {part: float(stats[1 + i]) for i, part in enumerate(_PARTS)}
        self.reached = bool(stats[4] > 0)
        return float(stats[0]), gradient

    def product(self, vector: Tensor, part: Part = "all", kind: Sum = "hessian") -> Tensor:
        make_way(self._interrupted)
        self.products += 1
        self._part.command(_PRODUCT, _width(vector), self.size, _PARTS.index(part), _SUMS.index(kind))
        if self._part.ranks.world_size > 1:
            self._part.ranks.broadcast(vector)
        failed, image, error = self._part.product(vector, part, kind)
        self._part.check(float(failed), error)
        return image

    def survey(self, into: MiniBatchSums) -> None:
        make_way(self._interrupted)
        self._part.command(_SURVEY)
        self._part.survey(self._part.ranks.share(into))


def _width(tensor: Tensor) -> int:
    """How a command says which type its vectors have."""
    return 8 if tensor.dtype is torch.float64 else 0
