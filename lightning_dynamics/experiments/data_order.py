"""Training data whose order depends on a seed and on nothing else, in batches of another size where that is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_dynamics.objective.randomness import fork_rng, seed_everything, stream_seed

DataSource = DataLoader[Any] | LightningDataModule | Callable[[], Any] | None
"""Where batches come from: a loader, a data module, a function that makes either, or None for the module's own."""


class OrderedData:
    """The training data of one run, arranged when the Trainer asks for its loader.

    The samples of a plain loader (a map-style data set, a sampler, a ``batch_size``) come in the order that its sampler
    draws after seeding with (seed, number of the pass). That order does not depend on the batch size, nor on random
    numbers that training draws: another batch size cuts the same permutation. Other loaders are taken as they are.

    Args:
        source: See :data:`DataSource`.
        seed: The seed.
        factor: What the batch size is multiplied by, and rounded.
    """

    def __init__(self, source: DataSource, seed: int, factor: float = 1.0) -> None:
        self.original: Any = None
        self.arranged: Any = None
        self.batch_size: int | None = None
        self.original_batch_size: int | None = None
        self._source = source
        self._seed = seed
        self._factor = factor
        self._undo: list[Callable[[], None]] = []

    def arguments(self, module: LightningModule) -> dict[str, Any]:
        """Arguments of ``Trainer.fit`` that give it this data."""
        source = self._source
        if callable(source) and not isinstance(source, (DataLoader, LightningDataModule)):
            source = source()
        if source is None:
            self._intercept(module)
            return {}
        if isinstance(source, LightningDataModule):
            before = dict(vars(source))
            self._intercept(source)
            self._undo.append(lambda: _put_back(source, before))
            return {"datamodule": source}
        return {"train_dataloaders": self._arrange(source)}

    def close(self) -> None:
        """Give what belongs to the caller its state back."""
        while self._undo:
            self._undo.pop()()

    def again(self) -> Any:
        """The loader that the data came from, in its first order."""
        return self._ordered(self.original, self.original_batch_size) if is_plain(self.original) else self.original

    def _intercept(self, owner: Any) -> None:
        own = owner.train_dataloader
        owner.train_dataloader = lambda: self._arrange(own())

    def _arrange(self, loader: Any) -> Any:
        if isinstance(loader, (dict, list, tuple)) or not hasattr(loader, "__iter__"):
            raise ValueError(f"The edge test needs one training loader, got a {type(loader).__name__}.")
        self.original = loader
        self._undo.append(_remember_generators(loader))
        if not is_plain(loader):
            if self._factor != 1:
                raise ValueError(
                    "A branch changes `batch_size`, and the training data has no plain one to change "
                    f"({_why_not_plain(loader)}). Use a DataLoader with a map-style data set and `batch_size=`, or "
                    "branches that change `lr` only."
                )
            self.arranged = loader
            return loader
        self.original_batch_size = int(loader.batch_sampler.batch_size)
        self.batch_size = size = round(self.original_batch_size * self._factor)
        if size < 1 or (self._factor != 1 and size == self.original_batch_size):
            raise ValueError(
                f"`batch_size={self._factor:g}` makes batches of {size} out of batches of {self.original_batch_size}."
            )
        if size > len(loader.dataset) and size > self.original_batch_size:
            raise ValueError(f"A batch of {size} is more than the {len(loader.dataset)} samples that there are.")
        self.arranged = self._ordered(loader, size)
        return self.arranged

    def _ordered(self, loader: Any, size: int | None) -> DataLoader[Any]:
        sampler = BatchSampler(_Ordered(loader.sampler, self._seed), int(size or 1), loader.drop_last)
        return DataLoader(
            loader.dataset,
            batch_sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(stream_seed(self._seed)),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )


def is_plain(loader: Any) -> bool:
    """Whether batches are runs of a fixed number of samples from a finite sampler."""
    return not _why_not_plain(loader)


def _why_not_plain(loader: Any) -> str:
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__} is no DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return f"{type(loader.dataset).__name__} is iterable"
    if loader.batch_sampler is None:
        return "its `batch_size` is None"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"its batch sampler is a {type(loader.batch_sampler).__name__}"
    return "" if hasattr(loader.sampler, "__len__") else f"{type(loader.sampler).__name__} has no length"


class _Ordered(Sampler[int]):
    """A sampler whose order in pass n depends on the seed and n only."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler = sampler
        self._seed = seed
        self._passes = 0

    def __iter__(self) -> Iterator[int]:
        seed = stream_seed(self._seed, self._passes)
        self._passes += 1
        own = getattr(self._sampler, "generator", None)
        with fork_rng():
            seed_everything(seed)
            if isinstance(own, torch.Generator):
                own.manual_seed(seed)
            order = list(self._sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self._sampler)


def _remember_generators(loader: Any) -> Callable[[], None]:
    """Give the generators of a loader back their present state, when called."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    states = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]

    def put_back() -> None:
        for generator, state in states:
            generator.set_state(state)

    return put_back


def _put_back(owner: Any, before: dict[str, Any]) -> None:
    """Take away what was put over a data module's own methods, and its reference to our Trainer."""
    vars(owner).pop("train_dataloader", None)
    for name in ("train_dataloader", "trainer"):
        if name in before:
            vars(owner)[name] = before[name]
