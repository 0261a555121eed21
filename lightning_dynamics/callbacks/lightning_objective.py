"""The loss that a LightningModule is trained on, as an objective: its own ``training_step``, muted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.cadence import check_positive_integer
from lightning_dynamics.callbacks.lightning_replay import Circumstances, Item, ModuleRun, ReplayOptions, check_choice
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.objective import Engine, Objective, OutputFn, ParameterFilter
from lightning_dynamics.objective.samples import slices

# the function first, and without its return type: configuration files take anything else for a string
LossFn = Callable[[LightningModule, Any], Any] | str
"""A loss to measure instead of that of ``training_step``: the name of a method of the module that takes a batch, or a
function of module and batch. It returns a scalar tensor."""

WeightFn = Callable[[Any], float]
"""The weight of a batch in the mean over batches: the number of terms that its loss averages (tokens, graphs)."""


@dataclass(frozen=True)
class ObjectiveOptions(ReplayOptions):
    """Which loss, on which data, in which parameters.

    Attributes:
        parameters: The measured parameters, see :data:`ParameterFilter`.
        loss_fn: See :data:`LossFn`; by default the loss of ``training_step``.
        weight_fn: See :data:`WeightFn`; by default the number of samples.
        noise_draws: Draws of the noise that the loss is averaged over.
        engine: See :data:`Engine`.
        output_fn: See :data:`OutputFn`; needed for Gauss-Newton and Fisher matrices.
    """

    parameters: ParameterFilter | None = None
    loss_fn: LossFn | None = None
    weight_fn: WeightFn | None = None
    noise_draws: int = 1
    engine: Engine = "auto"
    output_fn: OutputFn | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("engine", self.engine, ("auto", "kept", "rebuilt"))
        check_positive_integer("noise_draws", self.noise_draws)

    @property
    def key(self) -> tuple[Any, ...]:
        where = tuple(self.parameters) if isinstance(self.parameters, list) else self.parameters
        return (
            *super().key,
            where,
            self.loss_fn,
            self.weight_fn,
            self.noise_draws,
            self.engine,
            self.output_fn,
        )


def lightning_objective(
    trainer: Trainer,
    module: LightningModule,
    options: ObjectiveOptions,
    items: Sequence[ProbeItem],
    circumstances: Circumstances,
    matrices: int = 1,
) -> Objective:
    """This rank's part of an objective.

    Args:
        trainer: The Trainer.
        module: Its module, not wrapped.
        options: What to measure.
        items: This rank's probe batches.
        circumstances: What else there is to know.
        matrices: How many matrices will be measured, the Hessian included.
    """
    step = _Step(trainer, module, options, circumstances)
    how = step.arguments(items)
    how["weights"] = [1.0 if circumstances.is_step else _weight(item, options.weight_fn) for item in items]
    objective = Objective(
        module,
        step,
        [(item.batch, item.index, item.is_ready) for item in items],
        parameters=options.parameters,
        output_fn=_placed(options.output_fn, step),
        matrices=matrices,
        pieces=circumstances.pieces,
        samples_of=step.samples,
        noise_draws=options.noise_draws,
        engine=options.engine,
        **how,
    )
    step.leaf_of, step.settle = objective.leaf_of, objective.settle
    return objective


def _placed(output_fn: OutputFn | None, step: _Step) -> OutputFn | None:
    """The user's function of module and batch, as a function of module and probe item."""
    if output_fn is None or isinstance(output_fn, str):
        return output_fn
    return lambda module, item: output_fn(module, step.ready(item))


def _weight(item: ProbeItem, weight_fn: WeightFn | None) -> float:
    return item.weight if weight_fn is None or item.weight == 0 else float(weight_fn(item.batch))


class _Step(ModuleRun):
    """Evaluates the module's step on a batch and returns its loss."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, options: ObjectiveOptions, circumstances: Circumstances
    ) -> None:
        super().__init__(trainer, module, options, circumstances)
        self.settle: Callable[[], None] = lambda: None
        self._loss_fn = options.loss_fn
        self._backward: list[Tensor] = []

    def __call__(self, module: nn.Module, item: Item) -> Tensor | None:
        assert isinstance(module, LightningModule)
        batch, index = self.ready(item), item[1]
        self._backward.clear()
        if isinstance(self._loss_fn, str):
            return getattr(module, self._loss_fn)(batch)  # type: ignore[no-any-return]
        if self._loss_fn is not None:
            return self._loss_fn(module, batch)  # type: ignore[no-any-return]
        return self._loss_of(module, _call_step(module, batch, index // self._trainer.world_size))

    def samples(self, item: Item) -> list[Item]:
        """A probe item's samples, each as an item of its own, ready for the step."""
        return [(sample, item[1], True) for sample in slices(self.ready(item))]

    def _settle(self, loss: Tensor) -> None:
        self._backward.append(loss)
        self.settle()

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
