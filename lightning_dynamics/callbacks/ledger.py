"""From results to records: pairs are joined, failures counted, cost kept. The same on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.journal import Journal
from lightning_dynamics.callbacks.measured import Clipping, Measured, Role, When
from lightning_dynamics.callbacks.measuring import Failure
from lightning_dynamics.callbacks.monitor_state import MonitorState
from lightning_dynamics.callbacks.notices import Notices
from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.record import Cost, Record

COST = QuantityTable(
    "dynamics",
    "Cost of the monitors",
    (
        Quantity(
            "overhead",
            "",
            "1",
            "Share of the fit's wall-clock time so far that measurements took.",
            "own",
            "exact",
            "Overhead",
        ),
        Quantity(
            "skipped",
            "",
            "points",
            "Points that could not be measured or logged (out of memory, numbers that are not finite, a failed rank).",
            "own",
            "exact",
            "Skipped points",
        ),
    ),
    headline=("overhead",),
)


class Ledger:
    """What the monitors of a session have measured and not yet written, and what it cost.

    Args:
        notices: How to warn.
        expose: Makes a monitor's logged values visible to other callbacks.
    """

    def __init__(self, notices: Notices, expose: Callable[[DynamicsMonitor[Any], dict[str, float]], None]) -> None:
        self.states: dict[str, MonitorState] = {}
        self.skipped = 0
        self._notices = notices
        self._expose = expose
        self._started: float | None = None
        self._before = 0.0
        self._shown = 0  # skipped points that the loggers know of
        self._unwritten: list[tuple[Record, dict[str, float]]] = []

    def begin(self) -> None:
        """A fit starts: the clock goes on from where it stood."""
        self._started = time.monotonic()

    def pause(self) -> None:
        """A fit has ended: the clock stands still."""
        self._before, self._started = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds of wall-clock time in fits of this run so far."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def resume(self, skipped: int, elapsed: float | None) -> None:
        """Go on with what a checkpoint says; one of before it was kept knows measuring alone."""
        self.skipped = skipped
        self._before = self._spent() if elapsed is None else elapsed

    def take(
        self, monitor: DynamicsMonitor[Any], when: When, role: Role, result: Measured | Failure, seconds: float
    ) -> None:
        """Enter the result of one measurement.

        Args:
            monitor: Whose it is.
            when: When it was taken.
            role: Whether it is due by itself, or the second half of a pair, or both.
            result: The result.
            seconds: What it took.
        """
        state = self.states[monitor.label]
        state.seconds += seconds
        state.count += 1
        state.clipping = Clipping()
        if isinstance(result, Failure):
            self.skip(monitor, result)
            self.settle(monitor)
            return
        if role.second and state.pending is not None:
            first_when, first, spent = state.pending
            state.pending = None
            self._enter(monitor, first_when, monitor.combine(first, result), spent + seconds)
        self.settle(monitor)
        if not role.first:
            return
        if monitor.pair and not when.final:
            state.pending = (when, result, 0.0 if role.second else seconds)
        else:
            self._enter(monitor, when, result, seconds)

    def settle(self, monitor: DynamicsMonitor[Any]) -> None:
        """Let a first half stand alone whose second half does not come."""
        state = self.states[monitor.label]
        if state.pending is not None:
            when, measured, seconds = state.pending
            state.pending = None
            self._enter(monitor, when, measured, seconds)

    def skip(self, monitor: DynamicsMonitor[Any], failure: Failure) -> None:
        """Weather: it costs this point, and one warning per reason."""
        self.skipped += 1
        self._notices.warn(
            failure.reason.split("(")[0], f"{monitor.label} skips a point: {failure.reason}. Training goes on."
        )

    def flush(self, journal: Journal, now: int) -> None:
        """Write what has come together, one call per logger and step.

        Args:
            journal: Where to.
            now: The step at hand: points that were skipped are counted there if nothing else is written.
        """
        by_step: dict[int, list[tuple[Record, dict[str, float]]]] = {}
        for record, logged in self._unwritten:
            by_step.setdefault(record.step, []).append((record, logged))
        self._unwritten.clear()
        skipped = self.skipped + journal.failures
        overhead = self._spent() / max(self.elapsed, 1e-9)
        if not by_step and skipped != self._shown:
            by_step[now] = []
        self._shown = skipped
        seconds = {label: state.seconds for label, state in self.states.items()}
        for step, entries in sorted(by_step.items()):
            logged = {key: value for _, logged in entries for key, value in logged.items()}
            logged.update({"dynamics/overhead": overhead, "dynamics/skipped": float(skipped)})
            cost = Cost(step, time.time(), overhead, skipped, seconds)
            journal.write([record for record, _ in entries], logged, cost)

    def _enter(self, monitor: DynamicsMonitor[Any], when: When, measured: Measured, seconds: float) -> None:
        notes = measured.notes if when.weights is None else {**measured.notes, "weights": when.weights}
        logged = monitor.logged(measured)
        exposed = {key: float(value) for key, value in logged.items() if math.isfinite(value)}
        # what is measured now and then stays visible, as in Lightning's own dictionary
        self.states[monitor.label].exposed.update(exposed)
        self._expose(monitor, exposed)
        record = Record(
            step=when.step,
            monitor=monitor.label,
            scalars=measured.scalars,
            errors=measured.errors,
            arrays=measured.arrays,
            notes=notes,
            global_step=when.global_step,
            epoch=when.epoch,
            time=time.time(),
            seconds=seconds,
            final=when.final,
        )
        self._unwritten.append((record, logged))

    def _spent(self) -> float:
        return sum(state.seconds for state in self.states.values())
