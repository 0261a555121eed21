"""Samples of a map-style training set, read in a process of our own so that the set itself is not touched."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.randomness import fork_rng, stream_seed
from lightning_dynamics.strategies.order import OrderSampler

_READ_TIMEOUT = 300.0  # seconds without a batch after which reading the data set is given up


@dataclass
class ProbeItem:
    """One probe batch.

    Attributes:
        batch: The batch.
        index: Its number among all batches of the probe, over all ranks.
        is_ready: Whether it already was converted, transferred and augmented.
        weight: Number of its samples; 0 where it only keeps the ranks in step.
    """

    batch: Any
    index: int
    is_ready: bool
    weight: float


def share_batches(count: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """This rank's batch numbers, as many on every rank; where there are too few, one is repeated and does not count."""
    return [
        (index if index < count else 0, index < count)
        for index in range(rank, count + (-count) % world_size, world_size)
    ]


def share_pieces(draws: int, pieces: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """This rank's share of every drawn mini-batch: numbers of its pieces, as :func:`share_batches`."""
    return [
        (draw * pieces + piece, counts)
        for draw in range(draws)
        for piece, counts in share_batches(pieces, rank, world_size)
    ]


@dataclass
class MapStyleSource:
    """A training loader whose data set can be read sample by sample."""

    loader: DataLoader[Any]
    members: Sequence[int]
    batch_size: int

    @property
    def everyone(self) -> list[int]:
        """All samples, in order; without the incomplete batch at the end where training has none."""
        return list(self.members)[: self._in_whole_batches(len(self.members))]

    @classmethod
    def of(
        cls, loaders: Sequence[Any], batch_size: int | None, num_batches: float, split: str = "training"
    ) -> MapStyleSource | str:
        """The source behind the loaders of a split, or why there is none."""
        if len(loaders) != 1:
            return f"there are {len(loaders)} {split} loaders"
        loader = loaders[0]
        if not isinstance(loader, DataLoader):
            return f"the {split} data is a {type(loader).__name__}, not a DataLoader"
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
            return f"{type(loader.dataset).__name__} is not map-style"
        if type(loader.batch_sampler) is not BatchSampler:
            return f"the loader's batch sampler is {_a(loader.batch_sampler)}"
        members = _members(loader, num_batches)
        if isinstance(members, str):
            return members
        return cls(loader, members, batch_size if batch_size is not None else loader.batch_sampler.batch_size)

    def read(
        self,
        chosen: Sequence[int],
        seed: int,
        rank: int,
        world_size: int,
        beat: Callable[[], None] = lambda: None,
    ) -> list[ProbeItem]:
        """This rank's share of the batches that these samples make, in their order; ``beat`` is called after each."""
        groups = [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]
        shares = share_batches(len(groups), rank, world_size)
        batches = _read_batches(self.loader, [groups[index] for index, _ in shares], seed, beat)
        return [
            ProbeItem(batch, index, is_ready=False, weight=float(len(groups[index])) if counts else 0.0)
            for (index, counts), batch in zip(shares, batches, strict=True)
        ]

    @property
    def replaces(self) -> bool:
        """Whether training draws each sample by itself, so that one may come twice in a batch."""
        return bool(getattr(_sampler_of(self.loader), "replacement", False))

    def draw(self, count: int, batch_size: int, seed: int) -> list[int]:
        """Samples of mini-batches drawn independently of each other, each as training draws its own."""
        population = len(self.members)
        if batch_size > population and not self.replaces:
            raise ValueError(f"a batch of {batch_size} samples cannot be drawn from {population}")
        drawn: list[int] = []
        for number in range(count):
            generator = torch.Generator().manual_seed(stream_seed(seed, population, number))
            if self.replaces:
                order = torch.randint(population, (batch_size,), generator=generator).tolist()
            else:
                order = torch.randperm(population, generator=generator)[:batch_size].tolist()
            drawn += [self.members[i] for i in order]
        return drawn

    def size_of_step(self, batches: int) -> int:
        """Samples in this many batches of the loader, of those that there are."""
        whole = self._in_whole_batches(len(self.members))
        return min(self.batch_size * batches, whole)

    def read_draws(
        self,
        drawn: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        beat: Callable[[], None] = lambda: None,
    ) -> list[ProbeItem]:
        """This rank's share of each of the drawn batches, in pieces of the loader's own batch size.

        A sample that comes in several batches draws its noise anew in each.
        """
        pieces: list[list[int]] = []
        for number, start in enumerate(range(0, len(drawn), batch_size)):
            whole: list[int] = [_Drawn.of(sample, number) for sample in drawn[start : start + batch_size]]
            pieces += [whole[first : first + self.batch_size] for first in range(0, batch_size, self.batch_size)]
        shares = share_pieces(len(drawn) // batch_size, self.pieces(batch_size), rank, world_size)
        batches = _read_batches(self.loader, [pieces[index] for index, _ in shares], seed, beat)
        return [
            ProbeItem(batch, index, is_ready=False, weight=float(len(pieces[index])) if counts else 0.0)
            for (index, counts), batch in zip(shares, batches, strict=True)
        ]

    def pieces(self, batch_size: int) -> int:
        """Batches of the loader's size that a drawn batch is made of."""
        return -(-batch_size // self.batch_size)

    def choose(self, wanted: int, seed: int) -> list[int]:
        """A random subset, stratified by label where labels are plain, of whole batches where there are enough."""
        population = len(self.members)
        size = min(population, self.batch_size * math.ceil(wanted / self.batch_size))
        size = self._in_whole_batches(size)
        generator = torch.Generator().manual_seed(stream_seed(seed, population))
        order = [self.members[i] for i in torch.randperm(population, generator=generator).tolist()]
        labels = _plain_labels(self.loader.dataset)
        if labels is None:
            return order[:size]
        by_class: dict[int, list[int]] = {}
        for member in order:
            by_class.setdefault(int(labels[member]), []).append(member)
        # largest remainders: each class has its share of the set, to within one sample
        shares = {label: size * len(members) / population for label, members in by_class.items()}
        counts = {label: int(share) for label, share in shares.items()}
        by_remainder = sorted(shares, key=lambda label: (counts[label] - shares[label], label))
        for label in by_remainder[: size - sum(counts.values())]:
            counts[label] += 1
        chosen = {member for label, members in by_class.items() for member in members[: counts[label]]}
        return [member for member in order if member in chosen]

    def _in_whole_batches(self, count: int) -> int:
        """So many of the samples come in whole batches, where the loader drops an incomplete one."""
        drops = self.loader.drop_last and count > self.batch_size
        return count - count % self.batch_size if drops else count


def _members(loader: DataLoader[Any], num_batches: float) -> Sequence[int] | str:
    """Which samples of its data set a loader draws uniformly, or why that cannot be known."""
    sampler = _sampler_of(loader)
    if type(sampler) is SubsetRandomSampler:
        return [int(i) for i in sampler.indices]
    if isinstance(sampler, OrderSampler):
        drawn = min(num_batches * (loader.batch_size or 1), len(sampler))
        return sampler.within(int(drawn) * sampler.world_size)
    uniform = type(sampler) in (SequentialSampler, RandomSampler) or isinstance(sampler, DistributedSampler)
    if not uniform or not hasattr(loader.dataset, "__len__"):
        return f"the loader's sampler is {_a(sampler)}"
    shuffles = type(sampler) is RandomSampler or getattr(sampler, "shuffle", False)
    trained_on = len(loader.dataset) if shuffles else num_batches * (loader.batch_size or 1)
    return range(int(min(len(loader.dataset), trained_on)))


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """A loader's sampler, without Lightning's distributed wrapper around one of the user's."""
    return getattr(getattr(loader.sampler, "dataset", None), "_sampler", None) or loader.sampler


def _a(thing: object) -> str:
    return f"a {type(thing).__name__}"


def _plain_labels(dataset: Any) -> Sequence[int] | None:
    """Integer labels of all samples, where a data set simply has them; its ``__getitem__`` is not called."""
    if isinstance(dataset, Subset):
        labels = _plain_labels(dataset.dataset)
        return None if labels is None else [labels[int(i)] for i in dataset.indices]
    found = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else None
    for name in ("targets", "labels"):
        if found is None:
            found = vars(dataset).get(name) if hasattr(dataset, "__dict__") else None
    if found is None:
        return None
    try:
        array = np.asarray(found)
    except (TypeError, ValueError):
        return None
    plain = array.ndim == 1 and array.dtype.kind in "iub" and len(array) == len(dataset)
    return array.tolist() if plain else None


class _Drawn(int):
    """A sample's index that knows for which drawn batch it is asked for."""

    number: int

    @classmethod
    def of(cls, index: int, number: int) -> _Drawn:
        drawn = cls(index)
        drawn.number = number
        return drawn


class _SeededSamples(Dataset[Any]):
    """A data set whose samples draw their noise each from a stream of its own, whoever reads them."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, index: int) -> Any:
        self._draw_from(index)
        return self._dataset[int(index)]

    def _draw_from(self, index: int) -> None:
        again = [index.number] if isinstance(index, _Drawn) else []
        seed = stream_seed(self._seed, int(index), *again)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_dataset"], name)


class _SeededGroups(_SeededSamples):
    """A data set that is asked for several samples at once; their noise is drawn from the first one's stream."""

    def __getitems__(self, indices: list[int]) -> Any:
        self._draw_from(indices[0])
        return self._dataset.__getitems__([int(index) for index in indices])


def _read_batches(
    loader: DataLoader[Any], groups: Sequence[Sequence[int]], seed: int, beat: Callable[[], None]
) -> list[Any]:
    """Read these groups of samples in one worker process, collated as the loader does it."""
    with fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads alive, as every loader does
        reader: DataLoader[Any] = DataLoader(
            (_SeededGroups if hasattr(loader.dataset, "__getitems__") else _SeededSamples)(loader.dataset, seed),
            batch_sampler=_Groups(groups),
            num_workers=1,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(stream_seed(seed)),
            timeout=_READ_TIMEOUT,
        )
        batches = []
        for batch in reader:
            batches.append(private_copy(batch))  # what comes from a worker lies in shared memory
            beat()
        return batches


class _Groups:
    """Groups of indices as a batch sampler."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(group) for group in self._groups])

    def __len__(self) -> int:
        return len(self._groups)
