"""From numbers to whatever loggers a Trainer has: one call per logger and measurement."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_dynamics.recording.charts import custom_scalars_layout
from lightning_dynamics.recording.quantity import QuantityTable


class LoggerWriter:
    """Writes measurements to loggers, each by what it can show. Only ever used on rank zero.

    A logger that fails costs its own copy of a point and one warning, never the run.

    Args:
        loggers: Lightning loggers.
        on_failure: Told about each failure, for the record's count.
    """

    def __init__(self, loggers: Sequence[Any], on_failure: Callable[[], None] = lambda: None) -> None:
        self._loggers = list(loggers)
        self._on_failure = on_failure
        self._warned: set[str] = set()

    def begin(self, tables: Iterable[QuantityTable], about: str) -> None:
        """Lay out the charts and explain the keys, once per run, where the logger has a place for it."""
        tables = list(tables)
        for logger in self._loggers:
            self._guard(logger, partial(_introduce, logger, tables, about))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Log the finite ones of these values at x = ``step``, all in one call."""
        finite = {key: float(value) for key, value in scalars.items() if math.isfinite(value)}
        if not finite:
            return
        for logger in self._loggers:
            self._guard(logger, partial(logger.log_metrics, dict(finite), step=step))

    def _guard(self, logger: Any, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._on_failure()
            name = type(logger).__name__
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} failed and misses points of lightning_dynamics from here on: {error!r}. The records are "
                    "complete.",
                    stacklevel=2,
                )


def _introduce(logger: Any, tables: list[QuantityTable], about: str) -> None:
    experiment = logger.experiment
    if hasattr(experiment, "add_custom_scalars"):  # TensorBoard
        experiment.add_custom_scalars(custom_scalars_layout(tables))
        experiment.add_text("about/lightning_dynamics", about, 0)
    elif hasattr(experiment, "define_metric"):  # W&B: Lightning's own definition is missing where a run existed before
        for table in tables:
            experiment.define_metric(f"{table.family}/*", step_metric="trainer/global_step", summary="last")
