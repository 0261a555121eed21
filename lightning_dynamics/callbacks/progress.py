"""What the Trainer's progress bar says while measuring takes long."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

_PATIENCE = 3.0  # seconds that work may take without a word
_INTERVAL = 1.0  # seconds between two texts
_MARKUP = re.compile(r"\[(?=[a-z#/@])")  # what Rich would take for the beginning of a style


class Line(Protocol):
    """Where a text can stand in a progress bar."""

    def write(self, text: str) -> None:
        """Show a text beside the bar's own description."""

    def restore(self) -> None:
        """Show the bar's own description only."""


class Progress:
    """Tells the progress bar of a Trainer what it is waiting for, on rank zero and where there is one.

    Work is shown once it has taken some seconds; then at every :meth:`beat`, but not more often than once a second.
    Work of a kind that took long the last time is shown at once, since not all of it has beats. Afterwards the bar's
    description is what it was. Nothing is ever raised: a bar that fails costs the display.

    Args:
        trainer: Gives the Trainer, None where there is none.
        clock: Seconds from anywhere.
    """

    def __init__(
        self,
        trainer: Callable[[], Trainer | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._clock = clock
        self._slow: set[Hashable] = set()
        self._fails = False
        self._work: str | None = None
        self._units = ("", "")
        self._count = 0
        self._started = self._told = 0.0
        self._line: Line | None = None
        self._otherwise: Callable[[str], None] | None = None

    @contextmanager
    def during(
        self,
        work: str,
        *,
        units: tuple[str, str] = ("evaluation", "evaluations"),
        kind: Hashable = None,
        otherwise: Callable[[str], None] | None = None,
    ) -> Iterator[None]:
        """While the context is open, this is what is being done.

        Args:
            work: In a few words.
            units: What beats count: one, and several.
            kind: What work that takes about as long has in common; by default the words.
            otherwise: Told once, if it takes long and there is no bar to show it in.
        """
        trainer = self._trainer()
        if trainer is None or not trainer.is_global_zero:
            yield
            return
        kind = work if kind is None else kind
        self._work, self._units, self._count, self._otherwise = work, units, 0, otherwise
        self._started = self._told = self._clock()
        if kind in self._slow:
            self._tell()
        try:
            yield
        finally:
            is_slow = self._clock() - self._started > _PATIENCE
            (self._slow.add if is_slow else self._slow.discard)(kind)
            self._work, self._otherwise = None, None
            line, self._line = self._line, None
            if line is not None:
                self._try_to(line.restore)

    def now(self, work: str) -> None:
        """Within the same work, this comes next."""
        if self._work is not None:
            self._work = work

    def beat(self, count: int = 1) -> None:
        """So many more evaluations begin, or whatever the work counts; 0 for a part of one."""
        if self._work is None:
            return
        self._count += count
        now = self._clock()
        if now - self._started > _PATIENCE and now - self._told >= _INTERVAL:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        seconds = self._told - self._started
        count = f", {self._count} {self._units[self._count > 1]}" if self._count else ""
        text = f"{self._work}{f', {seconds:.0f} s' if seconds >= 1 else ''}{count}"
        if self._line is None and not self._fails:
            self._line = self._find()
        if self._line is not None and not self._fails:
            line = self._line
            self._try_to(lambda: line.write(text))
        elif self._line is None and self._otherwise is not None:
            otherwise, self._otherwise = self._otherwise, None
            self._try_to(lambda: otherwise(text))

    def _find(self) -> Line | None:
        trainer = self._trainer()
        try:
            return None if trainer is None else _line_of(trainer.progress_bar_callback)
        except Exception:  # no bar yet
            return None

    def _try_to(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:
            self._fails = True


def _line_of(callback: Any) -> Line | None:
    """The place in the bar that shows training; None where there is none, or it is not shown."""
    if isinstance(callback, TQDMProgressBar):
        bar = callback.train_progress_bar
        return None if bar.disable else _TqdmLine(bar)
    if isinstance(callback, RichProgressBar) and callback.is_enabled and callback.progress is not None:
        return _RichLine(callback.progress, callback.train_progress_bar)
    return None


class _TqdmLine:
    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._own: str = bar.desc

    def write(self, text: str) -> None:
        self._bar.set_description_str(f"{self._own}{text}: ")

    def restore(self) -> None:
        self._bar.set_description_str(self._own)


class _RichLine:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress = progress
        self._task = task.id
        self._own: str = task.description

    def write(self, text: str) -> None:
        plain = _MARKUP.sub(r"\\[", text)
        self._set(f"{self._own.rstrip()}: {plain}")

    def restore(self) -> None:
        self._set(self._own)

    def _set(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        self._progress.refresh()
