"""A LightningModule as it is run during a measurement: as in training, with every way to the outside closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.callbacks.stand_ins import NullOptimizer, NullScheduler
from lightning_dynamics.objective.copies import narrower, private_copy
from lightning_dynamics.objective.sandbox import Clones

Item = tuple[Any, int, bool]
"""A probe batch, its number, and whether it already was converted, transferred and augmented."""


@dataclass(frozen=True)
class ReplayOptions:
    """On which data a module is run, and how. Monitors that agree on all of it share its runs.

    Attributes:
        probe: The data.
        mode: ``"train"`` keeps the training flags that the module trains with, ``"eval"`` sets all submodules to
            evaluation: another function.
        precision: ``"float32"`` computes at least in that, whatever the run does; ``"same"`` as the run does.
    """

    probe: Probe = field(default_factory=Probe)
    mode: Literal["train", "eval"] = "train"
    precision: Literal["float32", "same"] = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.probe, Probe):
            raise MisconfigurationException(f"`probe` must be a Probe, got {self.probe!r}.")
        check_choice("mode", self.mode, ("train", "eval"))
        check_choice("precision", self.precision, ("float32", "same"))

    @property
    def probes(self) -> list[Probe]:
        """All data that is needed, the main probe first."""
        return [self.probe]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two monitors' runs the same."""
        return (type(self).__name__, tuple(probe.key for probe in self.probes), self.mode, self.precision)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse anything but one of these strings."""
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise MisconfigurationException(f"`{name}` must be one of {expected}, got {value!r}.")


@dataclass(frozen=True)
class Circumstances:
    """What else a run depends on, besides the options.

    Attributes:
        values: Weights and buffers to run at instead of the module's own.
        clones: Cache of large private tensors.
        least: The precision to compute in at least, whatever the options say; None for what they say.
        epoch: What the step shall take for the current epoch, None for what the Trainer says.
        global_step: The same of its global step.
        pieces: Consecutive batches that make one mini-batch.
        is_step: Whether the batches are those of one step, which Lightning accumulates with equal weights.
    """

    values: Mapping[str, Tensor] | None = None
    clones: Clones | None = None
    least: torch.dtype | None = None
    epoch: int | None = None
    global_step: int | None = None
    pieces: int = 1
    is_step: bool = False


class ModuleRun:
    """How the parts of a LightningModule are run. Works only inside the sandbox that :meth:`arguments` describes.

    Args:
        trainer: The Trainer.
        module: Its module, not wrapped.
        options: What to measure on.
        circumstances: What else there is to know.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, options: ReplayOptions, circumstances: Circumstances
    ) -> None:
        self.leaf_of: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self._trainer = trainer
        self._module = module
        self._options = options
        self._circumstances = circumstances
        self._as_trained = options.precision == "same" and circumstances.least is None
        self._dtype = None if self._as_trained else circumstances.least or torch.float32

    def arguments(self, items: Sequence[ProbeItem]) -> dict[str, Any]:
        """How the module is to be run on these batches: arguments of :class:`Replay` besides module and batches."""
        trainer, precision = self._trainer, str(self._trainer.precision_plugin.precision)
        narrow = "16" in precision or "transformer" in precision
        loads = not all(item.is_ready for item in items)
        datamodule = _compat.transforming_datamodule(trainer) if loads else None
        return {
            "weights": [item.weight for item in items],
            "indices": [item.index for item in items],
            "seed": self._options.probe.seed,
            "training": None if self._options.mode == "train" else False,
            "dtype": self._dtype,
            "beside": [] if datamodule is None else [datamodule],
            "keep": [part for part in self._kept() if part is not datamodule],
            "replace": self._replaced(),
            "overrides": self._overrides(),
            "values": self._circumstances.values,
            "clones": self._circumstances.clones,
            # the plugin's context is autocast, or a default type narrower than float32, for the narrow precisions
            "context": nullcontext if narrow and not self._as_trained else trainer.precision_plugin.train_step_context,
        }

    def ready(self, item: Item, validates: bool = False) -> Any:
        """The batch of a probe item as the step receives it, that of training or that of validation."""
        batch, _, is_ready = item
        if is_ready:
            return move_data_to_device(batch, self._module.device)
        state = self._trainer.state
        stage = state.stage
        try:
            if validates:  # hooks that augment ask for the stage
                state.stage = RunningStage.VALIDATING
            # the precision plugin may narrow the batch, as it does in training
            return private_copy(_compat.ready_batch(self._trainer, self._module, batch), self._dtype)
        finally:
            state.stage = stage

    def _kept(self) -> list[object]:
        """Objects that stay themselves: everything of the Trainer's."""
        return [*_compat.parts(self._trainer), *_compat.callbacks(self._trainer), *self._trainer.loggers]

    def _replaced(self) -> list[tuple[object, object]]:
        """Optimizers and schedulers with their stand-ins."""
        real, wrapped = _compat.optimizer_lists(self._trainer)
        self._optimizers = [NullOptimizer(optimizer, lambda p: self.leaf_of(p)) for optimizer in real]
        pairs: list[tuple[object, object]] = []
        for stand_in, optimizer, wrapper in zip(self._optimizers, real, wrapped, strict=True):
            pairs += [(optimizer, stand_in), (wrapper, stand_in)]
        for config in self._trainer.strategy.lr_scheduler_configs:
            pairs.append((config.scheduler, NullScheduler(config.scheduler)))
        return pairs

    def _overrides(self) -> list[tuple[object, str, Any]]:
        """Side channels of the module and the Trainer, closed."""
        trainer, strategy = self._trainer, self._trainer.strategy
        triples: list[tuple[object, str, Any]] = [
            (trainer, "profiler", PassThroughProfiler()),
            (trainer, _compat.LOGGERS, [_compat.DummyLogger()] if trainer.loggers else []),
            *((strategy, name, self._optimizers) for name in _compat.OPTIMIZERS),
            (strategy, "lr_scheduler_configs", _compat.scheduler_configs_with(trainer, NullScheduler)),
        ]
        epoch = self._circumstances.epoch
        if epoch is not None:
            triples += [(_compat.epoch_tracker(trainer), name, epoch) for name in _compat.EPOCH]
        step = self._circumstances.global_step
        if step is not None:
            triples += [(tracker, _compat.STEPS, steps) for tracker, steps in _compat.step_trackers(trainer, step)]
        silent = ("log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
        for submodule in self._module.modules():
            if isinstance(submodule, LightningModule):
                triples += [(submodule, name, _nothing) for name in silent]
                triples += [
                    (submodule, "optimizers", self._stand_ins),
                    (submodule, "manual_backward", self._manual_backward),
                    (submodule, _compat.CURRENT_HOOK, "training_step"),
                ]
                own = submodule.dtype
                if self._dtype is not None and isinstance(own, torch.dtype) and narrower(own, self._dtype):
                    triples.append((submodule, _compat.DTYPE, self._dtype))
        return triples

    def _stand_ins(self, use_pl_optimizer: bool = True) -> Any:
        return self._optimizers[0] if len(self._optimizers) == 1 else self._optimizers

    def _settle(self, loss: Tensor) -> None:
        """A loss has been computed, and the step is about to differentiate it."""

    def _manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._settle(loss)
        # the rest of the step may look at gradients: those of the private leaves
        torch.autograd.backward(loss, *args, **{**kwargs, "retain_graph": True})


def _nothing(*_: Any, **__: Any) -> None:
    pass
