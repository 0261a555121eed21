"""Several processes, one measurement: rank zero decides, all compute, no one is left waiting.

Rank zero runs the measurement as if it were alone. Whenever it needs something of the data it sends a command that the
others, which are in :meth:`RankPart.serve`, carry out on their own batches; what comes of it is summed on rank zero. So
every branch is taken on rank zero, and a rank that fails says so in the sum instead of leaving the others in a
collective.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch

from lightning_dynamics.callbacks.ranks import Interrupted, RankError, Ranks

_END = 0
_NUMBERS = 5  # a command: its code, and up to four numbers

Opened = TypeVar("Opened")
"""This rank's part of what is measured on, opened."""


class RankPart(ABC, Generic[Opened]):
    """What a rank does in a measurement. One kind for each kind of data that is summed over ranks.

    Args:
        ranks: The ranks.
        local: This rank's data, None if it could not be opened (every command then fails).
    """

    def __init__(self, ranks: Ranks, local: Opened | None) -> None:
        self.ranks = ranks
        self.local = local

    @staticmethod
    @abstractmethod
    def open(replay: Any) -> AbstractContextManager[Opened]:
        """Open this rank's data."""

    @abstractmethod
    def subject(self, interrupted: Callable[[], bool], vectors: int) -> Any:
        """The data of all ranks, as rank zero's monitors see it.

        Args:
            interrupted: Whether to make way, asked before every command.
            vectors: Vectors of the size of the parameters that will be held besides.
        """

    @abstractmethod
    def carry_out(self, code: int, numbers: list[int]) -> BaseException | None:
        """Do what rank zero has commanded; return what failed here."""

    def serve(self) -> Any:
        """Carry out commands until rank zero is done; return the outcome."""
        while True:
            code, *numbers = self.ranks.broadcast(torch.zeros(_NUMBERS, dtype=torch.int64)).tolist()
            if code == _END:
                return self.ranks.share(None)
            error = self.carry_out(code, numbers)
            if error is not None and self.local is not None:
                warnings.warn(f"Rank {self.ranks.rank} failed in its part of a measurement: {error!r}", stacklevel=2)

    def command(self, code: int, *numbers: int) -> None:
        """Tell the others what to do; only on rank zero."""
        if self.ranks.world_size > 1:
            padded = [code, *numbers, *[0] * _NUMBERS][:_NUMBERS]
            self.ranks.broadcast(torch.tensor(padded, dtype=torch.int64))

    def end(self, outcome: Any) -> Any:
        """Release the others from :meth:`serve`, and give them the outcome."""
        self.command(_END)
        return self.ranks.share(outcome)

    def check(self, failures: float, error: BaseException | None) -> None:
        """Raise if a rank has failed."""
        if error is not None:
            raise error
        if failures:
            raise RankError(f"{int(failures)} of {self.ranks.world_size} ranks failed in their part of the measurement")


def make_way(interrupted: Callable[[], bool]) -> None:
    """Give up if a signal waits."""
    if interrupted():
        raise Interrupted("a signal arrived during the measurement")
