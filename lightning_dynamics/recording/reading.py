"""Record files read back: the runs that they hold, each as if it had never been interrupted."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.record import SCHEMA, STEM, Cost, Parent, Record

_HEADER = '"type": "header"'
_FILE = re.compile(rf"{STEM}(-\d+)?\.jsonl")


@dataclass
class Segment:
    """One segment of a run as it stands in a file."""

    header: Mapping[str, Any]
    file: Path
    records: list[Record] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.header["segment"])

    @property
    def run(self) -> str:
        return str(self.header["run"])

    @property
    def time(self) -> float:
        """When it was begun, in seconds since the epoch of Unix."""
        return float(self.header.get("time", 0.0))

    @property
    def parent(self) -> Parent | None:
        parent = self.header.get("parent")
        return None if parent is None else Parent(parent["segment"], int(parent["step"]), parent.get("file"))


@dataclass(frozen=True)
class Series:
    """A quantity over the steps of a run.

    Attributes:
        steps: x, ascending.
        values: Values, NaN where the measurement gave none.
        errors: Errors, of the kind that the quantity declares; NaN where there is none.
    """

    steps: list[int]
    values: list[float]
    errors: list[float]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Run:
    """A run over all of its process lives, as its record files tell it.

    Attributes:
        name: What it is called in tables and figures.
        segments: What it was made of, oldest first.
        records: Measurements, oldest first, superseded ones dropped.
        costs: What measuring had cost, oldest first.
        damage: Lines of its files that could not be read, in words.
        declared: Its quantities, where there is no file that declares them.
    """

    name: str
    segments: Sequence[Segment]
    records: Sequence[Record]
    costs: Sequence[Cost] = ()
    damage: Sequence[str] = ()
    declared: Sequence[QuantityTable] = ()

    def __repr__(self) -> str:
        state = "finished" if self.is_finished else "interrupted or running"
        return f"<Run {self.name!r}: {len(self.records)} records, {state}>"

    @property
    def header(self) -> Mapping[str, Any]:
        """What the newest segment says of the run; empty for records without a file."""
        return self.segments[-1].header if self.segments else {}

    @cached_property
    def tables(self) -> list[QuantityTable]:
        """The quantities of its monitors, as the file declares them; by their keys alone where nothing does."""
        if self.declared:
            return list(self.declared)
        declared: dict[str, Any] = {}
        titles: dict[str, str] = {}
        for segment in self.segments:
            quantities = mapping(segment.header.get("quantities"))
            declared.update({key: each for key, each in quantities.items() if isinstance(each, Mapping)})
            titles.update({name: str(title) for name, title in mapping(segment.header.get("families")).items()})
        declared = declared or _inferred(self.records)
        families = dict.fromkeys(key.partition("/")[0] for key in declared)
        return [QuantityTable.described(family, titles.get(family, family), declared) for family in families]

    @cached_property
    def monitors(self) -> dict[str, str]:
        """The family of keys by the monitor's name, for those that measured something."""
        told = {
            name: str(monitor["family"])
            for segment in self.segments
            for name, monitor in mapping(segment.header.get("monitors")).items()
            if "family" in mapping(monitor)
        }
        families: dict[str, str] = {}
        for record in self.records:
            if record.monitor not in families and (record.scalars or record.monitor in told):
                first = next(iter(record.scalars), "").partition("/")[0]
                families[record.monitor] = told.get(record.monitor, first)
        return families

    @cached_property
    def keys(self) -> list[str]:
        """Full keys of all quantities that have a value somewhere, in the order in which they are declared."""
        found = _keys(self.records)
        declared = chain.from_iterable(table.keys() for table in self.tables)
        place = {key: i for i, key in enumerate(declared)}
        places = {key: place.get(self._declared_name(key), len(place)) for key in found}
        return sorted(found, key=lambda key: places[key])

    def series(self, key: str) -> Series:
        """A quantity over the run; empty where it was not measured."""
        points: dict[int, tuple[float, float]] = {}
        for record in self.records:
            if key in record.scalars:
                points[record.step] = record.scalars[key], record.errors.get(key, math.nan)
        steps = sorted(points)
        return Series(steps, [points[step][0] for step in steps], [points[step][1] for step in steps])

    def last(self, key: str) -> float:
        """The last value of a quantity; NaN where it was not measured."""
        values = self.series(key).values
        return values[-1] if values else math.nan

    def quantity(self, key: str) -> Quantity | None:
        """What the file declares under a full key."""
        return next((found for table in self.tables if (found := table.find(key)) is not None), None)

    @property
    def is_finished(self) -> bool:
        """Whether its last segment came to the end of a fit."""
        return any(record.final for record in (self.segments[-1].records if self.segments else self.records))

    @property
    def overhead(self) -> float:
        """Share of the wall-clock time that measuring took: at the last point; NaN where the file does not tell."""
        return self.costs[-1].overhead if self.costs else math.nan

    def _declared_name(self, key: str) -> str:
        quantity = self.quantity(key)
        return key if quantity is None else f"{key.partition('/')[0]}/{quantity.name}"


