"""The loss that a LightningModule is trained on, as an objective: its own ``training_step``, muted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.cadence import check_positive_integer
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.callbacks.stand_ins import NullOptimizer, NullScheduler
from lightning_dynamics.objective import Engine, Objective, OutputFn, ParameterFilter
from lightning_dynamics.objective.copies import narrower, private_copy
from lightning_dynamics.objective.sandbox import Clones

# the function first, and without its return type: configuration files take anything else for a string
LossFn = Callable[[LightningModule, Any], Any] | str
"""A loss to measure instead of that of ``training_step``: the name of a method of the module that takes a batch, or a
function of module and batch. It returns a scalar tensor."""

WeightFn = Callable[[Any], float]
"""The weight of a batch in the mean over batches: the number of terms that its loss averages (tokens, graphs)."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which loss, on which data, in which parameters. Monitors that agree on all of it share its evaluation.

    Attributes:
        probe: The data.
        parameters: The measured parameters, see :data:`ParameterFilter`.
        loss_fn: See :data:`LossFn`; by default the loss of ``training_step``.
        weight_fn: See :data:`WeightFn`; by default the number of samples.
        mode: ``"train"`` keeps the training flags that the module trains with, ``"eval"`` sets all submodules to
            evaluation: another function.
        precision: ``"float32"`` computes at least in that, whatever the run does; ``"same"`` as the run does.
        noise_draws: Draws of the noise that the loss is averaged over.
        engine: See :data:`Engine`.
        output_fn: See :data:`OutputFn`; needed for Gauss-Newton and Fisher matrices.
    """

    probe: Probe = field(default_factory=Probe)
    parameters: ParameterFilter | None = None
    loss_fn: LossFn | None = None
    weight_fn: WeightFn | None = None
    mode: Literal["train", "eval"] = "train"
    precision: Literal["float32", "same"] = "float32"
    noise_draws: int = 1
    engine: Engine = "auto"
    output_fn: OutputFn | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", ("train", "eval")),
            ("precision", ("float32", "same")),
            ("engine", ("auto", "kept", "rebuilt")),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise MisconfigurationException(f"`{name}` must be one of {expected}, got {getattr(self, name)!r}.")
        check_positive_integer("noise_draws", self.noise_draws)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two objectives the same function."""
        where = tuple(self.parameters) if isinstance(self.parameters, list) else self.parameters
        return (
            self.probe.key,
            where,
            self.loss_fn,
            self.weight_fn,
            self.mode,
            self.precision,
            self.noise_draws,
            self.engine,
            self.output_fn,
        )


def lightning_objective(
    trainer: Trainer,
    module: LightningModule,
    options: ObjectiveOptions,
    items: Sequence[ProbeItem],
    *,
    values: Mapping[str, Tensor] | None = None,
    clones: Clones | None = None,
    least: torch.dtype | None = None,
    matrices: int = 1,
    epoch: int | None = None,
) -> Objective:
    """This rank's part of an objective.

    Args:
        trainer: The Trainer.
        module: Its module, not wrapped.
        options: What to measure.
        items: This rank's probe batches.
        values: Weights and buffers to evaluate at instead of the module's own.
        clones: Cache of large private tensors.
        least: The precision to compute in at least, whatever the options say; None for what they say.
        matrices: How many matrices will be measured, the Hessian included.
        epoch: What the step shall take for the current epoch, None for what the Trainer says.
    """
    narrow = "16" in str(trainer.precision_plugin.precision) or "transformer" in str(trainer.precision_plugin.precision)
    as_trained = options.precision == "same" and least is None
    dtype = None if as_trained else least or torch.float32
    loads = not all(item.is_ready for item in items)
    datamodule = _compat.transforming_datamodule(trainer) if loads else None
    step = _Step(trainer, module, options.loss_fn, dtype)
    objective = Objective(
        module,
        step,
        [(item.batch, item.index, item.is_ready) for item in items],
        weights=[_weight(item, options.weight_fn) for item in items],
        indices=[item.index for item in items],
        parameters=options.parameters,
        seed=options.probe.seed,
        noise_draws=options.noise_draws,
        training=None if options.mode == "train" else False,
        dtype=dtype,
        engine=options.engine,
        output_fn=_placed(options.output_fn, step),
        matrices=matrices,
        beside=[] if datamodule is None else [datamodule],
        keep=[part for part in step.kept() if part is not datamodule],
        replace=step.replaced(),
        overrides=step.overrides(epoch),
        values=values,
        clones=clones,
        # the plugin's context is autocast, or a default type narrower than float32, for the narrow precisions
        context=nullcontext if narrow and not as_trained else _step_context(trainer),
    )
    step.leaf_of, step.settle = objective.leaf_of, objective.settle
    return objective


