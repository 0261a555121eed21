"""What the monitors of one Trainer share: the step, the probes, the measurements, the records, resume."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.checks import (
    averaged_by,
    check_batches,
    check_families,
    check_strategy,
    clip_factor,
    default_cadence,
    takes_iterator,
)
from lightning_dynamics.callbacks.dashboard import display_of
from lightning_dynamics.callbacks.following import Follower
from lightning_dynamics.callbacks.header import header_of
from lightning_dynamics.callbacks.journal import Journal
from lightning_dynamics.callbacks.ledger import COST, Ledger
from lightning_dynamics.callbacks.measured import Role, When
from lightning_dynamics.callbacks.measurements import Measurements
from lightning_dynamics.callbacks.measuring import Failure, explain
from lightning_dynamics.callbacks.monitor_state import MonitorState
from lightning_dynamics.callbacks.notices import Notices
from lightning_dynamics.callbacks.probes import Probes
from lightning_dynamics.callbacks.progress import Progress
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.recording.record import Record
from lightning_dynamics.strategies import SAMMixin

_BUDGET = 0.15  # share of training that default cadences may cost together
_DETAIL = 1 / 3  # share of a monitor's budget that goes into measurements in detail


class Session:
    """One per Trainer, for as long as the Trainer lives; every method is called on every rank."""

    _of: ClassVar[weakref.WeakKeyDictionary[Trainer, Session]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.monitors: list[DynamicsMonitor[Any]] = []
        self.journal: Journal | None = None
        self._notices = Notices()
        self._ledger = Ledger(self._notices, self._expose)
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._probes = Probes()
        self._progress = Progress()
        self._measurements: Measurements | None = None
        self._ranks = Ranks(0, 1, torch.device("cpu"))
        self._last_step: int | None = None
        self._pulls = False
        self._failures: dict[str, Failure] = {}  # of followers on this rank, until all ranks know
        self._lost: set[str] = set()  # monitors whose follower has failed
        self._given_up: set[str] = set()  # those of the fit before
        self._module: Callable[[], LightningModule | None] = lambda: None

    @classmethod
    def of(cls, trainer: Trainer) -> Session:
        """The Trainer's session, made on first use."""
        session = cls._of.get(trainer)
        if session is None:
            session = cls._of[trainer] = cls()
            session._trainer = weakref.ref(trainer)
        return session

    @property
    def records(self) -> list[Record]:
        return [] if self.journal is None else self.journal.records

    @property
    def path(self) -> Any:
        return None if self.journal is None else self.journal.path

    @property
    def _fit(self) -> Measurements:
        assert self._measurements is not None, "between the start and the end of a fit"
        return self._measurements

    def is_led_by(self, trainer: Trainer, monitor: DynamicsMonitor[Any]) -> bool:
        """Whether this monitor is the first of the Trainer's: the one that acts for all."""
        return next((c for c in _compat.callbacks(trainer) if isinstance(c, DynamicsMonitor)), None) is monitor

    # Hooks

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Training is about to start: gather monitors, state and probes."""
        self.monitors = [c for c in _compat.callbacks(trainer) if isinstance(c, DynamicsMonitor)]
        self._pulls = takes_iterator(module)
        self._ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
        self._last_step = None
        self._given_up |= self._lost | set(self._failures)
        self._failures.clear()
        self._lost.clear()
        check_strategy(trainer, self.monitors)
        for monitor in self.monitors:
            monitor.adopt(self.monitors)
        if self._pulls:
            check_batches(self.monitors)
        check_families(self.monitors)
        display = display_of(_compat.callbacks(trainer))
        known = set(self._ledger.states) - self._given_up if self._module() is module else set()
        self._module = weakref.ref(module)
        self._given_up = set()
        for monitor in self.monitors:
            self._restore(monitor)
        lineage = next((m._restored["lineage"] for m in self.monitors if m._restored), None)
        self.journal = Journal.open(trainer, self._ranks, self.journal, lineage, display, self._notices.say)
        self._progress = Progress(self._trainer)
        self._probes.read(trainer, self.monitors, self._ranks, self._notices.say, self._progress)
        self._measurements = Measurements(
            trainer, module, self.monitors, self._probes, self._ledger, self._notices, self._ranks, self._progress
        )
        for monitor in self.monitors:
            if monitor.follower is not None:
                followed = (monitor._restored or {}).get("followed")
                goes_on = monitor.label in known
                monitor.follower.start(trainer, module, self._ranks, goes_on, followed, self._notices.say)
            self._decide_cadence(trainer, module, monitor)
            self._expose(monitor, self._ledger.states[monitor.label].exposed)
            monitor._restored = None
        self._ledger.begin()

    def batch_starts(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """The weights are θ_t and the batch has not been used: the moment to measure."""
        if batch is not None and not self._pulls:
            self._show(trainer, batch)
        self._fit.check(None if self._pulls else batch)
        step = _compat.curve_step(trainer)
        if step == self._last_step or _compat.is_trial(trainer):
            self._pass_by(batch)
            return
        if self._last_step is None:
            self._begin(trainer, module, step)
        self._last_step = step
        weights = averaged_by(trainer) if _compat.only_collects_statistics(trainer) else None
        now = When(step, trainer.global_step, trainer.current_epoch, weights=weights)
        roles = {i: self._role(trainer, m, step) for i, m in enumerate(self.monitors)}
        self._observe(now, roles)
        self._fit.take(now, {i: role for i, role in roles.items() if role.is_due}, batch)
        self._pass_by(batch)
        if not self._fit.is_open:  # else one call per logger, once the step has been taken
            self._flush(step)

    def batch_ends(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        """Followers see what came of the batch; steps that pull their batches from an iterator show them only now."""
        if not _compat.is_trial(trainer):
            self._to_followers(lambda monitor, follower: follower.batch_ends(outputs))
        if self._pulls and batch is not None:
            self._show(trainer, batch)
            self._fit.check(batch)
        self._fit.has_passed()
        if self._fit.is_open and _compat.ends_step(trainer):
            self._fit.step_taken()
            self._flush(_compat.curve_step(trainer))

    def optimizer_steps(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Note what clipping is about to do to the gradient."""
        if not _compat.is_trial(trainer):
            self._to_followers(
                lambda monitor, follower: follower.optimizer_steps(optimizer, self._is_due_next(trainer, monitor))
            )
        factor = clip_factor(trainer, optimizer)
        if factor is not None:
            for state in self._ledger.states.values():
                state.clipping.note(factor)

    def end(self, trainer: Trainer, module: LightningModule) -> None:
        """Training has ended: the last point, on the weights that it ended with."""
        if self._last_step is None:
            return
        assert self.journal is not None
        self._probes.finish(self.journal.directory)
        self._probes.look_again(trainer, self.monitors, self._notices.say, self._progress)
        self._fit.take_saved()
        step = _compat.curve_step(trainer)
        if step != self._last_step:
            # the Trainer has moved on to an epoch that does not come
            epoch = max(0, trainer.current_epoch - 1)
            when = When(step, trainer.global_step, epoch, final=True, weights=averaged_by(trainer))
            roles = {
                i: self._last_role(m, step)
                for i, m in enumerate(self.monitors)
                if self._probes.of(m).items or not m.measures_on_data(True)
            }
            self._observe(when, roles)
            self._fit.take(when, roles, None)
        for monitor in self.monitors:
            self._ledger.settle(monitor)
        self._flush(step)

    def close(self, trainer: Trainer) -> None:
        """The fit is over, one way or another."""
        if self._measurements is not None and self._measurements.is_open and self.journal is not None:
            self._measurements.settle()
            self._flush(_compat.curve_step(trainer))
        self._measurements = None
        self._ledger.pause()
        for monitor in self.monitors:
            if monitor.follower is not None:
                monitor.follower.stop()
        # callbacks know their module, and it the Trainer: the registry must not keep them alive
        self.monitors = []

    # What monitors may ask of each other

    def memory_of(self, monitor: DynamicsMonitor[Any] | None) -> Mapping[str, Any] | None:
        """What a monitor keeps from one measurement to the next; None without a monitor."""
        return None if monitor is None else self._ledger.states[monitor.label].memory

    def latest_spectrum(self, family: str) -> tuple[list[float], list[float]] | None:
        """Nodes and weights of the spectrum that a Hessian monitor measured last, on rank zero."""
        for record in reversed(self.records):
            if f"{family}/density_nodes" in record.arrays:
                return record.arrays[f"{family}/density_nodes"], record.arrays[f"{family}/density_weights"]
        return None

    # State

    def state_of(self, monitor: DynamicsMonitor[Any]) -> dict[str, Any]:
        """A monitor's part of a checkpoint. No rank waits for another here."""
        state = self._ledger.states.get(monitor.label)
        if state is None or self.journal is None or self._last_step is None:
            return {}
        return {
            **state.to_checkpoint(self.journal.directory),
            "lineage": self.journal.lineage(),
            "skipped": self._ledger.skipped,
            "elapsed": self._ledger.elapsed,
            "probes": self._probes.to_checkpoint(monitor),
            **self._followed(monitor),
        }

    def _followed(self, monitor: DynamicsMonitor[Any]) -> dict[str, Any]:
        """What a monitor's follower needs to go on; nothing once it has failed."""
        if monitor.follower is None or monitor.label in self._lost or monitor.label in self._failures:
            return {}
        try:
            return {"followed": monitor.follower.state_dict()}
        except Exception as error:  # told to all at the next point
            self._failures[monitor.label] = explain(error)
            return {}

    def _restore(self, monitor: DynamicsMonitor[Any]) -> None:
        if monitor._restored:
            self._ledger.states[monitor.label] = MonitorState.from_checkpoint(monitor._restored)
            self._ledger.resume(monitor._restored["skipped"], monitor._restored.get("elapsed"))
        self._ledger.states.setdefault(monitor.label, MonitorState())

    # Data and cadence

    def _show(self, trainer: Trainer, batch: Any) -> None:
        """Let the probes that are made of passing batches see one; take the points that waited for them."""
        assert self.journal is not None
        completed = self._probes.show(batch, self.journal.directory)
        if self._probes.look_again(trainer, self.monitors, self._notices.say, self._progress) or completed:
            self._fit.take_saved()
            self._flush(_compat.curve_step(trainer))

    def _pass_by(self, batch: Any) -> None:
        """Show a batch of the step at hand to the point that awaits it; an iterator's may have been written to."""
        if not self._pulls:
            self._fit.pass_by(batch)

    def _decide_cadence(self, trainer: Trainer, module: LightningModule, monitor: DynamicsMonitor[Any]) -> None:
        """Without a cadence of the user's: as often as the budget allows, by a count of gradients, not of seconds."""
        state = self._ledger.states[monitor.label]
        data = self._probes.all_of(monitor)
        budget = _BUDGET / max(1, sum(m.cadence.is_open or m.has_open_detail for m in self.monitors))
        share = 0.0
        if monitor.has_open_detail:
            share = budget * _DETAIL
            # a run that could not pay may go on for longer
            if not state.every_detail:
                every = default_cadence(trainer, data, monitor.gradients_in_detail(module), share)
                steps = trainer.estimated_stepping_batches
                # without a known length it is below zero; a run that cannot pay for two is not charged for one
                pays = steps < 0 or 2 * every <= steps
                state.every_detail = every if pays else 0
                cost = f"costs as much as {share * every:.0f} training steps"
                self._notices.say(
                    f"{monitor.label} measures {monitor.detail_name}, which {cost}, every {every} steps."
                    if pays
                    else f"{monitor.label} does not measure {monitor.detail_name} by itself: it {cost}, and training "
                    f"is short. Ask for it with {monitor.detail_option}."
                )
            share = share if state.every_detail else 0.0
        if monitor.cadence.is_open and state.every is None:
            state.every = default_cadence(trainer, data, monitor.gradients_per_point(module), budget - share)
            self._notices.say(
                f"{monitor.label} measures every {state.every} steps, meant to cost at most {budget - share:.0%} of "
                "training. Choose otherwise with `every_n_train_steps` or `every_n_epochs`."
            )

    def _to_followers(self, action: Callable[[DynamicsMonitor[Any], Follower], None]) -> None:
        for monitor in self.monitors:
            if monitor.follower is None or monitor.label in self._lost:
                continue
            started = time.monotonic()
            try:
                action(monitor, monitor.follower)
            except Exception as error:  # told to all at the next point
                self._failures[monitor.label] = explain(error)
            self._ledger.states[monitor.label].seconds += time.monotonic() - started

    def _observe(self, when: When, roles: dict[int, Role]) -> None:
        """Let followers read the weights of this step; they may ask for a point that is not due."""
        for i, monitor in enumerate(self.monitors):
            follower = monitor.follower
            if follower is None:
                continue
            if monitor.label in self._lost:
                roles.pop(i, None)
                continue
            started = time.monotonic()
            role = roles.get(i, Role(False, False))
            is_due = role.is_due or follower.demands(when)
            try:
                follower.observe(when)
            except Exception as error:  # told to all at the next point
                self._failures[monitor.label] = explain(error)
            if is_due:
                self._tell(monitor, when, i, roles)
            self._ledger.states[monitor.label].seconds += time.monotonic() - started

    def _tell(self, monitor: DynamicsMonitor[Any], when: When, index: int, roles: dict[int, Role]) -> None:
        """A point is due: ranks agree on what to do, or that a follower has failed."""
        assert monitor.follower is not None
        follower = monitor.follower
        proposal = None
        if monitor.label not in self._failures:
            try:
                proposal = follower.proposal()
            except Exception as error:
                self._failures[monitor.label] = explain(error)
        agreed = self._agreed(monitor, proposal)
        asks = False
        if monitor.label not in self._lost:
            try:
                asks = follower.tell(when, agreed)
            except Exception as error:
                self._failures[monitor.label] = explain(error)
            asks = self._agreed(monitor, asks)
        if monitor.label in self._lost:
            roles.pop(index, None)
            return
        role = roles.get(index, Role(False, False))
        roles[index] = Role(True, role.second, (role.in_detail or asks) and monitor.detail is not None)

    def _agreed(self, monitor: DynamicsMonitor[Any], mine: Any) -> Any:
        """Rank zero's value; the follower is given up if one has failed."""
        reports = self._ranks.gather((self._failures.get(monitor.label), mine))
        failures = [failure for failure, _ in reports if failure is not None]
        if failures:
            self._lost.add(monitor.label)
            self._ledger.skip(monitor, failures[0])
        return reports[0][1]

    def _is_due_next(self, trainer: Trainer, monitor: DynamicsMonitor[Any]) -> bool:
        """Whether a monitor will be due after the step that is being taken."""
        starts = bool(trainer.is_last_batch)
        return monitor.cadence.due(_compat.curve_step(trainer) + 1, trainer.current_epoch + starts, starts)

    def _role(self, trainer: Trainer, monitor: DynamicsMonitor[Any], step: int) -> Role:
        """Whether a monitor is due at this step, and for which half of a pair."""
        state = self._ledger.states[monitor.label]
        if monitor.cadence.is_open:
            first = step % (state.every or 1) == 0
        else:
            first = monitor.cadence.due(step, trainer.current_epoch, _compat.batch_number(trainer) == 0)
        in_detail = self._is_due_in_detail(trainer, monitor, step)
        second = state.second_at == step
        if (first or in_detail) and monitor.pair:
            state.second_at = step + 1
        return Role(first or in_detail, second, in_detail)

    def _is_due_in_detail(self, trainer: Trainer, monitor: DynamicsMonitor[Any], step: int) -> bool:
        if monitor.detail is None:
            return False
        if monitor.detail.is_open:
            every = self._ledger.states[monitor.label].every_detail or 0
            return every > 0 and step % every == 0
        return monitor.detail.due(step, trainer.current_epoch, _compat.batch_number(trainer) == 0)

    def _last_role(self, monitor: DynamicsMonitor[Any], step: int) -> Role:
        """The role of the end of training."""
        state = self._ledger.states[monitor.label]
        in_detail = monitor.detail is not None
        if monitor.has_open_detail:
            every = state.every_detail or 0
            in_detail = every > 0 and (step % every == 0 or 2 * (step % every) >= every)
        return Role(True, state.second_at == step, in_detail)

    # Records

    def _begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Write the header: what this segment of the run is about."""
        assert self.journal is not None
        introduced = {
            m.label: m.introduce(self._fit.rule(m), self._probes.of(m), state.every, state.every_detail)
            for m in self.monitors
            for state in [self._ledger.states[m.label]]
        }
        tables = [*(monitor.table for monitor in self.monitors), COST]
        ways = bool(trainer.gradient_clip_val), isinstance(trainer.strategy, SAMMixin)
        shown = [*(monitor.table.only(monitor.shown(*ways)) for monitor in self.monitors), COST]
        self.journal.begin(step, header_of(trainer, module, introduced), tables, shown)

    def _flush(self, step: int) -> None:
        assert self.journal is not None
        self._ledger.flush(self.journal, step)

    def _expose(self, monitor: DynamicsMonitor[Any], values: dict[str, float]) -> None:
        trainer = self._trainer()
        if monitor.monitor and trainer is not None:
            _compat.expose_metrics(trainer, values)
