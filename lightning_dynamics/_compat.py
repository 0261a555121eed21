"""Every private name of Lightning that this package uses, in one place; a test imports and exercises them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from torch.utils.data import DataLoader

__all__ = [
    "DummyLogger",
    "at_batch",
    "batch_number",
    "callbacks",
    "curve_step",
    "cycles_loaders",
    "do_nothing_closure",
    "ends_step",
    "epoch_tracker",
    "expose_metrics",
    "has_own_state",
    "is_overridden",
    "is_param_in_hook_signature",
    "is_trial",
    "loader_states_are_due",
    "only_collects_statistics",
    "optimizer_lists",
    "other_results",
    "parts",
    "place",
    "previous_loaders",
    "ready_batch",
    "reopen_loaders",
    "repair_progress",
    "rewind_epoch",
    "scheduler_configs_with",
    "set_root_device",
    "shards_data",
    "step_trackers",
    "training_loaders",
    "transforming_datamodule",
    "validation_loaders",
    "with_sampler",
    "wrapped_sampler",
]

LOGGERS = "_loggers"
"""Attribute of the Trainer that holds its loggers."""

OPTIMIZERS = ("_optimizers", "_lightning_optimizers")
"""Attributes of the strategy that hold the optimizers, bare and wrapped."""

EPOCH = ("processed", "completed")
"""Attributes of :func:`epoch_tracker`."""

STEPS = "completed"
"""Attribute of :func:`step_trackers`."""

DTYPE = "_dtype"
"""Attribute of a LightningModule that holds what it answers to ``self.dtype``."""

CURRENT_HOOK = "_current_fx_name"
"""Attribute of a LightningModule that names the hook it is in."""


def curve_step(trainer: Trainer) -> int:
    """The x of the user's own curves: batches that stepped, whatever the number of optimizers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def ends_step(trainer: Trainer) -> bool:
    """Whether the running batch completes an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def batch_number(trainer: Trainer) -> int:
    """Number of the running batch within its epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_idx)


@contextmanager
def at_batch(trainer: Trainer, number: int) -> Iterator[None]:
    """With another batch of the epoch as the running one."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    before = progress.ready
    progress.ready = number + 1
    try:
        yield
    finally:
        progress.ready = before


def callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in their order."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


@contextmanager
def other_results(trainer: Trainer) -> Iterator[None]:
    """With another place for what modules log, which is thrown away."""
    loop = trainer.fit_loop.epoch_loop
    before = loop._results
    loop._results = _ResultCollection(training=True)
    try:
        yield
    finally:
        loop._results = before


def parts(trainer: Trainer) -> list[object]:
    """The Trainer and what belongs to it, which a module may hold references to."""
    found = [
        trainer,
        trainer.strategy,
        trainer.fit_loop,
        getattr(trainer, "datamodule", None),
        trainer._logger_connector,
        trainer._data_connector,
    ]
    return [part for part in found if part is not None]


def transforming_datamodule(trainer: Trainer) -> object | None:
    """The data module, if it has a hand in what becomes of a batch after the loader."""
    module = getattr(trainer, "datamodule", None)
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return module if module is not None and any(is_overridden(hook, module) for hook in hooks) else None


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which writes nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def training_loaders(trainer: Trainer) -> list[Any]:
    """The training loaders as Lightning iterates them, flattened."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The validation loaders as Lightning iterates them, flattened; none before they are set up."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def optimizer_lists(trainer: Trainer) -> tuple[list[Any], list[Any]]:
    """The strategy's optimizers and their Lightning wrappers, in the same order."""
    strategy = trainer.strategy
    return list(strategy.optimizers), list(strategy._lightning_optimizers)


def scheduler_configs_with(trainer: Trainer, stand_in: Any) -> list[Any]:
    """Copies of the scheduler configurations with ``stand_in(scheduler)`` for each scheduler."""
    return [replace(config, scheduler=stand_in(config.scheduler)) for config in trainer.strategy.lr_scheduler_configs]


def only_collects_statistics(trainer: Trainer) -> bool:
    """Whether this epoch changes no weights: stochastic weight averaging lets batch norm see the averaged ones."""
    return bool(trainer.fit_loop._skip_backward)


def epoch_tracker(trainer: Trainer) -> object:
    """The object with the attribute that the Trainer calls its current epoch: one of :data:`EPOCH`, by version."""
    return trainer.fit_loop.epoch_progress.current


def set_root_device(strategy: SingleDeviceStrategy, device: torch.device) -> None:
    """Give a strategy for one device another device than it was made for."""
    strategy._root_device = device


def shards_data(trainer: Trainer) -> bool:
    """Whether Lightning deals the training samples out to the processes, or there is only one."""
    return trainer.world_size == 1 or bool(trainer._accelerator_connector.use_distributed_sampler)


def step_trackers(trainer: Trainer, step: int) -> list[tuple[object, int]]:
    """Where the Trainer counts optimizer steps, with the count at which its global step is ``step``."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        return [(loop.automatic_optimization.optim_progress.optimizer.step.total, step)]
    return [(loop.manual_optimization.optim_step_progress.total, step)]


def expose_metrics(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Make values visible to ``EarlyStopping`` and ``ModelCheckpoint`` without logging them."""
    metrics = trainer._logger_connector._callback_metrics
    metrics.update({key: torch.tensor(value) for key, value in values.items()})


