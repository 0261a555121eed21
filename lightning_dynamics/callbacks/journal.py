"""Where a session's numbers go: the record file, the loggers, the history; and how they survive a resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.header import facts, without_secrets
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.recording.figures.style import View
from lightning_dynamics.recording.figures.views import views_of
from lightning_dynamics.recording.quantity import QuantityTable, about_text
from lightning_dynamics.recording.reading import join_segments, read_segments
from lightning_dynamics.recording.record import Cost, Parent, Record, RecordFile, new_name
from lightning_dynamics.recording.writer import Display, LoggerWriter


class Journal:
    """The records of one run, over all of its process lives. On every rank; only rank zero has a file and loggers.

    Attributes:
        records: All records, those before a resume included, superseded ones dropped.
        path: The record file, None where nothing is written.
        failures: Writes that failed, to the file and to loggers.
    """

    def __init__(
        self,
        run: str,
        directory: Path | None,
        loggers: Sequence[Any],
        display: Display | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.records: list[Record] = []
        self._run = run
        self._directory = directory
        self._file: RecordFile | None = None
        self._segment: str | None = None
        self._parent: tuple[str, str | None] | None = None
        self._writer = LoggerWriter(loggers, self._logger_failed, display, say)
        self._tables: list[QuantityTable] = []
        self._warned = False
        self.failures = 0

    @classmethod
    def open(
        cls,
        trainer: Trainer,
        ranks: Ranks,
        previous: Journal | None,
        lineage: Mapping[str, Any] | None,
        display: Display,
        say: Callable[[str], None],
    ) -> Journal:
        """The journal of the fit that is about to start: a new run, or one that goes on.

        Args:
            trainer: The Trainer.
            ranks: The ranks.
            previous: The journal of this Trainer's last fit in this process.
            lineage: What a checkpoint says of the run that it is from.
            display: What loggers show besides curves.
            say: Told what the user should know.
        """
        run = ranks.share(lineage["run"] if lineage else previous._run if previous else new_name())
        writes = ranks.leads and not _compat.is_trial(trainer)
        directory = _run_directory(trainer, run) if writes else None
        journal = cls(run, directory, trainer.loggers if writes else [], display, say)
        if previous is not None and previous._run == run:
            journal._file = previous._file
            journal.records = previous.records
            if previous._segment is not None:
                journal._parent = (previous._segment, previous.path)
        if lineage:
            journal._parent = (lineage["segment"], lineage["file"])
            if previous is None or previous._segment != lineage["segment"]:
                journal.records = _records_of(lineage)
        return journal

    @property
    def path(self) -> str | None:
        return None if self._file is None else str(self._file.path)

    @property
    def directory(self) -> Path | None:
        """The run's directory, on rank zero; None where nothing is written."""
        return self._directory

    def begin(
        self,
        step: int,
        header: Mapping[str, Any],
        tables: Sequence[QuantityTable],
        shown: Sequence[QuantityTable],
    ) -> None:
        """Begin a segment at its first step: what an interrupted one had recorded from there on does not count.

        Args:
            step: First step.
            header: What the header line says besides its names.
            tables: The monitors' tables.
            shown: What of them comes to the loggers.
        """
        self.records = [record for record in self.records if record.step < step]
        self._segment = new_name()
        if self._directory is None:
            return
        if self._file is None:
            self._try_to(self._open)
        parent = None if self._parent is None else Parent(self._parent[0], step, self._parent[1])
        quantities: dict[str, Any] = {}
        for table in tables:
            quantities.update(table.describe())
        for key in chain.from_iterable(table.keys() for table in shown):
            quantities[key]["logged"] = True  # what `also_log` adds, too
        if self._file is not None:
            titles = {table.family: table.title for table in tables}
            line = {**header, "families": titles, "quantities": quantities}
            self._try_to(partial(self._file.begin, self._run, self._segment, parent, line))
        self._tables = list(tables)
        self._writer.begin(shown, about_text(tables, facts(header), shown))

    def write(self, records: Iterable[Record], logged: Mapping[str, float], cost: Cost) -> None:
        """Keep records of one step, and log values at it in one call.

        Args:
            records: The records.
            logged: Values by key.
            cost: What measuring has cost by this step.
        """
        views: list[View] = []
        is_last = False
        for found in records:
            record = replace(found, notes=without_secrets(found.notes))
            is_last = is_last or record.final
            # a resumed run may finish a pair that the interrupted one finished after its checkpoint
            self.records = [r for r in self.records if r.step != record.step or r.monitor != record.monitor]
            self.records.append(record)
            if self._file is not None:
                self._try_to(partial(self._file.append, record))
            views += views_of(record, list(self.records), self._tables)
        if self._file is not None:
            self._try_to(partial(self._file.append_cost, cost))
        self._writer.write(logged, cost.step, views, is_last)

    def lineage(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with this run."""
        return {"run": self._run, "segment": self._segment, "file": self.path}

    def _open(self) -> None:
        assert self._directory is not None
        self._file = RecordFile(self._directory)

    def _try_to(self, write: Callable[[], None]) -> None:
        """A disk that is full, or a value that cannot be written, costs lines of the record file, not the run."""
        try:
            write()
        except Exception as error:
            self.failures += 1
            if not self._warned:
                self._warned = True
                warnings.warn(f"The record file of lightning_dynamics misses lines: {error}.", stacklevel=2)

    def _logger_failed(self) -> None:
        self.failures += 1


def _run_directory(trainer: Trainer, run: str) -> Path:
    """A directory of this run's own, beside what its first logger writes."""
    root = Path(trainer.default_root_dir)
    if not trainer.loggers:
        return root / "dynamics_runs" / run
    logger = trainer.loggers[0]
    own = getattr(logger, "log_dir", None)
    if own:
        return Path(own)
    version = logger.version if logger.version is not None else run
    name = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.save_dir or root) / str(logger.name or "lightning_dynamics") / name


def _records_of(lineage: Mapping[str, Any]) -> list[Record]:
    """The records of the interrupted run, if its file is still where it was."""
    file = lineage["file"]
    if file is None or not Path(file).exists():
        return []
    segments = read_segments(file)
    names = [segment.name for segment in segments]
    if lineage["segment"] not in names:
        return []
    return join_segments(segments[: names.index(lineage["segment"]) + 1])
