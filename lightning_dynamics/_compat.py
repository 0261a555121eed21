"""Every private name of Lightning that this package uses, in one place; a test imports and exercises them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = [
    "DummyLogger",
    "batch_number",
    "callbacks",
    "curve_step",
    "ends_step",
    "epoch_tracker",
    "expose_metrics",
    "is_overridden",
    "is_param_in_hook_signature",
    "is_trial",
    "only_collects_statistics",
    "optimizer_lists",
    "parts",
    "ready_batch",
    "scheduler_configs_with",
    "step_trackers",
    "training_loaders",
    "transforming_datamodule",
    "validation_loaders",
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


def callbacks(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in their order."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


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