def mapping(thing: Any) -> Mapping[str, Any]:
    """What a header says, empty where it says something else than it should."""
    return thing if isinstance(thing, Mapping) else {}


def _keys(records: Iterable[Record]) -> dict[str, None]:
    """All keys in records, in the order in which they come."""
    return dict.fromkeys(key for record in records for key in record.scalars)


def _inferred(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """What records alone tell of their quantities."""
    names = {key: key.partition("/")[2] for key in _keys(records)}
    declared: dict[str, dict[str, Any]] = {
        key: {"symbol": name, "panel": name, "logged": True} for key, name in names.items()
    }
    arrays = dict.fromkeys(name for record in records for name in record.arrays)
    for start, form in (("density_nodes", "density"), ("from_init_squares", "diffusion"), ("q_", "phase")):
        families = dict.fromkeys(name.partition("/")[0] for name in arrays if name.partition("/")[2].startswith(start))
        declared.update({f"{family}/{form}": {"form": form} for family in families})
    for family in dict.fromkeys(key.partition("/")[0] for key in names if key.endswith("/cdnv")):
        declared[f"{family}/depth"] = {"form": "depth", "shows": [["nc1", "nc1_floor"], ["cdnv", None]]}
    return declared


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a run, oldest first, as if it had never been interrupted.

    Segments of a resumed run are joined: of a segment that was continued, what lies at or beyond the first step of the
    continuation is dropped, and what the continuation measured too. Where a directory holds several runs, the one that
    was begun last is read.

    Args:
        path: A run's directory, or one of its record files.

    Raises:
        FileNotFoundError: If there is no record file.
        ValueError: If a file was written by a newer version of this package.
    """
    return join_segments(read_segments(path))


def load_runs(*paths: str | os.PathLike[str]) -> list[Run]:
    """All runs in these places, oldest first, each as if it had never been interrupted.

    Args:
        paths: Directories of runs, directories above them (``lightning_logs``), or record files.

    Raises:
        FileNotFoundError: If there is no record file in one of them.
        ValueError: If a file was written by a newer version of this package, or none holds a run.
    """
    segments: list[Segment] = []
    damage: dict[Path, list[str]] = {}
    known: set[Path] = set()
    for path in paths:
        for file in record_files(path):
            if file.resolve() in known:
                continue
            known.add(file.resolve())
            read, damaged = _read(file)
            segments += read
            damage[file] = damaged
            for each in () if read else damaged:  # there is no run to tell of it
                warnings.warn(each, stacklevel=2)
    by_run: dict[str, list[Segment]] = {}
    for segment in sorted(segments, key=lambda segment: segment.time):
        by_run.setdefault(segment.run, []).append(segment)
    elsewhere: list[str] = []
    chains = [_chain(own, elsewhere) for own in by_run.values()]
    for each in elsewhere:
        warnings.warn(each, stacklevel=2)
    names = _names([whole[-1][0] for whole in chains])
    return [
        Run(
            name,
            [segment for segment, _ in whole],
            _joined_records(whole),
            _joined_costs(whole),
            [each for file in dict.fromkeys(s.file for s, _ in whole) for each in damage.get(file, ())],
        )
        for name, whole in zip(names, chains, strict=True)
    ]


def record_files(path: str | os.PathLike[str]) -> list[Path]:
    """The record files in a directory; where it has none of its own, those below it. Or the file itself.

    Raises:
        FileNotFoundError: If there is none.
    """
    place = Path(path)
    files = _files_in(place) if place.is_dir() else [place]
    if not files:
        seen: set[Path] = set()
        for folder, below, _ in os.walk(place, followlinks=True):
            below.sort()
            below[:] = [name for name in below if Path(folder, name).resolve() not in seen]
            seen |= {Path(folder, name).resolve() for name in below}
            files += _files_in(Path(folder))
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No record file in {place}: expected {STEM}.jsonl.")
    return files


def _files_in(directory: Path) -> list[Path]:
    """Record files, and no copies that somebody made."""
    return sorted(file for file in directory.glob(f"{STEM}*.jsonl") if _FILE.fullmatch(file.name))


def read_segments(path: str | os.PathLike[str]) -> list[Segment]:
    """All segments in a directory's record files, or in one file, in the order in which they were begun.

    Lines that are damaged (a killed process may leave half a line) are skipped with a warning that gives their number.
    """
    place = Path(path)
    files = _files_in(place) if place.is_dir() else [place]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No record file in {place}: expected {STEM}.jsonl.")
    segments: list[Segment] = []
    for file in files:
        found, damaged = _read(file)
        segments += found
        for each in damaged:
            warnings.warn(each, stacklevel=2)
    return sorted(segments, key=lambda segment: segment.time)


def join_segments(segments: Iterable[Segment]) -> list[Record]:
    """The newest segment with all that it continues, superseded records dropped."""
    ordered = list(segments)
    return _joined_records(_chain(ordered)) if ordered else []


def _chain(segments: Sequence[Segment], damage: list[str] | None = None) -> list[tuple[Segment, float]]:
    """The newest segment after all that it continues, each with the step from where on it does not count.

    Args:
        segments: In the order in which they were begun.
        damage: Where to tell of damaged lines of files that are found on the way.
    """
    known: dict[str, Segment] = {}
    for segment in segments:
        _keep_longer(known, segment)  # a copy of a file may be half of it
    current: Segment | None = known[segments[-1].name]
    limit = math.inf
    whole: list[tuple[Segment, float]] = []
    visited: set[str] = set()
    while current is not None and current.name not in visited:
        visited.add(current.name)
        whole.insert(0, (current, limit))
        parent = current.parent
        if parent is None:
            break
        limit = min(limit, parent.step)
        if parent.segment not in known and parent.file is not None:
            elsewhere = current.file.parent / parent.file
            if elsewhere.exists():
                found, damaged = _read(elsewhere)
                for segment in found:
                    _keep_longer(known, segment)
                if damage is not None:
                    damage += damaged
        current = known.get(parent.segment)
    return whole


def _keep_longer(known: dict[str, Segment], segment: Segment) -> None:
    other = known.get(segment.name)
    if other is None or len(segment.records) > len(other.records):
        known[segment.name] = segment


def _joined_records(parts: Sequence[tuple[Segment, float]]) -> list[Record]:
    joined: list[Record] = []
    for segment, limit in reversed(parts):
        newer = {(record.monitor, record.step) for record in joined}
        joined = [r for r in segment.records if r.step < limit and (r.monitor, r.step) not in newer] + joined
    return joined


def _joined_costs(parts: Sequence[tuple[Segment, float]]) -> list[Cost]:
    """The last one of each step."""
    by_step = {cost.step: cost for segment, limit in parts for cost in segment.costs if cost.step < limit}
    return [by_step[step] for step in sorted(by_step)]


def _names(segments: Sequence[Segment]) -> list[str]:
    """What runs are called: their directories, with as much of the path as tells them apart."""
    parts = [segment.file.resolve().parent.parts for segment in segments]
    names = []
    for i, own in enumerate(parts):
        others = [other for j, other in enumerate(parts) if j != i and other != own]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names.append("/".join(own[-length:]).lstrip("/"))
    return [
        name if names.count(name) == 1 else f"{name} ({segment.run[:6]})"
        for name, segment in zip(names, segments, strict=True)
    ]


def _read(file: Path) -> tuple[list[Segment], list[str]]:
    """The segments of a file, and its damaged lines in words."""
    segments: list[Segment] = []
    damage: list[str] = []
    is_lost = True  # whether the header that a record belongs to could not be read
    for number, line in _lines(file):
        try:
            content = json.loads(line)
            kind = content["type"]
            if kind == "header":
                is_lost = True
                segments.append(_segment(content, file))
                is_lost = False
            elif kind in ("record", "cost") and is_lost:
                raise ValueError("the header that it belongs to could not be read")
            elif kind == "record":
                segments[-1].records.append(Record.from_json(content))
            elif kind == "cost":
                segments[-1].costs.append(Cost.from_json(content))
        except _NewerSchemaError:
            raise ValueError(
                f"{file}, line {number}: written with schema {content['schema']}, this version reads up to {SCHEMA}. "
                "Install a newer lightning_dynamics."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            is_lost = is_lost or _HEADER in line
            damage.append(f"{file}, line {number} is damaged and was skipped: {error!r}")
    return segments, damage


def _segment(content: Mapping[str, Any], file: Path) -> Segment:
    """A segment with its header.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: If the header is damaged.
    """
    if int(content["schema"]) > SCHEMA:
        raise _NewerSchemaError
    segment = Segment({**content, "segment": content["segment"], "run": content["run"]}, file)
    _ = segment.parent, segment.time, Run("", [segment], ()).tables  # which have to be readable
    return segment


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


class _NewerSchemaError(Exception):
    pass
