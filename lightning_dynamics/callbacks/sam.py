"""What sharpness-aware minimization does to a step: the gap, the angle, the length of the perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.cadence import Cadence
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.sam_table import sam_table
from lightning_dynamics.recording.quantity import QuantityTable
from lightning_dynamics.strategies import SAMMixin, SAMStep

_EVERY = 10  # steps between points


class SAMMonitor(DynamicsMonitor[None]):
    """Shows what sharpness-aware minimization (SAM) does: how much higher the loss is uphill, and where it points.

    The numbers are by-products of the two evaluations that SAM's step makes anyway, on the step's own batches. A point
    at x is about the step that is taken from there. On several processes the values are means over them.

    For a Trainer whose strategy is SAM: ``Trainer(strategy="sam")``, ``"ddp_sam"``, or one from
    :func:`~lightning_dynamics.compose_strategy`. With several optimizers, a point is about the last step of the batch
    that was perturbed. A step that was not perturbed (ρ = 0, a gradient that is not finite, a step of LookSAM without a
    second gradient) has a record that says so, and no values: with ``every_k`` let the cadence be a multiple of it.

    Args:
        every_n_train_steps: Steps between points; by default 10.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        also_log: Which of the numbers that stand in the record go to the loggers as well: regular expressions for whole
            keys without their first part, such as ``"rho"``; ``".*"`` for all.
        monitor: Let ``EarlyStopping`` and ``ModelCheckpoint`` monitor the logged keys.
        name: Tells apart two of these in one Trainer; keys then begin with ``sam_<name>/``.

    Logs:
        - ``sam/sharpness_gap``: L(w + e) - L(w), in units of the loss.
        - ``sam/gradient_cosine``: of the gradients at w and at w + e.
        - ``sam/perturbation_norm``: ‖e‖.

        Each record also holds ``rho`` and ``gradient_norm``, the norm of the gradient that perturbs.

    Cost:
        At a point one copy of the gradient and three reads of it; no evaluation of the module. Memory: that copy,
        during the step.

    Example:
        >>> from lightning_dynamics import SAMMonitor
        >>> monitor = SAMMonitor(every_n_train_steps=50, also_log="rho")
    """

    awaits_step = True

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        log_spaced: bool = False,
        also_log: str | Sequence[str] = (),
        monitor: bool = False,
        name: str | None = None,
    ) -> None:
        self._table = sam_table(name)
        cadence = Cadence(every_n_train_steps, every_n_epochs, log_spaced)
        super().__init__(
            Cadence(_EVERY) if cadence.is_open else cadence,
            None,
            pair=False,
            also_log=also_log,
            monitor=monitor,
            name=name,
        )
        self._before: SAMStep | None = None

    @property
    def table(self) -> QuantityTable:
        return self._table

    @property
    def is_for_shards(self) -> bool:
        return True

    def gradients_per_point(self, module: LightningModule) -> float:
        return 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _sam(trainer)

    def step_begins(self, trainer: Trainer) -> None:
        strategy = _sam(trainer)
        self._before = strategy.last_step
        strategy.observed = True

    def step_ends(self, trainer: Trainer) -> dict[str, float] | str:
        """This rank's values of the step, or why there are none."""
        strategy = _sam(trainer)
        strategy.observed = False
        before, self._before = self._before, None
        step = strategy.last_step
        if step is None or step is before:
            return _unperturbed(strategy)
        values = {
            "sharpness_gap": step.sharpness_gap,
            "gradient_cosine": step.gradient_cosine,
            "perturbation_norm": step.perturbation_norm,
            "rho": step.rho,
            "gradient_norm": step.gradient_norm,
        }
        return {key: value for key, value in values.items() if value is not None}

    def measure(self, point: Point[None]) -> Measured:
        reasons = [seen for seen in point.seen if isinstance(seen, str)]
        if reasons:
            return Measured({}, notes={"no_values": reasons[0]})
        keys = [key for key in point.seen[0] if all(key in seen for seen in point.seen)]
        means = {key: sum(seen[key] for seen in point.seen) / len(point.seen) for key in keys}
        notes = {"ranks": len(point.seen)} if len(point.seen) > 1 else {}
        return Measured({f"{self.table.family}/{key}": value for key, value in means.items()}, notes=notes)

    def replay(self, *args: Any) -> NoReturn:
        raise NotImplementedError("measures no data of its own")


def _sam(trainer: Trainer) -> SAMMixin:
    """The Trainer's strategy.

    Raises:
        MisconfigurationException: If it is not SAM.
    """
    if not isinstance(trainer.strategy, SAMMixin):
        raise MisconfigurationException(
            f"SAMMonitor shows what SAM does, and the Trainer's strategy is {type(trainer.strategy).__name__}. Use "
            "`Trainer(strategy='sam')`, on several processes 'ddp_sam', or `compose_strategy`; or leave SAMMonitor out."
        )
    return trainer.strategy


def _unperturbed(strategy: SAMMixin) -> str:
    if strategy.rho == 0:
        return "the weights are not perturbed: ρ is 0"
    looks = f"a step without a second gradient (`every_k={strategy.every_k}`), " if strategy.every_k > 1 else ""
    return f"the weights were not perturbed: {looks}ρ = 0, no loss, or a gradient that is not finite"
