"""What the monitors of one Trainer share: the step, the probes, the objective at this step, the records, resume."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.checks import (
    averaged_by,
    check_families,
    check_strategy,
    clip_factor,
    default_cadence,
    preflight,
    takes_iterator,
)
from lightning_dynamics.callbacks.journal import Journal, header_of
from lightning_dynamics.callbacks.ledger import COST, Ledger
from lightning_dynamics.callbacks.lightning_objective import lightning_objective
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.measured import Measured, Point, Role, SavedWeights, When
from lightning_dynamics.callbacks.measuring import Failure, Outcome, explain, measure_jointly
from lightning_dynamics.callbacks.monitor_state import MonitorState
from lightning_dynamics.callbacks.notices import Notices
from lightning_dynamics.callbacks.probes import Probes
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.metrics import StabilityRule, stability_rule
from lightning_dynamics.objective import HessianOperator, Objective, select_parameters
from lightning_dynamics.objective.loss import batch_length, stream_seed
from lightning_dynamics.objective.sandbox import Clones, private_copy
from lightning_dynamics.recording.record import Record

_MOST_SAVED = 16  # copies of the weights that wait for a probe
_BUDGET = 0.15  # share of training that default cadences may cost together


class Session:
    """One per Trainer, for as long as the Trainer lives; every method is called on every rank."""

    _of: ClassVar[weakref.WeakKeyDictionary[Trainer, Session]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.monitors: list[DynamicsMonitor] = []
        self.journal: Journal | None = None
        self._notices = Notices()
        self._ledger = Ledger(self._notices, self._expose)
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._probes = Probes()
        self._clones: Clones = {}
        self._saved: list[SavedWeights] = []
        self._ranks = Ranks(0, 1, torch.device("cpu"))
        self._last_step: int | None = None
        self._checked: set[tuple[Any, ...]] = set()
        self._pulls = False

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

    def is_led_by(self, trainer: Trainer, monitor: DynamicsMonitor) -> bool:
        """Whether this monitor is the first of the Trainer's: the one that acts for all."""
        return next((c for c in _compat.callbacks(trainer) if isinstance(c, DynamicsMonitor)), None) is monitor

    # Hooks

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Training is about to start: gather monitors, state and probes."""
        self.monitors = [c for c in _compat.callbacks(trainer) if isinstance(c, DynamicsMonitor)]
        self._pulls = takes_iterator(module)
        self._ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
        self._last_step = None
        self._checked.clear()
        self._saved.clear()
        check_strategy(trainer)
        check_families(self.monitors)
        for monitor in self.monitors:
            self._restore(monitor)
        lineage = next((m._restored["lineage"] for m in self.monitors if m._restored), None)
        self.journal = Journal.open(trainer, self._ranks, self.journal, lineage)
        self._probes.read(trainer, self.monitors, self._ranks, self._notices.say)
        for monitor in self.monitors:
            self._decide_cadence(trainer, monitor)
            self._expose(monitor, self._ledger.states[monitor.label].exposed)
            monitor._restored = None
        self._ledger.begin()

    def batch_starts(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """The weights are θ_t and the batch has not been used: the moment to measure."""
        if batch is not None and not self._pulls:
            self._show(trainer, module, batch)
        self._check(trainer, module, None if self._pulls else batch)
        step = _compat.curve_step(trainer)
        if step == self._last_step or _compat.is_trial(trainer):
            return
        if self._last_step is None:
            self._begin(trainer, module, step)
        self._last_step = step
        now = When(step, trainer.global_step, trainer.current_epoch)
        roles = {i: self._role(trainer, m, step) for i, m in enumerate(self.monitors)}
        self._measure_or_save(trainer, module, now, {i: role for i, role in roles.items() if role.is_due}, batch)

    def batch_ends(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Steps that pull their batches from an iterator show them only now."""
        if self._pulls and batch is not None:
            self._show(trainer, module, batch)
            self._check(trainer, module, batch)

    def optimizer_steps(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Note what clipping is about to do to the gradient."""
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
        self._measure_saved(trainer, module)
        step = _compat.curve_step(trainer)
        if step != self._last_step:
            # the Trainer has moved on to an epoch that does not come
            epoch = max(0, trainer.current_epoch - 1)
            when = When(step, trainer.global_step, epoch, final=True, weights=averaged_by(trainer))
            roles = {
                i: Role(first=True, second=self._ledger.states[m.label].second_at == step)
                for i, m in enumerate(self.monitors)
                if self._probes.of(m).items
            }
            self._measure_or_save(trainer, module, when, roles, None)
        for monitor in self.monitors:
            self._ledger.settle(monitor)
        self._flush()

    def close(self) -> None:
        """The fit is over, one way or another."""
        self._saved.clear()
        # callbacks know their module, and it the Trainer: the registry must not keep them alive
        self.monitors = []

    # State

    def state_of(self, monitor: DynamicsMonitor) -> dict[str, Any]:
        """A monitor's part of a checkpoint. No rank waits for another here."""
        state = self._ledger.states.get(monitor.label)
        if state is None or self.journal is None or self._last_step is None:
            return {}
        return {
            **state.to_checkpoint(),
            "lineage": self.journal.lineage(),
            "skipped": self._ledger.skipped,
            "probe": self._probes.of(monitor).to_checkpoint(),
        }

    def _restore(self, monitor: DynamicsMonitor) -> None:
        if monitor._restored:
            self._ledger.states[monitor.label] = MonitorState.from_checkpoint(monitor._restored)
            self._ledger.skipped = monitor._restored["skipped"]
        self._ledger.states.setdefault(monitor.label, MonitorState())

    # Data and cadence

    def _show(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Let the probes that are made of passing batches see one; take the points that waited for them."""
        assert self.journal is not None
        if self._probes.show(batch, self.journal.directory):
            self._measure_saved(trainer, module)

    def _decide_cadence(self, trainer: Trainer, monitor: DynamicsMonitor) -> None:
        """Without a cadence of the user's: as often as the budget allows, by a count of gradients, not of seconds."""
        state = self._ledger.states[monitor.label]
        if not monitor.cadence.is_open or state.every is not None:
            return
        sharing = sum(m.cadence.is_open for m in self.monitors)
        state.every = default_cadence(trainer, monitor, self._probes.of(monitor), _BUDGET / sharing)
        self._notices.say(
            f"{monitor.label} measures every {state.every} steps, meant to cost at most {_BUDGET / sharing:.0%} of "
            "training. Choose otherwise with `every_n_train_steps` or `every_n_epochs`."
        )

    def _role(self, trainer: Trainer, monitor: DynamicsMonitor, step: int) -> Role:
        """Whether a monitor is due at this step, and for which half of a pair."""
        state = self._ledger.states[monitor.label]
        if monitor.cadence.is_open:
            first = step % (state.every or 1) == 0
        else:
            first = monitor.cadence.due(step, trainer.current_epoch, _compat.batch_number(trainer) == 0)
        second = state.second_at == step
        if first and monitor.pair:
            state.second_at = step + 1
        return Role(first, second)

    # Measuring

    def _check(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """The preflight: loss, gradient, one product and the symmetry test before the first step."""
        for monitor in self.monitors:
            options = monitor.options
            if options.key in self._checked:
                continue
            items = self._probes.of(monitor).items
            if not items:
                if batch is None:
                    continue
                items = [self._current(trainer, batch)]
            self._checked.add(options.key)
            is_short = items[-1].weight not in (0.0, items[0].weight)
            items = [items[0], items[-1]] if any(self._ranks.gather(is_short)) else items[:1]
            result = self._preflight(trainer, module, monitor, items, torch.float32)
            if isinstance(result, Failure) and result.is_asymmetry and options.precision != "same":
                # in single precision that may be rounding, after good training: ask in double precision
                again = self._preflight(trainer, module, monitor, items, torch.float64)
                result = result if isinstance(again, Failure) else again
            if isinstance(result, Failure) and not result.is_weather:
                raise MisconfigurationException(
                    f"{monitor.label} cannot measure {type(module).__name__}: {result.reason}"
                )
            if isinstance(result, Failure):
                self._ledger.skip(monitor, result)

    def _preflight(
        self,
        trainer: Trainer,
        module: LightningModule,
        monitor: DynamicsMonitor,
        items: list[ProbeItem],
        least: torch.dtype,
    ) -> Any:
        options = monitor.options
        sharing = [m for m in self.monitors if m.options.key == options.key]
        outcome = measure_jointly(
            partial(lightning_objective, trainer, module, options, items, clones=self._clones, least=least),
            [partial(preflight, sharing, options.precision == "same")],
            self._ranks,
        )
        self._name_shared(monitor, module, outcome)
        return outcome.results[0]

    def _name_shared(self, monitor: DynamicsMonitor, module: LightningModule, outcome: Outcome) -> None:
        if outcome.shared:
            self._notices.say(
                f"While {monitor.label} evaluates the step, these attributes of {type(module).__name__} are "
                f"shared with it, not copied: {', '.join(outcome.shared)}. What the step writes to them stays."
            )

    def _current(self, trainer: Trainer, batch: Any) -> ProbeItem:
        """The batch of the step at hand, as a probe."""
        index = _compat.batch_number(trainer) * self._ranks.world_size + self._ranks.rank
        return ProbeItem(private_copy(batch), index, is_ready=True, weight=batch_length(batch))

    def _measure_or_save(
        self, trainer: Trainer, module: LightningModule, when: When, roles: Mapping[int, Role], batch: Any
    ) -> None:
        """Measure what is due where the probe is complete; save the weights for what has to wait."""
        now = {i: r for i, r in roles.items() if self._probes.of(self.monitors[i]).is_complete}
        later = {i: r for i, r in roles.items() if i not in now}
        if later:
            self._save(trainer, module, when, later)
        if now:
            self._measure(trainer, module, when, now, batch, None)

    def _save(self, trainer: Trainer, module: LightningModule, when: When, roles: dict[int, Role]) -> None:
        """Keep the weights of a step that cannot be measured yet."""
        try:
            if len(self._saved) >= _MOST_SAVED:
                raise FloatingPointError(f"more than {_MOST_SAVED} points were due before the probe was complete")
            values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            saved = {name: tensor.detach().clone() for name, tensor in values.items()}
            rules = {i: self._rule(trainer, module, self.monitors[i]) for i in roles}
        except Exception as error:
            for i in roles:
                self._ledger.skip(self.monitors[i], explain(error))
        else:
            self._saved.append(SavedWeights(when, saved, rules, roles))

    def _measure_saved(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the points that had to wait, each at the weights and the x where it belongs."""
        waiting: list[SavedWeights] = []
        for saved in self._saved:
            ready = {i: r for i, r in saved.roles.items() if self._probes.of(self.monitors[i]).is_complete}
            left = {i: r for i, r in saved.roles.items() if i not in ready}
            if ready:
                self._measure(trainer, module, saved.when, ready, None, saved)
            if left:
                waiting.append(SavedWeights(saved.when, saved.values, saved.rules, left))
        self._saved = waiting

    def _measure(
        self,
        trainer: Trainer,
        module: LightningModule,
        when: When,
        roles: Mapping[int, Role],
        batch: Any,
        saved: SavedWeights | None,
    ) -> None:
        """Measure at one step: each objective is opened once, for all monitors that share it."""
        for members in self._by_objective(roles):
            started = time.monotonic()
            results = self._results(trainer, module, when, members, batch, saved)
            seconds = (time.monotonic() - started) / len(members)
            for i, result in zip(members, results, strict=True):
                self._ledger.take(self.monitors[i], when, roles[i], result, seconds)
        self._flush()

    def _results(
        self,
        trainer: Trainer,
        module: LightningModule,
        when: When,
        members: list[int],
        batch: Any,
        saved: SavedWeights | None,
    ) -> list[Any]:
        """One result for each of these monitors, which share an objective."""
        first = self.monitors[members[0]]
        items = self._probes.of(first).items
        try:
            if first.options.probe.current_batch:
                items = [self._current(trainer, batch)]
            tasks = [self._task(trainer, module, when, i, saved) for i in members]
        except Exception as error:  # parameters that were frozen since, a batch that cannot be copied
            return [explain(error)] * len(members)
        build: Callable[[], Objective] = partial(
            lightning_objective,
            trainer,
            module,
            first.options,
            items,
            values=None if saved is None else saved.values,
            clones=self._clones,
            epoch=when.epoch if when.final or saved is not None else None,
        )
        outcome = measure_jointly(build, tasks, self._ranks)
        self._name_shared(first, module, outcome)
        return outcome.results

    def _by_objective(self, roles: Mapping[int, Role]) -> Iterator[list[int]]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i in roles:
            groups.setdefault(self.monitors[i].options.key, []).append(i)
        return iter(groups.values())

    def _task(
        self, trainer: Trainer, module: LightningModule, when: When, index: int, saved: SavedWeights | None
    ) -> Callable[[HessianOperator], Measured]:
        monitor = self.monitors[index]
        state = self._ledger.states[monitor.label]
        data = self._probes.of(monitor)
        seed = stream_seed(monitor.options.probe.seed, when.step, index)
        # read here: once the sandbox is open the module shows private weights, which no optimizer knows
        rule = self._rule(trainer, module, monitor) if saved is None else saved.rules[index]

        def task(hessian: HessianOperator) -> Measured:
            if not math.isfinite(hessian.loss):
                raise FloatingPointError(f"the probe loss is {hessian.loss}")
            point = Point(
                step=when.step,
                hessian=hessian,
                rule=rule,
                memory=state.memory,
                generator=torch.Generator().manual_seed(seed),
                count=state.count,
                has_halves=hessian.has_halves and not monitor.options.probe.whole,
                clipping=state.clipping if trainer.gradient_clip_val else None,
            )
            measured = monitor.measure(point)
            measured.notes.setdefault("probe", data.describe())
            return measured

        return task

    def _rule(self, trainer: Trainer, module: LightningModule, monitor: DynamicsMonitor) -> StabilityRule:
        optimizers, _ = _compat.optimizer_lists(trainer)
        rule = stability_rule(optimizers, select_parameters(module, monitor.options.parameters))
        if rule.is_unknown:
            self._notices.say(f"{monitor.label} shows no stability threshold: {rule.unavailable}.")
        return rule

    def _begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Write the header: what this segment of the run is about."""
        assert self.journal is not None
        introduced = {
            m.label: m.introduce(self._rule(trainer, module, m), self._probes.of(m), self._ledger.states[m.label].every)
            for m in self.monitors
        }
        tables = [*(monitor.table for monitor in self.monitors), COST]
        self.journal.begin(step, {**header_of(trainer, module), "monitors": introduced}, tables)

    def _flush(self) -> None:
        assert self.journal is not None
        self._ledger.flush(self.journal)

    def _expose(self, monitor: DynamicsMonitor, values: dict[str, float]) -> None:
        trainer = self._trainer()
        if monitor.monitor and trainer is not None:
            _compat.expose_metrics(trainer, values)
