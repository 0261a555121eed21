"""An objective of which every rank holds a part: losses, gradients and products are sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_dynamics.callbacks.joint import RankPart, make_way
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.linalg import OnSpaceOf
from lightning_dynamics.objective import HessianOperator, Layout, Linearization, LocalPieces, Objective, Part, Sum

_PARTS: tuple[Part, ...] = ("all", "even", "odd")
_SUMS: tuple[Sum, ...] = ("hessian", "gauss_newton", "residual", "fisher", "empirical_fisher", "slope")
_FIT, _EVALUATE, _PRODUCT, _OPEN, _CLOSE, _OF_PIECES, _AFTER, _SAMPLES = range(1, 9)


class LinearizationPart(RankPart[Linearization]):
    """A rank's part of an objective, opened at its weights.

    Attributes:
        pieces: This rank's pieces of the mini-batches that are at hand, by their numbers.
    """

    def __init__(self, ranks: Ranks, local: Linearization | None) -> None:
        super().__init__(ranks, local)
        self.pieces: dict[int, LocalPieces] = {}

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
        if code == _CLOSE:
            self.pieces.pop(first, None)
            return None
        like = torch.empty(size, dtype=torch.float64 if first // 8 else torch.float32, device=self.ranks.device)
        if code == _EVALUATE:
            return self.evaluate(bool(first % 8), like)[2]
        if code == _OPEN:
            return self.open_pieces(part, like)[2]
        if code == _OF_PIECES:
            return self.product_of_pieces(part, self.ranks.broadcast(like))[2]
        if code == _AFTER:
            return self.loss_after(part, self.ranks.broadcast(like))[2]
        if code == _SAMPLES:
            error = self.sample_squares(part, self.ranks.broadcast(like))[1]
            return None if isinstance(error, ValueError) else error  # rank zero heeds that samples are coupled
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

    def open_pieces(self, number: int, like: Tensor) -> tuple[Tensor, Tensor, BaseException | None]:
        """Take this rank's pieces of a mini-batch in hand: weight, loss and failures, and gradient, as sums."""
        stats, gradient, error = torch.zeros(3, dtype=torch.float64), torch.zeros_like(like), None
        try:
            assert self.local is not None
            self.pieces[number] = here = self.local.pieces_of(number)
            stats = torch.tensor([here.weight, here.loss, 0.0], dtype=torch.float64)
            gradient = here.gradient.clone()
        except Exception as caught:
            error = caught
            stats[2] = 1.0
        return self.ranks.sum(stats), self.ranks.sum(gradient), error

    def product_of_pieces(self, number: int, vector: Tensor) -> tuple[Tensor, Tensor, BaseException | None]:
        """The product with the Hessian of a mini-batch, as :meth:`product`."""
        return self._summed(lambda: self.pieces[number].product(vector), torch.zeros_like(vector))

    def loss_after(self, number: int, step: Tensor) -> tuple[Tensor, Tensor, BaseException | None]:
        """The loss of a mini-batch after a step."""
        zero = torch.zeros(1, dtype=torch.float64)
        return self._summed(lambda: zero + self.pieces[number].loss_after(step), zero)

    def sample_squares(self, number: int, center: Tensor) -> tuple[list[Any], BaseException | None]:
        """What every rank knows of the samples of a mini-batch, or why not; and what failed here."""
        found, error = None, None
        try:
            found = self.pieces[number].sample_squares(center)
        except Exception as caught:
            error = caught
        misuse = str(error) if isinstance(error, ValueError) else None
        return self.ranks.gather((found, misuse, error is not None)), error

    def _summed(self, compute: Callable[[], Tensor], nothing: Tensor) -> tuple[Tensor, Tensor, BaseException | None]:
        """Failures and results, summed over ranks on rank zero; and what failed here."""
        failed, image, error = torch.zeros(1, dtype=torch.float64), nothing, None
        try:
            image = compute()
        except Exception as caught:
            error = caught
            failed += 1
        return self.ranks.sum(failed), self.ranks.sum(image), error

    def product(self, vector: Tensor, part: Part, kind: Sum) -> tuple[Tensor, Tensor, BaseException | None]:
        """This rank's part of a product, and the sum over all of them on rank zero."""

        def compute() -> Tensor:
            assert self.local is not None
            return self.local.product(vector, part, kind)

        return self._summed(compute, torch.zeros_like(vector))


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

    @property
    def mini_batches(self) -> list[int]:
        """The numbers of the mini-batches: every rank has pieces of each."""
        return self._local.mini_batches

    def pieces_of(self, number: int) -> JointPieces:
        """One mini-batch, of which every rank holds pieces."""
        make_way(self._interrupted)
        return JointPieces(self._part, self._interrupted, number, self._local.zeros())


class JointPieces:
    """The pieces of one mini-batch over all ranks, as rank zero sees them.

    Args:
        part: Rank zero's own part.
        interrupted: Whether to make way, asked before every product.
        number: Of the mini-batch.
        like: A vector.
    """

    def __init__(self, part: LinearizationPart, interrupted: Callable[[], bool], number: int, like: Tensor) -> None:
        self._part = part
        self._interrupted = interrupted
        self._number = number
        part.command(_OPEN, _width(like), len(like), number)
        stats, gradient, error = part.open_pieces(number, like)
        part.check(float(stats[2]), error)
        self.weight, self.loss = float(stats[0]), float(stats[1])
        self.gradient = gradient

    def product(self, vector: Tensor) -> Tensor:
        self._tell(_OF_PIECES, vector)
        failed, image, error = self._part.product_of_pieces(self._number, vector)
        self._part.check(float(failed), error)
        return image

    def loss_after(self, step: Tensor) -> float:
        self._tell(_AFTER, step)
        failed, loss, error = self._part.loss_after(self._number, step)
        self._part.check(float(failed), error)
        return float(loss)

    def sample_squares(self, center: Tensor) -> tuple[Tensor, Tensor]:
        self._tell(_SAMPLES, center)
        found, error = self._part.sample_squares(self._number, center)
        misuse = next((said for _, said, _ in found if said is not None), None)
        if misuse is not None:
            raise ValueError(misuse)
        self._part.check(sum(failed for *_, failed in found), error)
        norms, distances = zip(*(each for each, *_ in found), strict=True)
        return torch.cat(norms), torch.cat(distances)

    def close(self) -> None:
        self._part.command(_CLOSE, self._number)
        self._part.pieces.pop(self._number, None)

    def _tell(self, code: int, vector: Tensor) -> None:
        make_way(self._interrupted)
        self._part.command(code, _width(vector), len(vector), self._number)
        if self._part.ranks.world_size > 1:
            self._part.ranks.broadcast(vector)


def _width(tensor: Tensor) -> int:
    """How a command says which type its vectors have."""
    return 8 if tensor.dtype is torch.float64 else 0
