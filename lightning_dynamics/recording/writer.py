"""From numbers to whatever loggers a Trainer has: one call per logger and measurement."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_dynamics.recording.charts import custom_scalars_layout
from lightning_dynamics.recording.figures import DensityView, rendered
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
        self._drawn: dict[str, int] = {}

    def begin(self, tables: Iterable[QuantityTable], about: str) -> None:
        """Lay out the charts and explain the keys, once per run, where the logger has a place for it."""
        tables = list(tables)
        for logger in self._loggers:
            self._guard(logger, partial(_introduce, logger, tables, about))

    def write(self, scalars: Mapping[str, float], step: int, densities: Sequence[DensityView] = ()) -> None:
        """Log the finite ones of these values at x = ``step``, all in one call; and spectra, where they can be drawn.

        Args:
            scalars: Values by key.
            step: x.
            densities: Spectra of this step.
        """
        finite: dict[str, Any] = {key: float(value) for key, value in scalars.items() if math.isfinite(value)}
        if not finite and not densities:
            return
        images = {view.key: self._image(view, step) for view in densities if self._shows_images}
        for logger in self._loggers:
            self._guard(logger, partial(_write, logger, finite, step, densities, images))

    @property
    def _shows_images(self) -> bool:
        return any(_draws(logger) for logger in self._loggers)

    def _image(self, view: DensityView, step: int) -> Tensor | None:
        """The picture of a spectrum; not of each one, since TensorBoard shows ten of a kind."""
        self._drawn[view.key] = count = self._drawn.get(view.key, 0) + 1
        if count & (count - 1):  # the first, second, fourth, eighth …
            return None
        try:
            return rendered(view.figure(step))
        except ImportError:
            if "matplotlib" not in self._warned:
                self._warned.add("matplotlib")
                warnings.warn("Spectra are logged as histograms only: figures need matplotlib.", stacklevel=2)
        except Exception as error:
            self._on_failure()
            warnings.warn(f"A figure of {view.key} could not be drawn: {error!r}", stacklevel=2)
        return None

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


def _is_tensorboard(logger: Any) -> bool:
    return hasattr(logger.experiment, "add_custom_scalars")


def _is_wandb(logger: Any) -> bool:
    return hasattr(logger.experiment, "define_metric")


def _draws(logger: Any) -> bool:
    try:
        return _is_tensorboard(logger) or _is_wandb(logger)
    except Exception:  # a logger that fails is reported when it is written to
        return False


def _write(
    logger: Any, scalars: Mapping[str, Any], step: int, densities: Sequence[DensityView], images: Mapping[str, Any]
) -> None:
    row = dict(scalars)
    if densities and _is_wandb(logger):
        # one row per measurement: everything in one call
        row.update(_for_wandb(densities, images))
    if row:
        logger.log_metrics(row, step=step)
    if densities and not _is_wandb(logger) and _is_tensorboard(logger):
        for view in densities:
            values, edges = view.histogram()
            middles = (edges[1:] + edges[:-1]) / 2
            logger.experiment.add_histogram_raw(
                view.key,
                min=float(edges[0]),
                max=float(edges[-1]),
                num=float(values.sum()),
                sum=float((values * middles).sum()),
                sum_squares=float((values * middles.square()).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=values.tolist(),
                global_step=step,
            )
            image = images.get(view.key)
            if image is not None:
                logger.experiment.add_image(f"{view.key}_figure", image, step, dataformats="HWC")


def _for_wandb(densities: Sequence[DensityView], images: Mapping[str, Any]) -> dict[str, Any]:
    import wandb

    row: dict[str, Any] = {}
    for view in densities:
        values, edges = view.histogram()
        row[view.key] = wandb.Histogram(np_histogram=(values.numpy(), edges.numpy()))
        image = images.get(view.key)
        if image is not None:
            row[f"{view.key}_figure"] = wandb.Image(image.numpy())
    return row


def _introduce(logger: Any, tables: list[QuantityTable], about: str) -> None:
    experiment = logger.experiment
    if hasattr(experiment, "add_custom_scalars"):  # TensorBoard
        experiment.add_custom_scalars(custom_scalars_layout(tables))
        experiment.add_text("about/lightning_dynamics", about, 0)
    elif hasattr(experiment, "define_metric"):  # W&B: Lightning's own definition is missing where a run existed before
        for table in tables:
            experiment.define_metric(f"{table.family}/*", step_metric="trainer/global_step", summary="last")