def ready_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Do to a batch from a loader what Lightning does before its training hooks: convert, transfer, augment."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def previous_loaders(trainer: Trainer) -> object | None:
    """What held the training loaders before they were set up again; the same until all of them are."""
    return trainer.fit_loop._combined_loader


def cycles_loaders(trainer: Trainer) -> bool:
    """Whether the shorter ones of several training loaders begin again within an epoch."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and combined._mode == "max_size_cycle"


def has_own_state(loader: object) -> bool:
    """Whether a loader itself goes on where the run was interrupted."""
    return isinstance(loader, _Stateful)


def with_sampler(loader: DataLoader[Any], sampler: Iterable[int]) -> DataLoader[Any]:
    """The same loader with another sampler, in a batch sampler of the same kind."""
    return _update_dataloader(loader, sampler)


def wrapped_sampler(sampler: object) -> Any:
    """The user's sampler, without the wrapper that Lightning puts around one for several processes."""
    if isinstance(sampler, DistributedSamplerWrapper):
        inside: Any = sampler.dataset
        return inside._sampler
    return sampler


def place(trainer: Trainer) -> tuple[int, int]:
    """Epoch of the batch that training goes on with, and the batches of that epoch that are over.

    Final from ``on_train_start`` on, up to the first batch.
    """
    loop = trainer.fit_loop.epoch_loop
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = loop.batch_progress.current
    return int(epochs.processed), int(batches.completed) + _saved_after_batch(batches) if loop.restarting else 0


def repair_progress(trainer: Trainer) -> None:
    """Let a resumed run go on after the last batch whose step was made; called in ``on_train_start``.

    Lightning before 2.5 repeats the batch at whose end a checkpoint was written. After a checkpoint from the end of an
    epoch, every version begins the next epoch halfway: without its start hook if it was written at the end of the last
    batch, and with a batch too many if ``max_steps`` is set.
    """
    loop = trainer.fit_loop.epoch_loop
    epochs: Any = trainer.fit_loop.epoch_progress.total
    if not loop.restarting:
        return
    batches = loop.batch_progress
    saved = _saved_after_batch(batches.current)
    if saved and batches.current.completed + 1 >= trainer.num_training_batches:
        loop._batches_that_stepped += 1
        batches.increment_completed()
        _begin_epoch(trainer, epochs.ready)
    elif epochs.started == epochs.processed:
        if 0 < batches.current.completed < trainer.num_training_batches:  # `max_steps` ended it before its last batch
            _reenter_epoch(trainer)
        else:
            _begin_epoch(trainer, epochs.processed)
    elif saved and not hasattr(loop, "restarted_on_train_batch_end"):
        assert trainer.fit_loop._data_fetcher is not None
        # a validation that is due comes first, and counts the step after it
        if not loop._should_accumulate() and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            loop._batches_that_stepped += 1
        batches.increment_completed()


def rewind_epoch(trainer: Trainer) -> None:
    """Let a resumed run begin the epoch anew in which it was interrupted; called in ``on_train_start``."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    for name in vars(batches.total):
        setattr(batches.total, name, getattr(batches.total, name) - getattr(batches.current, name))
    _begin_epoch(trainer, epochs.processed)


def loader_states_are_due(trainer: Trainer) -> bool:
    """Whether loaders with a state of their own wait for it: they were set up before the run was restored."""
    return bool(trainer.fit_loop.restarting and trainer.fit_loop._combined_loader_states_to_load)


def reopen_loaders(trainer: Trainer) -> None:
    """Begin the iteration over the training loaders again; those with a state of their own keep it."""
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    assert loop._data_fetcher is not None
    if loop.epoch_loop.restarting:
        loop._combined_loader._load_state_dicts(
            loop._combined_loader_states_to_load or loop._combined_loader._state_dicts()
        )
    loop._combined_loader_states_to_load = []
    iter(loop._data_fetcher)


def _saved_after_batch(batches: Any) -> bool:
    """Whether a checkpoint was written in ``on_train_batch_end``, when the batch did not count as completed yet."""
    return bool(batches.ready == batches.started == batches.processed == batches.completed + 1)


def _reenter_epoch(trainer: Trainer) -> None:
    """Put the loops where they are within an epoch that was counted as over."""
    loop = trainer.fit_loop
    trackers: tuple[Any, Any] = loop.epoch_progress.total, loop.epoch_progress.current
    knows_stages = hasattr(loop, "_restart_stage")
    number = trackers[0].started - 1  # Lightning before 2.5 has set the others back
    for epochs in trackers:
        epochs.processed = epochs.completed = number
        if not knows_stages:  # it counts the epoch when it goes on
            epochs.ready = epochs.started = number
    if knows_stages:
        loop._restart_stage = "restarted_mid_epoch"


def _begin_epoch(trainer: Trainer, number: int) -> None:
    """Put the loops where they are between two epochs."""
    loop = trainer.fit_loop
    trackers: tuple[Any, Any] = loop.epoch_progress.total, loop.epoch_progress.current
    for epochs in trackers:
        epochs.ready = epochs.started = epochs.processed = epochs.completed = number
    loop.epoch_loop.batch_progress.reset_on_run()
    loop._restarting = False  # its setter would not, where `max_steps` is set
    loop.epoch_loop.restarting = False
    for part in (loop, loop.epoch_loop):
        if hasattr(part, "reset_restart_stage"):
            part.reset_restart_stage()
