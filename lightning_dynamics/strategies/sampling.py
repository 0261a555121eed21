"""The order in which training samples are drawn, as a part of a Lightning strategy."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_dynamics import _compat
from lightning_dynamics.strategies.order import ORDERS, ContinuedBatches, Order, OrderSampler
from lightning_dynamics.strategies.seeds import shared_seed

_CURE = "Use another strategy, or a DataLoader over a map-style data set."


class SamplingOrderMixin(Strategy):
    """Makes any strategy draw the training samples in an order of its own (see :class:`SamplingOrderStrategy`).

    The order replaces the sampler of every training loader, Lightning's distributed one too. It is a pure function of
    seed, epoch and the loader's position among several: the same on one process and on many, and after a resume the
    run goes on with the batch after the last one that was used.

    Args:
        args: Of the strategy.
        order: ``"random_reshuffling"``: a new permutation for each epoch. ``"single_shuffle"``: one permutation for
            all. ``"incremental"``: the order of the data set. ``"with_replacement"``: each sample of each batch drawn
            uniformly by itself. ``"independent_batches"``: each batch, that of all ranks together, a uniform subset
            without repeats, drawn independently of the others.
        order_seed: Seed of the order; None for that of ``seed_everything``, 0 without one.
        kwargs: Of the strategy.

    Raises:
        MisconfigurationException: For options that make no sense; before training for data that have no such order.
    """

    def __init__(
        self, *args: Any, order: Order = "random_reshuffling", order_seed: int | None = None, **kwargs: Any
    ) -> None:
        if order not in ORDERS:
            raise MisconfigurationException(f"`order` must be one of {', '.join(ORDERS)}, got {order!r}.")
        if order_seed is not None and (isinstance(order_seed, bool) or not isinstance(order_seed, int)):
            raise MisconfigurationException(f"`order_seed` must be an int or None, got {order_seed!r}.")
        super().__init__(*args, **kwargs)
        self._order: Order = order
        self._order_seed = order_seed
        self._samplers: list[OrderSampler] = []
        self._set_up_after: object = self  # what held the loaders before those that are being set up
        self._shared_seed: int | None = None

    @property
    def order(self) -> Order:
        """How the samples of an epoch are drawn."""
        return self._order

    @property
    def order_seed(self) -> int:
        """Seed of the order: the one given, else that of ``seed_everything``, else 0; rank zero's in a fit."""
        if self._shared_seed is not None:
            return self._shared_seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._order_seed is None else self._order_seed

    def setup(self, trainer: Trainer) -> None:
        """Agree on a seed."""
        self._shared_seed = shared_seed(self, self._order_seed)
        super().setup(trainer)

    def process_dataloader(self, dataloader: object) -> object:
        """Give a training loader its order; others stay as they are."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.training:
            if trainer.overfit_batches:  # type: ignore[attr-defined]
                raise MisconfigurationException(
                    f"`overfit_batches` takes the first batches of the data set in its order, and the strategy draws "
                    f"`{self.order}`. Use `limit_train_batches` with this strategy, or `overfit_batches` with another."
                )
            before = _compat.previous_loaders(trainer)
            if before is not self._set_up_after:
                self._set_up_after, self._samplers = before, []
            dataloader, sampler = self._ordered(dataloader)
            self._samplers.append(sampler)
            self._begin(dataloader, len(self._samplers) - 1)
        return super().process_dataloader(dataloader)

    def on_train_start(self) -> None:
        """Go on where a resumed run stopped."""
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        _compat.repair_progress(trainer)
        loaders = _compat.training_loaders(trainer)
        self._samplers = [_sampler_of(loader) for loader in loaders]
        self._set_up_after = self
        # what asked for the loaders early has opened them where the run had not been restored yet
        opened = [sampler.place for sampler in self._samplers]
        for number, loader in enumerate(loaders):
            self._begin(loader, number)
        if [sampler.place for sampler in self._samplers] != opened or _compat.loader_states_are_due(trainer):
            _compat.reopen_loaders(trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """From here on, iterating a loader again is its next pass."""
        super().on_train_batch_start(batch, batch_idx)
        assert self.lightning_module is not None
        self._set_up_after = self
        for loader in _compat.training_loaders(self.lightning_module.trainer) if batch_idx == 0 else ():
            batches = getattr(loader, "batch_sampler", None)
            if isinstance(batches, ContinuedBatches) and batches.ignores_order:
                raise MisconfigurationException(
                    f"{type(batches.batches).__name__} makes its batches without asking its sampler for the order, "
                    "once and for all: let it iterate over `self.sampler` in `__iter__`."
                )
        if batch is not None:  # a step that takes batches from the iterator itself has not taken the first one yet
            for sampler in self._samplers:
                sampler.go_on()

    def _begin(self, loader: Any, number: int) -> None:
        """Let a loader begin with the batch that training goes on with."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        sampler = self._samplers[number]
        epoch, done = _compat.place(trainer)
        length = sized_len(loader)
        if _compat.has_own_state(loader):
            sampler.begin(number, epoch, 0, 0)
        elif length and _compat.cycles_loaders(trainer) and done < trainer.num_training_batches:
            sampler.begin(number, epoch, *divmod(done, length))
        else:
            sampler.begin(number, epoch, 0, done)

    def _ordered(self, loader: object) -> tuple[object, OrderSampler]:
        """A loader with the order, and its sampler."""
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                f"The training data is a {type(loader).__name__}, which has no order to choose. {_CURE}"
            )
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise MisconfigurationException(
                f"The samples of {type(dataset).__name__} come in an order of their own: without a length and indices "
                f"there is nothing to draw from. {_CURE}"
            )
        if isinstance(loader.batch_sampler, ContinuedBatches):  # Lightning gives loaders back that it has set up
            batches, loader = loader.batch_sampler.batches, copy.copy(loader)
            vars(loader)["batch_sampler"] = batches  # loaders forbid to set it
        batches = loader.batch_sampler
        own_batches = batches is not None and type(batches) is not BatchSampler
        found = getattr(batches, "sampler", None) if own_batches else loader.sampler
        members = _members(_compat.wrapped_sampler(found), len(dataset), self.order)
        assert self.lightning_module is not None
        if not _compat.shards_data(self.lightning_module.trainer) and not isinstance(found, DistributedSampler):
            raise MisconfigurationException(
                "With `use_distributed_sampler=False` it is not known whether the loader of each process has all "
                "samples or its own: leave it out, and give every process all samples; the order deals them out."
            )
        share: dict[str, int] = getattr(self, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        size = 1 if batches is None else getattr(batches, "batch_size", None)
        if self.order == "independent_batches":
            _check_batches(batches, size, share["num_replicas"], len(members))
        sampler = OrderSampler(
            members, self.order, self.order_seed, share["rank"], share["num_replicas"], size or 1, not own_batches
        )
        try:
            ordered = _compat.with_sampler(loader, sampler)
        except TypeError as error:
            raise MisconfigurationException(
                f"The order cannot be given to a {type(batches).__name__}: a batch sampler must take `sampler`, as "
                "PyTorch's own does, and be made in the `train_dataloader` hook if it needs more than that, "
                "`batch_size` and `drop_last`."
            ) from error
        if own_batches:
            _keep_arguments(batches, ordered.batch_sampler, found)
            vars(ordered)["batch_sampler"] = ContinuedBatches(ordered.batch_sampler, sampler)
        return ordered, sampler


def _sampler_of(loader: Any) -> OrderSampler:
    """The order of a training loader."""
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        if isinstance(sampler := getattr(holder, "sampler", None), OrderSampler):
            return sampler
    raise MisconfigurationException(
        "The training loaders were set up while the Trainer was not training, so that they have no order. Ask for "
        "`estimated_stepping_batches` in `configure_optimizers` or in a hook of training."
    )


def _members(sampler: Any, population: int, order: Order) -> Sequence[int]:
    """The samples that a loader's own sampler draws from, all with equal weight."""
    if isinstance(sampler, OrderSampler):  # of an earlier fit
        return sampler.members
    if type(sampler) is RandomSampler and sampler.replacement and order != "with_replacement":
        raise MisconfigurationException(
            f"The loader draws with replacement, and `{order}` would draw each sample once: leave out "
            "`RandomSampler(replacement=True)`, or use `with_replacement`."
        )
    if type(sampler) is SubsetRandomSampler and len(sampler.indices):
        return [int(i) for i in sampler.indices]
    if type(sampler) in (SequentialSampler, RandomSampler):
        whole = len(sampler) == len(sampler.data_source) == population
    else:
        whole = type(sampler) is DistributedSampler and len(sampler.dataset) == population  # type: ignore[arg-type]
    if not whole or not population:
        kind = f"a {type(sampler).__name__}" if isinstance(sampler, Sampler) else "no sampler that can be replaced"
        raise MisconfigurationException(
            f"The loader has {kind}, and `{order}` would lose what it does. Give the loader the data set alone "
            "(`Subset` for a part of it), or a `SubsetRandomSampler` for indices; or use another strategy."
        )
    return range(population)


def _check_batches(batches: Any, size: int | None, world_size: int, population: int) -> None:
    """Refuse independent batches where there are no batches, or larger ones than the data."""
    if batches is None or not size:
        raise MisconfigurationException(
            "Independent batches need the size of a batch: give the loader a `batch_size`, or its batch sampler an "
            "attribute of that name; or use `with_replacement`."
        )
    if size * world_size > population:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        raise MisconfigurationException(
            f"A batch of {size}{ranks} cannot be drawn from {population} samples without repeats: make it smaller, or "
            "use `with_replacement`."
        )


def _keep_arguments(before: Any, after: Any, sampler: Any) -> None:
    """Give a batch sampler that was made anew from its usual arguments the attributes that it had besides.

    Args:
        before: The batch sampler.
        after: The one made anew.
        sampler: The sampler that the old one drew from; what has to do with it is not kept.
    """
    if hasattr(before, "__pl_saved_args"):  # made from all of its arguments
        return
    vars(after).update({name: value for name, value in vars(before).items() if not _reaches(value, sampler)})


def _reaches(thing: Any, sampler: Any, depth: int = 3) -> bool:
    """Whether a sampler is found in an attribute, or the attribute is an iterator, which may draw from it."""
    if thing is sampler or isinstance(thing, Iterator):
        return True
    if depth == 0 or isinstance(thing, (str, bytes, Tensor, type)):
        return False
    if isinstance(thing, (list, tuple, set)):
        members: Any = thing if len(thing) <= 64 else ()
    elif isinstance(thing, dict):
        members = thing.values() if len(thing) <= 64 else ()
    else:
        members = vars(thing).values() if hasattr(thing, "__dict__") else ()
    return any(_reaches(member, sampler, depth - 1) for member in members)
