"""The measurements of one fit: preflight, points at their steps, points that have to wait for their data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.ledger import Ledger
from lightning_dynamics.callbacks.lightning_replay import Circumstances
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.measured import Measured, Member, Role, SavedWeights, Taken, When
from lightning_dynamics.callbacks.measuring import Failure, Outcome, Task, explain, measure_jointly
from lightning_dynamics.callbacks.notices import Notices
from lightning_dynamics.callbacks.optimization import optimization
from lightning_dynamics.callbacks.perturbation import perturbation
from lightning_dynamics.callbacks.probes import Probes
from lightning_dynamics.callbacks.progress import Progress
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.metrics import StabilityRule, stability_rule
from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.curvature import NO_LOSS
from lightning_dynamics.objective.randomness import stream_seed
from lightning_dynamics.objective.replay import Replay, batch_length
from lightning_dynamics.objective.sandbox import Clones

_MOST_SAVED = 16  # copies of the weights that wait for a probe


class Measurements:
    """What is measured between the start and the end of a fit; every method is called on every rank.

    Args:
        trainer: The Trainer.
        module: Its module, not wrapped.
        monitors: Its monitors.
        probes: Their data.
        ledger: Where results go.
        notices: How to speak to the user.
        ranks: The ranks.
        progress: Told what takes long.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        monitors: Sequence[DynamicsMonitor[Any]],
        probes: Probes,
        ledger: Ledger,
        notices: Notices,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._monitors = monitors
        self._probes = probes
        self._ledger = ledger
        self._notices = notices
        self._ranks = ranks
        self._progress = progress
        self._clones: Clones = {}
        self._saved: list[SavedWeights] = []
        self._open: SavedWeights | None = None
        self._is_passing = False
        self._checked: set[tuple[Any, ...]] = set()

    def check(self, batch: Any) -> None:
        """The preflight: find out before the first step whether all can be measured."""
        for monitor in self._monitors:
            options = monitor.options
            if options is None or options.key in self._checked:
                continue
            items = self._current_items(monitor, batch)
            if not items[0]:
                continue
            self._checked.add(options.key)
            some = [self._ends(part) for part in items if part]
            pieces = self._probes.of(monitor).pieces
            if pieces is not None:  # a pair of mini-batches
                some[0] = items[0][: 2 * pieces]
            result, shared = self._preflight(monitor, some)
            if isinstance(result, Failure) and result.reason.startswith(NO_LOSS) and some != items:
                # the step skips some batches
                result, shared = self._preflight(monitor, items)
            if isinstance(result, Failure) and result.is_asymmetry and not shared and options.precision != "same":
                # in single precision that may be rounding, after good training: ask in double precision
                again, _ = self._preflight(monitor, some, torch.float64)
                result = result if isinstance(again, Failure) else again
            if isinstance(result, Failure) and not result.is_weather:
                hint = ""
                if result.is_asymmetry and shared:
                    hint = f" The step shares {', '.join(shared)} with the module: what it writes there stays."
                raise MisconfigurationException(
                    f"{monitor.label} cannot measure {type(self._module).__name__}: {result.reason}{hint}"
                )
            if isinstance(result, Failure):
                self._ledger.skip(monitor, result)

    def _current_items(self, monitor: DynamicsMonitor[Any], batch: Any) -> list[list[ProbeItem]]:
        """This rank's batches of each of a monitor's probes; where the first does not hold any, the current batch."""
        first, *others = [data.items for data in self._probes.all_of(monitor)]
        instead = [] if batch is None else [self._current(batch)]
        return [first or instead, *others]

    def _ends(self, items: list[ProbeItem]) -> list[ProbeItem]:
        """The first batch; and the last one where it is shorter, on any rank."""
        is_short = items[-1].weight not in (0.0, items[0].weight)
        return [items[0], items[-1]] if any(self._ranks.gather(is_short)) else items[:1]

    def _preflight(
        self, monitor: DynamicsMonitor[Any], items: list[list[ProbeItem]], least: torch.dtype | None = None
    ) -> tuple[Any, list[str]]:
        sharing = self._sharing(monitor)

        def prepare() -> tuple[Replay, list[Task]]:
            pieces = self._probes.of(monitor).pieces or 1
            circumstances = Circumstances(clones=self._clones, least=least, pieces=pieces)
            replay = monitor.replay(self._trainer, self._module, items, circumstances, sharing)
            return replay, [partial(monitor.preflight, sharing)]

        with self._progress.during(f"{monitor.label} (preflight)"):
            outcome = measure_jointly(prepare, 1, self._ranks, monitor.part, beat=self._progress.beat)
        self._name_shared(monitor, outcome)
        return outcome.results[0], outcome.shared

    def _sharing(self, monitor: DynamicsMonitor[Any]) -> list[DynamicsMonitor[Any]]:
        """The monitors that agree with this one in their options."""
        return [m for m in self._monitors if _key(m) == _key(monitor)]

    def _name_shared(self, monitor: DynamicsMonitor[Any], outcome: Outcome) -> None:
        if outcome.shared:
            self._notices.say(
                f"While {monitor.label} evaluates the step, these attributes of {type(self._module).__name__} are "
                f"shared with it, not copied: {', '.join(outcome.shared)}. What the step writes to them stays."
            )

    def _current(self, batch: Any) -> ProbeItem:
        """The batch of the step at hand, as a probe."""
        index = _compat.batch_number(self._trainer) * self._ranks.world_size + self._ranks.rank
        return ProbeItem(private_copy(batch), index, is_ready=True, weight=batch_length(batch))

    def take(self, when: When, roles: Mapping[int, Role], batch: Any) -> None:
        """Measure what is due where the probe is complete; save the weights for what has to wait."""
        later = {i: r for i, r in roles.items() if self._waits(i, r)}
        if later:
            saved = self._copied(when, later, len(self._saved))
            self._saved += [] if saved is None else [saved]
        ready = {i: r for i, r in roles.items() if i not in later}
        after = {} if when.final else {i: r for i, r in ready.items() if self._monitors[i].awaits_step}
        if after:
            self._open = self._copied(when, after)
            if self._open is None:  # said already
                ready = {i: r for i, r in ready.items() if i not in after}
            else:
                for i in after:
                    if self._monitors[i].is_of_step:
                        self._monitors[i].step_begins(self._trainer)
        if ready:
            self._measure(when, ready, batch, None)

    @property
    def is_open(self) -> bool:
        """Whether a point awaits the step that is being taken."""
        return self._open is not None

    def pass_by(self, batch: Any) -> None:
        """Note a batch of the step that a point awaits."""
        if self._open is None or self._open.taken is None or self._open.taken.items is None:
            return
        if self._is_passing:  # the one before was left out by a hook
            self._open.taken.items.pop()
        self._is_passing = True
        try:
            self._open.taken.items.append(self._current(batch))
        except Exception:  # a batch that cannot be copied: nothing is known of the step's own loss
            self._open = replace(self._open, taken=replace(self._open.taken, items=None))

    def has_passed(self) -> None:
        """The batch at hand has been used."""
        self._is_passing = False

    def step_taken(self) -> None:
        """Complete the point that awaited the step, at the weights that it was taken from."""
        saved, self._open = self._open, None
        if saved is None or saved.taken is None:
            return
        for i, role in saved.roles.items():
            if self._monitors[i].is_of_step:
                started = time.monotonic()
                with self._telling(saved.when, {i: role}):
                    result = self._of_step(saved.when, i, role)
                self._ledger.take(self._monitors[i], saved.when, role, result, time.monotonic() - started)
        if not saved.results:
            return
        items = saved.taken.items
        is_known = min(self._ranks.gather(len(items or []))) > 0
        taken = Taken(dict(self._module.named_parameters()), items if is_known else None)
        saved = replace(saved, taken=taken)
        for members in self._by_objective({i: saved.roles[i] for i in saved.results}):
            started = time.monotonic()
            results = [saved.results[i][0] for i in members]
            with self._telling(saved.when, {i: saved.roles[i] for i in members}):
                results = self._with_step(members, results, saved)
            seconds = (time.monotonic() - started) / len(members)
            for i, result in zip(members, results, strict=True):
                self._ledger.take(self._monitors[i], saved.when, saved.roles[i], result, saved.results[i][1] + seconds)

    def settle(self) -> None:
        """The step does not come: what was measured before it stands alone."""
        saved, self._open = self._open, None
        if saved is not None:
            for i in saved.roles:
                if self._monitors[i].is_of_step:
                    self._monitors[i].step_ends(self._trainer)
            for i, (result, seconds) in saved.results.items():
                self._ledger.take(self._monitors[i], saved.when, saved.roles[i], result, seconds)

    def _waits(self, index: int, role: Role) -> bool:
        """Whether a monitor's data are not there yet."""
        monitor = self._monitors[index]
        return monitor.measures_on_data(role.in_detail) and not self._probes.of(monitor).is_complete

    def _copied(self, when: When, roles: dict[int, Role], waiting: int = 0) -> SavedWeights | None:
        """The weights of a step that cannot be measured yet, on all ranks or on none."""
        failure, saved = None, None
        try:
            if waiting >= _MOST_SAVED:
                raise FloatingPointError(f"more than {_MOST_SAVED} points were due before the probe was complete")
            on_data = any(self._monitors[i].measures_on_data(role.in_detail) for i, role in roles.items())
            held = [*self._module.named_parameters(), *self._module.named_buffers()] if on_data else []
            copies = {name: tensor.detach().clone() for name, tensor in held}
            rules = {i: self.rule(self._monitors[i]) for i in roles}
            how = optimization(self._trainer), perturbation(self._trainer)
            saved = SavedWeights(when, copies, rules, *how, roles, Taken({}, [] if on_data else None))
        except Exception as error:
            failure = explain(error)
        failures = [other for other in self._ranks.gather(failure) if other is not None]
        if not failures:
            return saved
        for i in roles:
            self._ledger.skip(self._monitors[i], failures[0])
        return None

    def take_saved(self) -> None:
        """Take the points that had to wait, each at the weights and the x where it belongs."""
        waiting: list[SavedWeights] = []
        for saved in self._saved:
            ready = {i: r for i, r in saved.roles.items() if not self._waits(i, r)}
            left = {i: r for i, r in saved.roles.items() if i not in ready}
            if ready:
                self._measure(saved.when, ready, None, replace(saved, taken=None))
            if left:
                waiting.append(replace(saved, roles=left))
        self._saved = waiting

    def _measure(self, when: When, roles: Mapping[int, Role], batch: Any, saved: SavedWeights | None) -> None:
        """Measure at one step: each objective is opened once, for all monitors that share it."""
        for i, role in roles.items():
            if not self._monitors[i].measures_on_data(role.in_detail) and not self._monitors[i].is_of_step:
                started = time.monotonic()
                with self._telling(when, {i: role}):
                    result = self._without_data(when, i, role)
                self._ledger.take(self._monitors[i], when, role, result, time.monotonic() - started)
        for members in self._by_objective(roles):
            started = time.monotonic()
            with self._telling(when, {i: roles[i] for i in members}):
                outcome = self._outcome(when, members, roles, batch, saved)
                results = self._audited(when, members, outcome, batch, saved)
            seconds = (time.monotonic() - started) / len(members)
            awaiting = {} if self._open is None or self._open.when != when else self._open.roles
            for i, result in zip(members, results, strict=True):
                if i in awaiting and self._open is not None and isinstance(result, Measured):
                    self._open.results[i] = (result, seconds)
                else:
                    self._ledger.take(self._monitors[i], when, roles[i], result, seconds)

    def _telling(self, when: When, roles: Mapping[int, Role]) -> AbstractContextManager[None]:
        """With what is measured told to the progress bar, if it takes long."""
        kind = tuple((self._monitors[i].label, role.in_detail) for i, role in roles.items())
        return self._progress.during(f"{kind[0][0]} at step {when.step}", kind=kind)

    def _of_step(self, when: When, index: int, role: Role) -> Any:
        """A result of the step alone, from what all ranks have seen of it."""
        try:
            seen = self._monitors[index].step_ends(self._trainer)
        except Exception as error:
            seen = explain(error)
        everyone = self._ranks.gather(seen)
        failures = [other for other in everyone if isinstance(other, Failure)]
        return failures[0] if failures else self._without_data(when, index, role, everyone)

    def _without_data(self, when: When, index: int, role: Role, seen: Sequence[Any] = ()) -> Any:
        """A result of weights alone, or of the step: every rank has them, rank zero's counts."""
        result: Any = None
        if self._ranks.leads:
            try:
                result = self._task(when, index, role, None, seen=seen)(None)
            except Exception as error:
                result = explain(error)
        return self._ranks.share(result)

    def _outcome(
        self, when: When, members: list[int], roles: Mapping[int, Role], batch: Any, saved: SavedWeights | None
    ) -> Outcome:
        """One result for each of these monitors, which share an objective."""
        first = self._monitors[members[0]]

        def prepare() -> tuple[Replay, list[Task]]:
            # what fails here (parameters that were frozen since, a batch that cannot be copied) fails on all ranks
            replay = self._replay(when, first, batch, saved)
            states = [self._ledger.states[self._monitors[i].label] for i in members]
            shared = _Shared(
                [
                    Member(self._monitors[i], roles[i].in_detail, state.memory)
                    for i, state in zip(members, states, strict=True)
                ]
            )
            return replay, [self._task(when, i, roles[i], saved, shared) for i in members]

        vectors = max(self._monitors[i].vectors_held for i in members)
        outcome = measure_jointly(prepare, len(members), self._ranks, first.part, vectors, self._progress.beat)
        self._name_shared(first, outcome)
        return outcome

    def _with_step(self, members: list[int], results: list[Any], saved: SavedWeights) -> list[Any]:
        """The results, with what the step did, on the probe and on the batch that it was made of."""
        first, taken = self._monitors[members[0]], saved.taken
        assert taken is not None
        for of_step, items in ((False, self._current_items(first, None)), (True, [taken.items])):
            if items[0] is None:
                continue

            def prepare(of_step: bool = of_step, items: Sequence[Any] = tuple(items)) -> tuple[Replay, list[Task]]:
                circumstances = Circumstances(
                    values=saved.values,
                    clones=self._clones,
                    epoch=saved.when.epoch,
                    global_step=saved.when.global_step,
                    pieces=1 if of_step else self._probes.of(first).pieces or 1,
                    is_step=of_step,
                )
                replay = first.replay(self._trainer, self._module, items, circumstances, [])
                kind: Literal["update", "step"] = "step" if of_step else "update"
                return replay, [self._task(saved.when, i, saved.roles[i], saved, kind=kind) for i in members]

            outcome = measure_jointly(prepare, len(members), self._ranks, first.part, beat=self._progress.beat)
            results = [result.with_more(more) for result, more in zip(results, outcome.results, strict=True)]
        return results

    def _audited(
        self, when: When, members: list[int], measured: Outcome, batch: Any, saved: SavedWeights | None
    ) -> list[Any]:
        """The results; those whose turn it is, compared with double precision."""
        results = measured.results
        chosen = [
            (i, result)
            for i, result in zip(members, results, strict=True)
            if isinstance(result, Measured)
            and self._monitors[i].audits(self._ledger.states[self._monitors[i].label].count, result)
        ]
        if not chosen:
            return results
        if measured.shared:
            # a step that keeps something in what it shares would keep it in double precision
            reason = f"the step shares {', '.join(measured.shared)} with the module"
            instead = {i: self._unaudited(i, result, reason) for i, result in chosen}
            return [instead.get(i, result) for i, result in zip(members, results, strict=True)]
        first = self._monitors[chosen[0][0]]

        def prepare() -> tuple[Replay, list[Task]]:
            replay = self._replay(when, first, batch, saved, torch.float64)
            return replay, [self._audit(i, result, saved) for i, result in chosen]

        outcome = measure_jointly(prepare, len(chosen), self._ranks, first.part, beat=self._progress.beat)
        audited = dict(zip((i for i, _ in chosen), outcome.results, strict=True))
        for i, result in chosen:
            if isinstance(audited[i], Failure):
                # the values stand, and say that nothing is known of what rounding does to them
                audited[i] = self._unaudited(i, result, audited[i].reason)
        return [audited.get(i, result) for i, result in zip(members, results, strict=True)]

    def _unaudited(self, index: int, measured: Measured, reason: str) -> Measured:
        monitor = self._monitors[index]
        return monitor.unaudited(measured, self._ledger.states[monitor.label].memory, reason)

    def _audit(self, index: int, measured: Measured, saved: SavedWeights | None) -> Task:
        monitor = self._monitors[index]
        return partial(monitor.audit, measured, self._rule_at(index, saved), self._ledger.states[monitor.label].memory)

    def _replay(
        self,
        when: When,
        monitor: DynamicsMonitor[Any],
        batch: Any,
        saved: SavedWeights | None,
        least: torch.dtype | None = None,
    ) -> Replay:
        circumstances = Circumstances(
            values=None if saved is None else saved.values,
            clones=None if least is not None else self._clones,
            least=least,
            epoch=when.epoch if when.final or saved is not None else None,
            pieces=self._probes.of(monitor).pieces or 1,
        )
        items = self._current_items(monitor, batch)
        return monitor.replay(self._trainer, self._module, items, circumstances, self._sharing(monitor))

    def _rule_at(self, index: int, saved: SavedWeights | None) -> StabilityRule:
        return self.rule(self._monitors[index]) if saved is None else saved.rules[index]

    def _by_objective(self, roles: Mapping[int, Role]) -> Iterator[list[int]]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, role in roles.items():
            if self._monitors[i].measures_on_data(role.in_detail):
                groups.setdefault(_key(self._monitors[i]), []).append(i)
        return iter(groups.values())

    def _task(
        self,
        when: When,
        index: int,
        role: Role,
        saved: SavedWeights | None,
        shared: _Shared | None = None,
        kind: Literal["point", "update", "step"] = "point",
        seen: Sequence[Any] = (),
    ) -> Task:
        monitor = self._monitors[index]
        state = self._ledger.states[monitor.label]
        data = self._probes.of(monitor)
        seed = stream_seed(monitor.probes[0].seed if monitor.probes else 0, when.step, index)
        # read here: once the sandbox is open the module shows private weights, which no optimizer knows
        rule = self._rule_at(index, saved)
        how = optimization(self._trainer) if saved is None else saved.optimization
        sharpens = perturbation(self._trainer) if saved is None else saved.perturbation
        weights = dict(self._module.named_parameters()) if saved is None else saved.values
        taken = None if saved is None else saved.taken

        def task(subject: Any) -> Measured:
            self._progress.now(f"{monitor.label} at step {when.step}")
            point = monitor.point_of(
                subject,
                step=when.step,
                rule=rule,
                memory=state.memory,
                generator=torch.Generator().manual_seed(seed),
                count=state.count,
                clipping=state.clipping if self._trainer.gradient_clip_val else None,
                in_detail=role.in_detail,
                final=when.final,
                data=data,
                optimization=how,
                perturbation=sharpens,
                weights=weights,
                after=None if taken is None else taken.after,
                together=() if shared is None else shared.members,
                found={} if shared is None else shared.found,
                seen=seen,
            )
            if kind != "point":
                return monitor.measure_step(point) if kind == "step" else monitor.measure_update(point)
            measured = monitor.measure(point)
            measured.notes.setdefault("probe", data.describe())
            return measured

        return task

    def rule(self, monitor: DynamicsMonitor[Any]) -> StabilityRule:
        """The optimizers' edge of stability as it is now."""
        optimizers, _ = _compat.optimizer_lists(self._trainer)
        rule = stability_rule(optimizers, monitor.measured_parameters(self._module))
        if rule.is_unknown:
            self._notices.say(f"{monitor.label} shows no stability threshold: {rule.unavailable}.")
        return rule


@dataclass(frozen=True)
class _Shared:
    """What monitors share that measure on the same at one step: each other, and what they find."""

    members: list[Member]
    found: dict[str, Any] = field(default_factory=dict)


def _key(monitor: DynamicsMonitor[Any]) -> tuple[Any, ...]:
    """What the monitors that share an evaluation agree in."""
    return () if monitor.options is None else monitor.options.key
