"""From numbers to whatever loggers a Trainer has: one call per logger and measurement."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from lightning_dynamics.recording.charts import Layout, custom_scalars_layout, merged_layouts
from lightning_dynamics.recording.figures.style import View, rendered
from lightning_dynamics.recording.quantity import QuantityTable
from lightning_dynamics.recording.tensorboard import found_layout

_FIGURES = frozenset({1, 2, 4, 8, 16, 32, 64, 256, 1024})  # and the last: ten, as many of a kind as TensorBoard shows


@dataclass(frozen=True)
class Display:
    """What loggers show besides curves.

    Attributes:
        layout: Whether charts are laid out where the logger has a place for it.
        extra_layout: Charts of the user's own, to go with them.
        figures: Whether figures are drawn.
    """

    layout: bool = True
    extra_layout: Layout = field(default_factory=dict)
    figures: bool = True


class LoggerWriter:
    """Writes measurements to loggers, each by what it can show. Only ever used on rank zero.

    A logger that fails costs its own copy of a point and one warning, never the run.

    Args:
        loggers: Lightning loggers.
        on_failure: Told about each failure, for the record's count.
        display: What is shown besides curves.
        say: Told what the user should know.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        on_failure: Callable[[], None] = lambda: None,
        display: Display | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._loggers = list(loggers)
        self._on_failure = on_failure
        self._display = display or Display()
        self._say = say
        self._warned: set[str] = set()
        self._drawn: dict[str, int] = {}
        self._to_lay_out: list[QuantityTable] = []

    def begin(self, tables: Iterable[QuantityTable], about: str) -> None:
        """Explain the keys, once per run, where the logger has a place for it.

        Charts are laid out with the first point: by then others have laid out theirs, which would replace them.
        """
        tables = list(tables)
        self._to_lay_out = tables if self._display.layout else []
        for logger in self._loggers:
            self._guard(logger, partial(_introduce, logger, tables, about))

    def write(self, scalars: Mapping[str, float], step: int, views: Sequence[View] = (), is_last: bool = False) -> None:
        """Log the finite ones of these values at x = ``step``, all in one call; and what can be drawn.

        Args:
            scalars: Values by key.
            step: x.
            views: What can be drawn of this step.
            is_last: Whether training has ended.
        """
        finite: dict[str, Any] = {key: float(value) for key, value in scalars.items() if math.isfinite(value)}
        if not finite and not views:
            return
        tables, self._to_lay_out = self._to_lay_out, []
        if tables:
            for logger in self._loggers:
                self._guard(logger, partial(self._lay_out, logger, tables))
        drawn = [_Drawn(view, self._image(view, step, is_last) if self._shows_images else None) for view in views]
        for logger in self._loggers:
            self._guard(logger, partial(_write, logger, finite, step, drawn))

    def _lay_out(self, logger: Any, tables: list[QuantityTable]) -> None:
        experiment = logger.experiment
        if not hasattr(experiment, "add_custom_scalars"):
            return
        own = merged_layouts(self._display.extra_layout, custom_scalars_layout(tables))
        found = _already_in(experiment)
        others = {title: charts for title, charts in found.items() if title not in own}
        experiment.add_custom_scalars(merged_layouts(others, own, found))
        if others:
            self._say(
                f"TensorBoard's Custom Scalars of this run already had charts ({', '.join(others)}). It shows only the "
                "layout that is written last, so they were taken over into that of lightning_dynamics. "
                "`Dashboard(extra_layout=...)` says from the start what should stand in it."
            )

    @property
    def _shows_images(self) -> bool:
        return self._display.figures and any(_draws(logger) for logger in self._loggers)

    def _image(self, view: View, step: int, is_last: bool) -> Tensor | None:
        """The picture of a view; not of each one, since TensorBoard shows ten of a kind."""
        self._drawn[view.key] = count = self._drawn.get(view.key, 0) + 1
        if count not in _FIGURES and not is_last:
            return None
        try:
            return rendered(view.figure(step))
        except ImportError:
            if "matplotlib" not in self._warned:
                self._warned.add("matplotlib")
                warnings.warn("Only histograms are logged: figures need matplotlib.", stacklevel=2)
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


@dataclass(frozen=True)
class _Drawn:
    """A view, its histogram and its picture, as far as there are any."""

    view: View
    image: Tensor | None

    @cached_property
    def histogram(self) -> tuple[Tensor, Tensor] | None:
        return self.view.histogram()

    @property
    def image_key(self) -> str:
        """The key, unless a histogram has it."""
        return self.view.key if self.histogram is None else f"{self.view.key}_figure"


def _write(logger: Any, scalars: Mapping[str, Any], step: int, drawn: Sequence[_Drawn]) -> None:
    row = dict(scalars)
    if drawn and _is_wandb(logger):
        # one row per measurement: everything in one call
        row.update(_for_wandb(drawn))
    if row:
        logger.log_metrics(row, step=step)
    if drawn and not _is_wandb(logger) and _is_tensorboard(logger):
        for each in drawn:
            if each.histogram is not None:
                _add_histogram(logger.experiment, each.view.key, *each.histogram, step)
            if each.image is not None:
                logger.experiment.add_image(each.image_key, each.image, step, dataformats="HWC")


def _add_histogram(experiment: Any, key: str, values: Tensor, edges: Tensor, step: int) -> None:
    """Values times widths: TensorBoard sorts all steps into bins of its own, where heights would else follow widths."""
    middles = (edges[1:] + edges[:-1]) / 2
    areas = values * edges.diff()
    experiment.add_histogram_raw(
        key,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=float(areas.sum()),
        sum=float((areas * middles).sum()),
        sum_squares=float((areas * middles.square()).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=areas.tolist(),
        global_step=step,
    )


def _for_wandb(drawn: Sequence[_Drawn]) -> dict[str, Any]:
    import wandb

    row: dict[str, Any] = {}
    for each in drawn:
        if each.histogram is not None:
            values, edges = each.histogram
            row[each.view.key] = wandb.Histogram(np_histogram=(values.numpy(), edges.numpy()))
        if each.image is not None:
            row[each.image_key] = wandb.Image(each.image.numpy())
    return row


def _introduce(logger: Any, tables: list[QuantityTable], about: str) -> None:
    experiment = logger.experiment
    if hasattr(experiment, "add_custom_scalars"):  # TensorBoard
        experiment.add_text("about/lightning_dynamics", about, 0)
    elif hasattr(experiment, "define_metric"):  # W&B: Lightning's own definition is missing where a run existed before
        for table in tables:
            experiment.define_metric(f"{table.family}/*", step_metric="trainer/global_step", summary="last")


def _already_in(experiment: Any) -> dict[str, dict[str, list[Any]]]:
    """The layout that stands in a run, as far as it can be read."""
    try:
        experiment.flush()
        return found_layout(experiment.log_dir)
    except Exception:  # no directory of this machine's
        return {}
