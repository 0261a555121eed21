"""One measurement, and the append-only file of them: JSON lines that any tool can read."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dynamics.recording.quantity import of_layer

SCHEMA = 1
STEM = "dynamics"


@dataclass(frozen=True)
class Record:
    """One measurement of one monitor.

    Attributes:
        step: x of the curves: batches that stepped, the axis of the user's own curves.
        monitor: Name of the monitor.
        scalars: Values by full key; a value that is not finite is None in the file, with its reason in ``notes``.
        errors: Error of a value by its key, of the kind that its quantity declares.
        arrays: Lists of numbers (a spectrum, say).
        notes: Whatever else is needed to read the numbers.
        global_step: Lightning's ``global_step`` (optimizer steps).
        epoch: Epoch.
        time: Seconds since the epoch of Unix.
        seconds: What the measurement took.
        final: Whether it was taken on the weights that the fit ended with.
    """

    step: int
    monitor: str
    scalars: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, list[float]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    global_step: int = 0
    epoch: int = 0
    time: float = 0.0
    seconds: float = 0.0
    final: bool = False

    def through_depth(self, key: str, errors: bool = False) -> dict[str, float]:
        """A quantity at every layer where it has a value, from the input to the last one.

        Args:
            key: Its full key, ``"collapse/cdnv"``.
            errors: Its errors instead.

        Returns:
            Values by layer; empty where the monitor measures no layers.
        """
        found = self.errors if errors else self.scalars
        keys = {layer: of_layer(key, layer) for layer in self.notes.get("layers", ())}
        return {layer: found[full] for layer, full in keys.items() if full in found}

    def to_json(self) -> dict[str, Any]:
        reasons: dict[str, str] = {}
        line: dict[str, Any] = {
            "type": "record",
            "step": self.step,
            "monitor": self.monitor,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "time": round(self.time, 3),
            "seconds": round(self.seconds, 6),
            "scalars": _finite(self.scalars, reasons),
            "errors": _finite(self.errors, reasons),
            "arrays": {key: [_number(v) for v in values] for key, values in self.arrays.items()},
            "notes": dict(self.notes),
        }
        if reasons:
            line["notes"]["not_finite"] = reasons
        if self.final:
            line["final"] = True
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Record:
        reasons = line.get("notes", {}).get("not_finite", {})

        def restore(values: Mapping[str, Any]) -> dict[str, float]:
            return {k: float(reasons.get(k, "nan")) if v is None else float(v) for k, v in values.items()}

        return cls(
            step=int(line["step"]),
            monitor=str(line["monitor"]),
            scalars=restore(line["scalars"]),
            errors=restore(line.get("errors", {})),
            arrays={k: [math.nan if v is None else v for v in vs] for k, vs in line.get("arrays", {}).items()},
            notes=dict(line.get("notes", {})),
            global_step=int(line.get("global_step", 0)),
            epoch=int(line.get("epoch", 0)),
            time=float(line.get("time", 0.0)),
            seconds=float(line.get("seconds", 0.0)),
            final=bool(line.get("final", False)),
        )


@dataclass(frozen=True)
class Cost:
    """What measuring had cost by a step.

    Attributes:
        step: x of the curves.
        time: Seconds since the epoch of Unix.
        overhead: Share of the fit's wall-clock time so far that measurements took.
        skipped: Points that could not be measured or logged so far.
        seconds: What each monitor took so far, by its name.
    """

    step: int
    time: float
    overhead: float
    skipped: int
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "cost",
            "step": self.step,
            "time": round(self.time, 3),
            "overhead": round(self.overhead, 6),
            "skipped": self.skipped,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Cost:
        return cls(
            step=int(line["step"]),
            time=float(line["time"]),
            overhead=float(line["overhead"]),
            skipped=int(line["skipped"]),
            seconds={str(name): float(value) for name, value in line["seconds"].items()},
        )


@dataclass(frozen=True)
class Parent:
    """Where a resumed segment goes on from: the segment, the first step of the new one, the file if it is known."""

    segment: str
    step: int
    file: str | None = None


class RecordFile:
    """The record file of one process life: created exclusively, appended to line by line, never truncated.

    Args:
        directory: The run's directory; the file is ``dynamics.jsonl`` there, or ``dynamics-1.jsonl``, … if that exists.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            self.path = folder / (f"{STEM}.jsonl" if number == 0 else f"{STEM}-{number}.jsonl")
            try:
                self.path.touch(exist_ok=False)
                break
            except FileExistsError:
                number += 1

    def begin(self, run: str, segment: str, parent: Parent | None, header: Mapping[str, Any]) -> None:
        """Write the header line of a new segment.

        Args:
            run: Name of the run, the same over all of its process lives.
            segment: Name of the segment.
            parent: What it goes on from.
            header: Whatever else the line says.
        """
        line: dict[str, Any] = {"type": "header", "schema": SCHEMA, "run": run, "segment": segment}
        if parent is not None:
            line["parent"] = {"segment": parent.segment, "step": parent.step, "file": self._relative(parent.file)}
        self._write({**line, **header})

    def append(self, record: Record) -> None:
        self._write(record.to_json())

    def append_cost(self, cost: Cost) -> None:
        self._write(cost.to_json())

    def _write(self, line: Mapping[str, Any]) -> None:
        # opened for each line: on disk at once, and nothing is left open whatever ends the run
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_plain(line), allow_nan=False, default=_type_name) + "\n")

    def _relative(self, file: str | None) -> str | None:
        if file is None:
            return None
        try:
            return Path(os.path.relpath(file, self.path.parent)).as_posix()
        except ValueError:  # another drive
            return None


def new_name() -> str:
    """A name that no other run or segment has; drawn from the system, not from any generator of the run's."""
    return uuid.uuid4().hex[:16]


def _type_name(thing: object) -> str:
    """What is no JSON: not its representation, which may say anything."""
    return type(thing).__name__


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(thing: Any) -> Any:
    """The same with the name of each float that JSON has no number for, and strings for keys."""
    if isinstance(thing, float):
        return thing if math.isfinite(thing) else str(thing)
    if isinstance(thing, Mapping):
        return {str(key): _plain(value) for key, value in thing.items()}
    return [_plain(value) for value in thing] if isinstance(thing, (list, tuple)) else thing


def _finite(values: Mapping[str, float], reasons: dict[str, str]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for key, value in values.items():
        out[key] = _number(value)
        if out[key] is None:
            reasons[key] = str(float(value))
    return out
