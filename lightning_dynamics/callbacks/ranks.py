"""Several processes, one measurement: rank zero decides, all compute, no one is left waiting.

Rank zero runs the measurement as if it were alone. Whenever it needs something of the objective it sends a command that
the others, which are in :meth:`Ranks.serve`, carry out on their own batches; the parts are summed on rank zero. So
every branch is taken on rank zero, only rank zero holds the solver's vectors, and a rank that fails says so in the sum
instead of leaving the others in a collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dynamics.linalg import OnSpaceOf
from lightning_dynamics.objective import Layout, Linearization, Part, Sum

_PARTS: tuple[Part, ...] = ("all", "even", "odd")
_SUMS: tuple[Sum, ...] = ("hessian", "gauss_newton", "residual", "fisher", "empirical_fisher", "slope")
_END, _FIT, _EVALUATE, _PRODUCT = 0, 1, 2, 3


class RankError(RuntimeError):
    """Another rank failed in its part of a measurement."""


class Interrupted(RuntimeError):  # noqa: N818
    """A signal arrived, and the measurement makes way for it."""


class Ranks:
    """This process among those that train together.

    Args:
        rank: Its number.
        world_size: How many there are; with 1 nothing is ever communicated.
        device: Where tensors live that are communicated.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, thing: Any) -> Any:
        """Rank zero's value of a small Python object, on all ranks."""
        if self.world_size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's value of a small Python object, on all ranks."""
        if self.world_size == 1:
            return [thing]
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, thing)
        return boxes

    def command(self, *numbers: int) -> None:
        """Tell the others what to do; only on rank zero."""
        if self.world_size > 1:
            self._broadcast(torch.tensor([*numbers, 0, 0, 0, 0][:5], dtype=torch.int64))

    def end(self, outcome: Any) -> Any:
        """Release the others from :meth:`serve`, and give them the outcome."""
        self.command(_END)
        return self.share(outcome)

    def serve(self, linearization: Linearization | None) -> Any:
        """Carry out rank zero's commands until it is done; return the outcome.

        Args:
            linearization: This rank's part of the objective, None if it could not be opened (every command then fails).
        """
        while True:
            code, first, size, part, kind = self._broadcast(torch.zeros(5, dtype=torch.int64)).tolist()
            if code == _END:
                return self.share(None)
            if code == _FIT:
                self.fit(linearization, first)
                continue
            like = torch.empty(size, dtype=torch.float64 if first // 8 else torch.float32, device=self.device)
            if code == _EVALUATE:
                _, _, error = self.evaluate(linearization, bool(first % 8), like)
            else:
                _, _, error = self.product(linearization, self._broadcast(like), _PARTS[part], _SUMS[kind])
            if error is not None and linearization is not None:
                warnings.warn(f"Rank {self.rank} failed in its part of a measurement: {error!r}", stacklevel=2)

    def fit(self, linearization: Linearization | None, reserve: int) -> bool:
        """Whether the gradient graphs fit into the memory of every rank; known on rank zero."""
        refused = torch.zeros(1, dtype=torch.float64)
        try:
            assert linearization is not None
            # processes on one host share its memory
            refused += not linearization.graphs_fit(reserve, self.world_size if self.device.type == "cpu" else 1)
        except Exception:
            refused += 1  # the evaluation meets the same error, and reports it
        return not self._sum(refused)

    def evaluate(
        self, linearization: Linearization | None, keep: bool, like: Tensor
    ) -> tuple[Tensor, Tensor, BaseException | None]:
        """This rank's part of an evaluation, and the sum over all of them on rank zero."""
        stats = torch.zeros(6, dtype=torch.float64)
        gradient, error = None, None
        try:
            assert linearization is not None
            loss, gradient = linearization.evaluate(keep)
            weights = [linearization.weights[part] for part in _PARTS]
            stats = torch.tensor([loss, *weights, float(linearization.reached), 0.0], dtype=torch.float64)
        except Exception as caught:
            error = caught
            stats[5] = 1.0
        if gradient is None:
            gradient = torch.zeros_like(like)
        return self._sum(stats), self._sum(gradient), error

    def product(
        self, linearization: Linearization | None, vector: Tensor, part: Part, kind: Sum
    ) -> tuple[Tensor, Tensor, BaseException | None]:
        """This rank's part of a product, and the sum over all of them on rank zero."""
        failed, image, error = torch.zeros(1, dtype=torch.float64), None, None
        try:
            assert linearization is not None
            image = linearization.product(vector, part, kind)
        except Exception as caught:
            error = caught
            failed += 1
        if image is None:
            image = torch.zeros_like(vector)
        return self._sum(failed), self._sum(image), error

    def _broadcast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        dist.broadcast(tensor, src=0)
        return tensor

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        there = tensor.to(self.device)
        dist.reduce(there, dst=0)
        return there.to(tensor.device)


class JointLinearization(OnSpaceOf):
    """An objective over all ranks, as rank zero sees it: :class:`Linearization` with every sum taken over the ranks.

    Args:
        local: Rank zero's own part.
        ranks: The ranks.
        interrupted: Whether to make way, asked before every evaluation.
    """

    def __init__(self, local: Linearization, ranks: Ranks, interrupted: Callable[[], bool]) -> None:
        super().__init__(local)
        self.layout: Layout = local.layout
        self.weights: dict[Part, float] = dict.fromkeys(_PARTS, 0.0)
        self.reached = False
        self.products = 0
        self._local = local
        self._ranks = ranks
        self._interrupted = interrupted

    @property
    def is_kept(self) -> bool:
        return self._local.is_kept

    def evaluate(self, keep: bool | None = None, reserve: int = 0) -> tuple[float, Tensor]:
        self._make_way()
        if keep is None:
            self._ranks.command(_FIT, reserve)
            keep = self._ranks.fit(self._local, reserve)
        like = torch.empty(self.size, dtype=self.dtype, device=self.device)
        self._ranks.command(_EVALUATE, _width(like) + int(keep), self.size)
        stats, gradient, error = self._ranks.evaluate(self._local, keep, like)
        self._check(float(stats[5]), error)
        self.weights = {part: float(stats[1 + i]) for i, part in enumerate(_PARTS)}
        self.reached = bool(stats[4] > 0)
        return float(stats[0]), gradient

    def product(self, vector: Tensor, part: Part = "all", kind: Sum = "hessian") -> Tensor:
        self._make_way()
        self.products += 1
        self._ranks.command(_PRODUCT, _width(vector), self.size, _PARTS.index(part), _SUMS.index(kind))
        if self._ranks.world_size > 1:
            self._ranks._broadcast(vector)
        failed, image, error = self._ranks.product(self._local, vector, part, kind)
        self._check(float(failed), error)
        return image

    def _make_way(self) -> None:
        if self._interrupted():
            raise Interrupted("a signal arrived during the measurement")

    def _check(self, failures: float, error: BaseException | None) -> None:
        if error is not None:
            raise error
        if failures:
            raise RankError(
                f"{int(failures)} of {self._ranks.world_size} ranks failed in their part of the measurement"
            )


def _width(tensor: Tensor) -> int:
    """How a command says which type its vectors have."""
    return 8 if tensor.dtype is torch.float64 else 0
