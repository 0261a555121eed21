"""What processes that train together say to each other while they measure."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank zero's tensor of this shape and type, on every rank's device."""
        tensor = tensor.to(self.device)
        dist.broadcast(tensor, src=0)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on rank zero and where the tensor is; elsewhere anything."""
        if self.world_size == 1:
            return tensor
        there = tensor.to(self.device)
        dist.reduce(there, dst=0)
        return there.to(tensor.device)
