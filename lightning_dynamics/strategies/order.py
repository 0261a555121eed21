"""The order in which samples are drawn, as a pure function of seed and epoch, shared by all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from lightning_dynamics.strategies.seeds import generator_of

Order = Literal["random_reshuffling", "single_shuffle", "incremental", "with_replacement", "independent_batches"]
"""How the samples of an epoch are drawn."""

ORDERS: tuple[Order, ...] = (
    "random_reshuffling",
    "single_shuffle",
    "incremental",
    "with_replacement",
    "independent_batches",
)


def drawn(order: Order, population: int, size: int, batch_size: int, key: Sequence[int]) -> Iterator[int]:
    """The positions in the population that one pass draws, without end after ``size`` of them.

    Args:
        order: How they are drawn.
        population: Number of samples, at least 1.
        size: Number of draws, at least the population's. What a permutation lacks is taken from its start.
        batch_size: Draws that make one batch of ``"independent_batches"``, at most the population's number.
        key: Seed, then what tells this pass from others. A single shuffle takes only the first two of its parts.

    Yields:
        ``size`` positions. The first ones do not depend on ``size``, except in the last independent batch.
    """
    if order == "independent_batches":
        generator = generator_of("order", *key)  # one for all batches: few bits of a seed count
        for start in range(0, size, batch_size):
            yield from _subset(population, min(batch_size, size - start), generator)
        return
    if order == "with_replacement":
        generator = generator_of("order", *key)
        yield from torch.randint(population, (population,), generator=generator).tolist()
        yield from torch.randint(population, (size - population,), generator=generator).tolist()
        return
    if order == "incremental":
        once: Sequence[int] = range(population)
    else:
        generator = generator_of("order", *(key[:2] if order == "single_shuffle" else key))
        once = torch.randperm(population, generator=generator).tolist()
    for start in range(0, size, population):
        yield from once[: size - start]


class OrderSampler(Sampler[int]):
    """One rank's share of an order: entries ``rank``, ``rank + world_size``, … of what all ranks draw together.

    So the batches that the ranks have at a time are together a block of the order, the batch of one process with the
    same number of samples. Each rank has equally many samples: what is lacking is taken from the start of a
    permutation, as PyTorch's ``DistributedSampler`` does it, and is drawn further where draws are independent.

    Iterating again within an epoch, once its first batch has been used, draws anew: the next pass of a shorter loader
    that is cycled.

    Args:
        members: Indices of the samples to draw from, in their order.
        order: How they are drawn.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.
        batch_size: Samples in a batch of this rank.
        skips: Whether it leaves out what was used before the run was interrupted, or a :class:`ContinuedBatches` does.
    """

    def __init__(
        self,
        members: Sequence[int],
        order: Order,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        skips: bool = True,
    ) -> None:
        self.members = members
        self.order: Order = order
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.skips = skips
        self.stream = 0
        self.epoch = 0
        self._first_pass = 0
        self._skipped = 0
        self._pass = 0
        self._is_under_way = False
        self.iterations = 0
        """How often it has been iterated."""

    @property
    def replacement(self) -> bool:
        """Whether each sample is drawn by itself, so that one may come twice in a batch."""
        return self.order == "with_replacement"

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Stream, epoch, pass and batch that iterating begins with, as the epoch starts."""
        return self.stream, self.epoch, self._first_pass, self._skipped

    @property
    def skipped_batches(self) -> int:
        """Batches at the start of the pass to come that were used before the run was interrupted."""
        return 0 if self._is_under_way else self._skipped

    def begin(self, stream: int, epoch: int, first_pass: int, skipped: int) -> None:
        """Iterate next from this place on.

        Args:
            stream: Number of the loader among those of the Trainer; each draws for itself.
            epoch: Number of the epoch.
            first_pass: Passes of the epoch that are over.
            skipped: Batches of the current pass that are over.
        """
        self.stream, self.epoch = stream, epoch
        self._first_pass = self._pass = first_pass
        self._skipped = skipped
        self._is_under_way = False

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; does nothing in the same one."""
        if epoch != self.epoch:
            self.begin(self.stream, epoch, 0, 0)

    def go_on(self) -> None:
        """The first batch of the epoch, or since the run was resumed, is in use."""
        self._is_under_way = True

    def within(self, count: int) -> list[int]:
        """The samples that the first so many draws of any epoch can bring, of all ranks together."""
        if self.order == "incremental":
            return list(self.members)[:count]
        if self.order == "single_shuffle":
            return [self.members[i] for i in islice(self._drawn(0), min(count, len(self.members)))]
        return list(self.members)

    def _drawn(self, number: int) -> Iterator[int]:
        """Positions that all ranks together draw in a pass of the epoch."""
        return drawn(
            self.order,
            len(self.members),
            len(self) * self.world_size,
            self.batch_size * self.world_size,
            (self.seed, self.stream, self.epoch, number),
        )

    def __len__(self) -> int:
        return -(-len(self.members) // self.world_size)

    def __iter__(self) -> Iterator[int]:
        self.iterations += 1
        skipped = self.skipped_batches * self.batch_size if self.skips else 0
        if self._is_under_way:
            self._pass += 1
        for i in islice(self._drawn(self._pass), self.rank + skipped * self.world_size, None, self.world_size):
            yield self.members[i]


class ContinuedBatches:
    """A batch sampler of the user's own without the batches that were used before the run was interrupted.

    Attributes:
        batches: The batch sampler.
        sampler: The order that it draws from.
    """

    def __init__(self, batches: Any, sampler: OrderSampler) -> None:
        self.batches = batches
        self.sampler = sampler
        self._drawn_before = sampler.iterations

    @property
    def ignores_order(self) -> bool:
        """Whether it has made batches without asking for the order: it has made them once and for all."""
        return self.sampler.iterations == self._drawn_before

    def __iter__(self) -> Iterator[Any]:
        # asked before the sampler is, and drawn in full, since batches may depend on those before them
        return islice(iter(self.batches), self.sampler.skipped_batches, None)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)


def _subset(population: int, size: int, generator: torch.Generator) -> list[int]:
    """A uniform subset in random order: draws with replacement whose repeats do not count."""
    if 3 * size > population:
        return torch.randperm(population, generator=generator)[:size].tolist()
    chosen: dict[int, None] = {}
    while len(chosen) < size:
        more = torch.randint(population, (size - len(chosen),), generator=generator)
        chosen.update(dict.fromkeys(more.tolist()))
    return list(chosen)
