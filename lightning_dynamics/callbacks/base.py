"""What every monitor is: a cadence, an objective, a table of quantities, and one pure function."""

from __future__ import annotations

import os
import re
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_dynamics.callbacks.cadence import Cadence, check_flag
from lightning_dynamics.callbacks.following import Follower
from lightning_dynamics.callbacks.joint import RankPart
from lightning_dynamics.callbacks.lightning_replay import Circumstances, ReplayOptions
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.measured import Measured, Point, Subject
from lightning_dynamics.callbacks.probe import Probe, ProbeData
from lightning_dynamics.metrics import StabilityRule
from lightning_dynamics.objective.replay import Replay
from lightning_dynamics.recording.quantity import QuantityTable
from lightning_dynamics.recording.reading import Run, load_runs, read_records
from lightning_dynamics.recording.record import Record, new_name

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class DynamicsMonitor(Callback, Generic[Subject]):
    """A callback that measures how training moves and leaves training as it was.

    A subclass says what it measures on (:attr:`part`, :meth:`replay`), gives a table of quantities and :meth:`measure`,
    a function of a :class:`Point`; when to call it, on which data, on which ranks, and what becomes of the numbers is
    the session's business, which all monitors of a Trainer share.

    Args:
        cadence: When to measure.
        options: What to measure it on; None for a monitor that needs no data.
        pair: Whether to measure two consecutive steps each time and log their mean.
        detail: When to measure in detail as well: what is too dear for every point. None for never.
        also_log: Keys that go to the loggers besides those on by default, without the family: regular expressions for
            whole keys.
        monitor: Whether ``EarlyStopping`` and ``ModelCheckpoint`` may monitor the logged keys.
        name: Tells apart two monitors of a kind; it becomes part of the keys.
    """

    part: ClassVar[type[RankPart[Any]]]
    """What a rank does when the monitor measures on data."""

    follower: Follower | None = None
    """What it does at every step, if anything."""

    awaits_step = False
    """Whether a point is completed once the step from it has been taken: see :meth:`measure_update`, and for monitors
    that need no data :attr:`is_of_step`."""

    detail_name = "in detail"
    """What is measured in detail, in words."""

    detail_option = ""
    """How a user asks for measurements in detail."""

    def __init__(
        self,
        cadence: Cadence,
        options: ReplayOptions | None,
        *,
        pair: bool,
        monitor: bool,
        name: str | None,
        detail: Cadence | None = None,
        also_log: str | Sequence[str] = (),
    ) -> None:
        for option, value in (("pair", pair), ("monitor", monitor)):
            check_flag(option, value)
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise MisconfigurationException(
                f"`name` must be made of letters, digits, '_' and '-', since it becomes part of the keys; got {name!r}."
            )
        self.cadence = cadence
        self.options: ReplayOptions | None = options
        self.pair = pair
        self.detail = detail
        self.monitor = monitor
        self.name = name
        self._also_log = compiled_patterns("also_log", also_log)
        for pattern in self._also_log:
            if not any(_may_match(pattern, q.key, q.per_layer) for q in self.table.quantities):
                keys = ", ".join(q.name for q in self.table.quantities)
                raise MisconfigurationException(f"`also_log={pattern.pattern!r}` matches no key; there are: {keys}.")
        self._session: Any = None
        self._restored: dict[str, Any] | None = None
        self._home = os.getpid()
        self._token = new_name()

    @property
    def variant(self) -> str | None:
        """What tells it apart from others of its kind in one Trainer."""
        return self.name

    @property
    def has_open_detail(self) -> bool:
        """Whether measurements in detail are wanted, at times that have to be found."""
        return self.detail is not None and self.detail.is_open

    @property
    def label(self) -> str:
        """What the monitor is called in records and messages."""
        kind = type(self).__name__
        return kind if self.variant is None else f"{kind}[{self.variant}]"

    @property
    def state_key(self) -> str:
        return super().state_key if self.variant is None else f"{super().state_key}[{self.variant}]"

    @property
    @abstractmethod
    def table(self) -> QuantityTable:
        """The quantities, under the family that this monitor's keys begin with."""

    @abstractmethod
    def gradients_per_point(self, module: LightningModule) -> float:
        """Gradients on the probe that one point costs, as much as is known of the module before the first step."""

    def gradients_in_detail(self, module: LightningModule) -> float:
        """Gradients on the probe that a measurement in detail costs beyond a point."""
        return 0.0

    @property
    def vectors_held(self) -> int:
        """Vectors of the size of the parameters that a measurement holds at most, besides the gradient graphs."""
        return 0

    @property
    def probes(self) -> list[Probe]:
        """The data that it needs."""
        return [] if self.options is None else self.options.probes

    @property
    def is_of_step(self) -> bool:
        """Whether a point is about nothing but the step that is taken from it: :meth:`measure` comes after the step."""
        return self.awaits_step and self.options is None

    @property
    def is_for_shards(self) -> bool:
        """Whether it measures weights that are sharded over processes."""
        return False

    def measures_on_data(self, in_detail: bool) -> bool:
        """Whether a point is measured on the data, or needs none: then :attr:`Point.subject` is None."""
        return self.options is not None

    def adopt(self, others: Sequence[DynamicsMonitor[Any]]) -> None:
        """Take from the Trainer's monitors what is to be shared with them; called when a fit starts."""

    def measured_parameters(self, module: LightningModule) -> dict[str, nn.Parameter]:
        """The parameters that the measurement is about, as far as they are known; none where it is about others."""
        return {}

    @abstractmethod
    def replay(
        self,
        trainer: Trainer,
        module: LightningModule,
        items: Sequence[Sequence[ProbeItem]],
        circumstances: Circumstances,
        sharing: Sequence[DynamicsMonitor[Any]],
    ) -> Replay:
        """This rank's part of what is measured on.

        Args:
            trainer: The Trainer.
            module: Its module, not wrapped.
            items: This rank's batches of each of the probes.
            circumstances: What else there is to know.
            sharing: All monitors that agree in their options.
        """

    def step_begins(self, trainer: Trainer) -> None:
        """The step that a point is about begins, where :attr:`is_of_step`. Called on every rank."""

    def step_ends(self, trainer: Trainer) -> Any:
        """It has been made, or will not be. Called on every rank, and no rank waits for another here.

        Returns:
            What this rank has seen of it, small and picklable: see :attr:`Point.seen`.
        """
        return None

    def point_of(self, subject: Subject, **facts: Any) -> Point[Subject]:
        """The point to measure at.

        Raises:
            FloatingPointError: If there is nothing to measure there.
        """
        return Point(subject=subject, **facts)

    @abstractmethod
    def measure(self, point: Point[Subject]) -> Measured:
        """Measure at a point. Runs on rank zero; whatever it asks of the subject is computed by all ranks."""

    def measure_update(self, point: Point[Subject]) -> Measured:
        """Measure what the step did, where :attr:`awaits_step`: at the weights before it; as :meth:`measure`."""
        return Measured({})

    def measure_step(self, point: Point[Subject]) -> Measured:
        """The same on the batch that the step was made of."""
        return Measured({})

    def combine(self, first: Measured, second: Measured) -> Measured:
        """Make one measurement out of those at two consecutive steps; by default the mean of each value."""
        # of a mean nothing is known where nothing is known of one of the two
        known = {k: v for k, v in first.errors.items() if k in second.errors or k not in second.scalars}
        return Measured(
            scalars=_mean(first.scalars, second.scalars),
            errors=_mean(known, {k: v for k, v in second.errors.items() if k in second.scalars}),
            arrays=first.arrays,
            notes=dict(first.notes),
        )

    def audits(self, count: int, measured: Measured) -> bool:
        """Whether to compare a measurement with double precision; decided alike on all ranks.

        Args:
            count: Measurements before it.
            measured: What was measured.
        """
        return False

    def audit(self, measured: Measured, rule: StabilityRule, memory: dict[str, Any], subject: Subject) -> Measured:
        """The same measurement, its errors enlarged by what rounding does. Runs on rank zero.

        Args:
            measured: What was measured.
            rule: The edge of stability at that step.
            memory: What the monitor keeps.
            subject: What was measured on, at the same weights in double precision.
        """
        return measured

    def unaudited(self, measured: Measured, memory: dict[str, Any], reason: str) -> Measured:
        """The same measurement, where it could not be compared with double precision after all."""
        return measured

    def check(self, subject: Subject) -> None:
        """Refuse options that do not fit what is measured on; called before the first step."""

    def preflight(self, sharing: Sequence[DynamicsMonitor[Any]], subject: Subject) -> None:
        """Find out before the first step whether these monitors, which agree in their options, can measure."""
        for monitor in sharing:
            monitor.check(subject)

    def describe(self) -> dict[str, Any]:
        """The monitor's own options, for the record file's header."""
        return {}

    def introduce(
        self, rule: StabilityRule, data: ProbeData, every: int | None, every_detail: int | None = None
    ) -> dict[str, Any]:
        """What the record file's header says of this monitor.

        Args:
            rule: The optimizers' edge of stability at the first step.
            data: The probe.
            every: The default cadence, where it applies.
            every_detail: That of measurements in detail; 0 for never.
        """
        return {
            "family": self.table.family,
            "cadence": f"every {every} steps (default)" if self.cadence.is_open else str(self.cadence),
            "pair": self.pair,
            "in_detail": self._describe_detail(every_detail),
            "probe": data.describe(),
            **({} if self.options is None else {"mode": self.options.mode, "precision": self.options.precision}),
            **self.describe(),
        }

    def logged(self, measured: Measured) -> dict[str, float]:
        """The values that go to the loggers: those on by default, and ``also_log``. All of them stand in the record."""
        return {key: value for key, value in measured.scalars.items() if self._is_logged(key)}

    def shown(self, clips: bool, sharpens: bool = False) -> list[str]:
        """Names, without the family, of the quantities that can come to the loggers: what charts are laid out for.

        Args:
            clips: Whether the Trainer clips gradients.
            sharpens: Whether its strategy is SAM.
        """
        return [
            q.name
            for q in self.table.quantities
            if q.on_by_default or any(_may_match(pattern, q.key, q.per_layer) for pattern in self._also_log)
        ]

    def _is_logged(self, key: str) -> bool:
        if self.table.is_on_by_default(key):
            return True
        bare = key.removeprefix(f"{self.table.family}/")
        return any(pattern.fullmatch(bare) for pattern in self._also_log)

    def _describe_detail(self, every: int | None) -> str:
        if self.detail is None or every == 0:
            return "never"
        return f"every {every} steps (default)" if self.detail.is_open else str(self.detail)

    @property
    def history(self) -> list[Record]:
        """All measurements so far, those before a resume included, oldest first."""
        if self._session is not None:
            records: list[Record] = self._session.records
        else:
            path = self.record_path
            records = [] if path is None else read_records(path)
        return sorted((r for r in records if r.monitor == self.label), key=lambda record: record.step)

    @property
    def run(self) -> Run:
        """The same with what the record file says of the run: what :mod:`lightning_dynamics.figures` draws."""
        history, path = self.history, self.record_path
        if path is None:
            return Run(self.label, (), history, declared=[self.table])
        return replace(load_runs(path)[-1], records=history)

    @property
    def record_path(self) -> Path | None:
        """The file with this run's measurements; None before the first one, on other ranks, and in a trial run."""
        if self._session is not None:
            path = self._session.path
        else:
            path = self._pointer().read_text(encoding="utf-8") if self._pointer().exists() else None
        return None if path is None else Path(path)

    # The hooks: each hands over to the session, which acts once for all monitors.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None
        if stage == "fit":
            from lightning_dynamics.callbacks.session import Session

            self._session = Session.of(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads(trainer):
            self._session.start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._leads(trainer):
            self._session.batch_starts(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leads(trainer):
            self._session.batch_ends(trainer, pl_module, outputs, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._leads(trainer):
            self._session.optimizer_steps(trainer, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leads(trainer):
            self._session.end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._leads(trainer):
            self._session.close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._leads(trainer):
            self._session.close(trainer)
        if os.getpid() != self._home and self.record_path is not None:
            self._pointer().write_text(str(self.record_path), encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {} if self._session is None else self._session.state_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # `Trainer.test` and the Tuner call this too: what is loaded here counts only when a fit starts
        self._restored = state_dict

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_session": None}

    def _leads(self, trainer: Trainer) -> bool:
        return self._session is not None and self._session.is_led_by(trainer, self)

    def _pointer(self) -> Path:
        """Where a process that was spawned for the fit leaves the record file's place."""
        return Path(tempfile.gettempdir()) / f"lightning_dynamics-{self._token}"


def compiled_patterns(name: str, patterns: str | Sequence[str]) -> list[re.Pattern[str]]:
    """Regular expressions, or an error that names the option that they were given as."""
    try:
        several = [patterns] if isinstance(patterns, str) else list(patterns)
        return [re.compile(pattern) for pattern in several]
    except (re.error, TypeError) as error:
        message = f"`{name}` must hold regular expressions, got {patterns!r}: {error}."
        raise MisconfigurationException(message) from error


def _may_match(pattern: re.Pattern[str], key: str, per_layer: bool) -> bool:
    if not per_layer:
        return pattern.fullmatch(key) is not None
    # which layers there are is not known yet: what stands before the last slash must match the key
    start, _, _ = pattern.pattern.rpartition("/")
    return pattern.fullmatch(f"{key}/layer") is not None or re.fullmatch(start, key) is not None


def _mean(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {key: (value + second[key]) / 2 if key in second else value for key, value in first.items()}