def _placed(output_fn: OutputFn | None, step: _Step) -> OutputFn | None:
    """The user's function of module and batch, as a function of module and probe item."""
    if output_fn is None or isinstance(output_fn, str):
        return output_fn
    return lambda module, item: output_fn(module, step.ready(item))


def _step_context(trainer: Trainer) -> Callable[[], AbstractContextManager[Any]]:
    return trainer.precision_plugin.train_step_context


def _weight(item: ProbeItem, weight_fn: WeightFn | None) -> float:
    return item.weight if weight_fn is None or item.weight == 0 else float(weight_fn(item.batch))


class _Step:
    """Evaluates the module's step on a batch and returns its loss. Works only inside the sandbox that it describes."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, loss_fn: LossFn | None, dtype: torch.dtype | None
    ) -> None:
        self.leaf_of: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self.settle: Callable[[], None] = lambda: None
        self._trainer = trainer
        self._module = module
        self._loss_fn = loss_fn
        self._dtype = dtype
        self._backward: list[Tensor] = []

    def __call__(self, module: nn.Module, item: tuple[Any, int, bool]) -> Tensor | None:
        assert isinstance(module, LightningModule)
        batch, index = self.ready(item), item[1]
        self._backward.clear()
        if isinstance(self._loss_fn, str):
            return getattr(module, self._loss_fn)(batch)  # type: ignore[no-any-return]
        if self._loss_fn is not None:
            return self._loss_fn(module, batch)  # type: ignore[no-any-return]
        return self._loss_of(module, _call_step(module, batch, index // self._trainer.world_size))

    def ready(self, item: tuple[Any, int, bool]) -> Any:
        """The batch of a probe item as the training step receives it."""
        batch, _, is_ready = item
        if is_ready:
            return move_data_to_device(batch, self._module.device)
        # the precision plugin may narrow the batch, as it does in training
        return private_copy(_compat.ready_batch(self._trainer, self._module, batch), self._dtype)

    def kept(self) -> list[object]:
        """Objects that stay themselves: everything of the Trainer's."""
        return [*_compat.parts(self._trainer), *_compat.callbacks(self._trainer), *self._trainer.loggers]

    def replaced(self) -> list[tuple[object, object]]:
        """Optimizers and schedulers with their stand-ins."""
        real, wrapped = _compat.optimizer_lists(self._trainer)
        self._optimizers = [NullOptimizer(optimizer, lambda p: self.leaf_of(p)) for optimizer in real]
        pairs: list[tuple[object, object]] = []
        for stand_in, optimizer, wrapper in zip(self._optimizers, real, wrapped, strict=True):
            pairs += [(optimizer, stand_in), (wrapper, stand_in)]
        for config in self._trainer.strategy.lr_scheduler_configs:
            pairs.append((config.scheduler, NullScheduler(config.scheduler)))
        return pairs

    def overrides(self, epoch: int | None) -> list[tuple[object, str, Any]]:
        """Side channels of the module and the Trainer, closed."""
        trainer, strategy = self._trainer, self._trainer.strategy
        triples: list[tuple[object, str, Any]] = [
            (trainer, "profiler", PassThroughProfiler()),
            (trainer, _compat.LOGGERS, [_compat.DummyLogger()] if trainer.loggers else []),
            *((strategy, name, self._optimizers) for name in _compat.OPTIMIZERS),
            (strategy, "lr_scheduler_configs", _compat.scheduler_configs_with(trainer, NullScheduler)),
        ]
        if epoch is not None:
            triples += [(_compat.epoch_tracker(trainer), name, epoch) for name in _compat.EPOCH]
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

    def _manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._backward.append(loss)
        self.settle()
        # the rest of the step may look at gradients: those of the private leaves
        torch.autograd.backward(loss, *args, **{**kwargs, "retain_graph": True})

    def _loss_of(self, module: LightningModule, output: Any) -> Tensor | None:
        if not module.automatic_optimization:
            if len(self._backward) == 1:
                return self._backward[0]
            if self._backward:
                raise ValueError(
                    f"`training_step` called `manual_backward` on {len(self._backward)} losses, so there is no one "
                    "loss to measure. Say which with `loss_fn=`: a function of module and batch, or a method's name."
                )
            raise ValueError(
                "`training_step` called `manual_backward` on no loss. Use `self.manual_backward(loss)` instead of "
                "`loss.backward()`, or say what to measure with `loss_fn=`."
            )
        if isinstance(output, Mapping):
            if "loss" not in output:
                raise ValueError("`training_step` returned a dict without the key 'loss'.")
            output = output["loss"]
        return output  # type: ignore[no-any-return]


def _call_step(module: LightningModule, batch: Any, index: int) -> Any:
    step = module.training_step
    if _compat.is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        return step(iter([(batch, index, 0)]))
    if _compat.is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return step(batch, index)
    return step(batch)


def _nothing(*_: Any, **__: Any) -> None:
    pass
