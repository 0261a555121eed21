"""Curves over steps: what a pair of axes shows, said without saying who draws it; and drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lightning_dynamics.recording.figures.style import (
    GREY,
    PALE,
    house_style,
    is_drawn,
    linear_limits,
    log_limits,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["line", "dashed", "dotted"]

_STYLES: dict[str, Any] = {"line": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5))}
_MOST = 1000  # points of a curve that are drawn
_MARKED = 40  # points that are few enough to be marked one by one
_COLUMNS = 3
_SIZE = (3.1, 2.25)  # of a panel, in inches, without its legend
_LEGEND_LINE = 0.16
_LETTERS = 42  # of a name in a legend


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: What it is.
        x: Steps, ascending.
        y: Values; NaN where there is none.
        colour: Its colour, ``#rrggbb``.
        run: The run that it is of, where there are several.
        style: How it is drawn.
        error: Errors of the values, drawn as a band; NaN where there is none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    run: str = ""
    style: Style = "line"
    error: Sequence[float] | None = None

    def thinned(self, most: int = _MOST) -> Curve:
        """The same with at most this many points: of each stretch of steps the smallest and the largest value."""
        if len(self.x) <= most:
            return self
        kept = kept_points(self.y, most)
        error = None if self.error is None else [self.error[i] for i in kept]
        return replace(self, x=[self.x[i] for i in kept], y=[self.y[i] for i in kept], error=error)


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What is shown.
        curves: The lines, in the order in which they are drawn.
        unit: Unit of the values; empty where they have none.
        scale: Of the axis of values; where ``"log"`` finds nothing positive it is linear.
        levels: Horizontal lines: value and label.
        marks: Vertical lines: step, label and colour.
        x_label: What x is.
    """

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    scale: Literal["linear", "log"] = "linear"
    levels: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str, str]] = ()
    x_label: str = "step"

    @property
    def y_label(self) -> str:
        """The unit, as an axis shows it."""
        return "" if self.unit in ("", "1") else self.unit

    @property
    def is_log(self) -> bool:
        """Whether the axis of values is logarithmic after all."""
        return self.scale == "log" and any(value > 0 for curve in self.curves for value in curve.y)

    @property
    def labels(self) -> list[tuple[str, str, Style]]:
        """What its lines are called, with colour and style; grey where several runs share a label."""
        found: dict[tuple[str, Style], set[str]] = {}
        for curve in self.curves:
            found.setdefault((curve.label, curve.style), set()).add(curve.colour)
        return [
            (label, colours.copy().pop() if len(colours) == 1 else GREY, style)
            for (label, style), colours in found.items()
        ]


def kept_points(values: Sequence[float], most: int) -> list[int]:
    """At most this many places, ascending: first, last, and of each bin those of the smallest and the largest value."""
    if len(values) <= most:
        return list(range(len(values)))
    bins = max(1, (most - 2) // 2)
    kept = {0, len(values) - 1}
    for i in range(bins):
        places = range(i * len(values) // bins, (i + 1) * len(values) // bins)
        known = [place for place in places if not math.isnan(values[place])] or list(places[:1])
        kept |= {min(known, key=lambda place: values[place]), max(known, key=lambda place: values[place])}
    return sorted(kept)


def runs_of(panels: Sequence[Panel]) -> dict[str, str]:
    """Colours by run, where there are several."""
    return {curve.run: curve.colour for panel in panels for curve in panel.curves if curve.run}


@house_style
def draw(panels: Sequence[Panel], *, title: str = "", columns: int = _COLUMNS, with_runs: bool = True) -> Figure:
    """Panels side by side, each with a legend of its own, and one of the runs on top.

    A report draws each panel by itself, so that they flow on a narrow screen.

    Args:
        panels: The panels.
        title: What stands above them.
        columns: How many stand side by side at most.
        with_runs: Whether to say which colour is which run, where there are several.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = runs_of(panels) if with_runs else {}
    columns = max(1, min(columns, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    width = columns * (_SIZE[0] + 0.55) + 0.1
    lines = list(_rows_of_legend(runs, width))
    head = (0.26 if title else 0.0) + 0.2 * len(lines) + 0.06
    under = [max(map(_legend_lines, panels[row * columns : (row + 1) * columns]), default=0) for row in range(rows)]
    heights = [_SIZE[1] + 0.32 + _LEGEND_LINE * count for count in under]
    height = head + sum(heights)
    figure = Figure(figsize=(width, height), dpi=120)
    top = height - head
    for row in range(rows):
        for column, panel in enumerate(panels[row * columns : (row + 1) * columns]):
            legend = _LEGEND_LINE * under[row]
            place = (
                (column * (_SIZE[0] + 0.55) + 0.58) / width,
                (top - heights[row] + 0.46 + legend) / height,
                (_SIZE[0] - 0.13) / width,
                (heights[row] - 0.74 - legend) / height,
            )
            _draw_panel(figure.add_axes(place), panel)
        top -= heights[row]
    if title:
        figure.text(0.5, 1 - 0.06 / height, plain(title), ha="center", va="top", fontsize=10.5)
    for i, names in enumerate(lines):
        figure.legend(
            handles=[Line2D([], [], color=runs[name], linewidth=2, label=plain(_cut(name))) for name in names],
            loc="upper left",
            bbox_to_anchor=(0.5 / width, 1 - ((0.28 if title else 0.04) + 0.2 * i) / height),
            ncols=len(names),
            fontsize=8,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.4,
            columnspacing=1.2,
        )
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    is_log = panel.is_log
    shown: list[float] = []
    bands: list[float] = []
    lowest: list[tuple[float, str]] = []  # what a logarithmic axis cannot show
    for curve in (curve.thinned() for curve in panel.curves):
        y = [value if _is_shown(value, is_log) else math.nan for value in curve.y]
        shown += [value for value in y if not math.isnan(value)]
        if is_log:
            lowest += [(x, curve.colour) for x, value in zip(curve.x, curve.y, strict=True) if -math.inf < value <= 0]
        known = sum(not math.isnan(value) for value in y)
        axes.plot(
            curve.x,
            y,
            linestyle=_STYLES[curve.style],
            color=curve.colour,
            linewidth=1.3 if curve.style == "line" else 1.2,
            marker="o" if known <= _MARKED and curve.style == "line" else None,
            markersize=2.6,
            zorder=3 if curve.style == "line" else 2.5,
        )
        alone = _alone(y)  # what a line does not show
        axes.plot([curve.x[k] for k in alone], [y[k] for k in alone], "o", color=curve.colour, markersize=2.6, zorder=3)
        if curve.error is not None:
            bands += _draw_errors(axes, curve, y, is_log)
    shown += [level for level, _ in panel.levels if _is_shown(level, is_log)]
    axes.set_autoscale_on(False)
    if is_log:
        axes.set_yscale("log")
        log_limits(axes, "y", [*shown, *_near(bands, shown, is_log)], 0.06)
    else:
        linear_limits(axes, "y", [*shown, *_near(bands, shown, is_log)], 0.06)
    steps = [float(x) for curve in panel.curves for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    linear_limits(axes, "x", steps, 0.03)
    for place, colour in lowest:
        axes.plot([place], [0.0], "v", color=colour, markersize=3, clip_on=False, transform=axes.get_xaxis_transform())
    for level, label in panel.levels:
        axes.axhline(level, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
        if label:
            axes.annotate(
                plain(label), (1, level), (-1, 1.5), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="bottom", fontsize=6.5, color=GREY,
            )  # fmt: skip
    for step, label, colour in panel.marks:
        axes.axvline(step, color=colour, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
        if label:
            axes.annotate(
                plain(label), (step, 0.02), (2, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, ha="left", va="bottom", fontsize=6.5, color=colour,
            )  # fmt: skip
    axes.set_title(plain(panel.title), fontsize=8.5, loc="left", pad=4)
    axes.set_xlabel(panel.x_label, fontsize=7.5, labelpad=2)
    if panel.y_label:
        axes.annotate(
            plain(f"[{panel.y_label}]"), (1, 1), (0, 4), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="bottom", fontsize=7, color=GREY,
        )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, length=2.5, pad=2)
    axes.grid(axis="y", color=PALE, linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    if not shown:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no values", ha="center", fontsize=7.5, color=GREY, transform=axes.transAxes)
    _draw_legend(axes, panel)


def _draw_errors(axes: Axes, curve: Curve, y: Sequence[float], is_log: bool) -> list[float]:
    """A band where neighbours have errors, bars where they stand alone; returns their ends."""
    assert curve.error is not None
    known = [math.isfinite(value) and math.isfinite(error) for value, error in zip(y, curve.error, strict=True)]
    floor = 1e-300 if is_log else -math.inf
    low = [max(v - e, floor) if k else math.nan for v, e, k in zip(y, curve.error, known, strict=True)]
    high = [v + e if k else math.nan for v, e, k in zip(y, curve.error, known, strict=True)]
    if not any(b > a for a, b in zip(low, high, strict=True)):
        return []
    axes.fill_between(curve.x, low, high, where=known, color=curve.colour, alpha=0.18, linewidth=0)
    for k in _alone(high):
        axes.plot([curve.x[k]] * 2, [low[k], high[k]], color=curve.colour, alpha=0.5, linewidth=1)
    return [end for end in (*low, *high) if _is_shown(end, is_log)]


def _alone(values: Sequence[float]) -> list[int]:
    """Places of values without a neighbour."""
    known = [False, *(not math.isnan(value) for value in values), False]
    return [k - 1 for k in range(1, len(known) - 1) if known[k] and not known[k - 1] and not known[k + 1]]


def _near(bands: Sequence[float], values: Sequence[float], is_log: bool) -> list[float]:
    """Ends of bands, as far as they do not make the curves small."""
    if not values:
        return []
    low, high = min(values), max(values)
    if low == high:
        return list(bands)
    if is_log:
        reach = (high / low) ** 0.25
        low, high = low / reach, high * reach
    else:
        reach = 0.25 * (high - low)
        low, high = low - reach, high + reach
    return [min(max(end, low), high) for end in bands]


def _draw_legend(axes: Axes, panel: Panel) -> None:
    from matplotlib.lines import Line2D

    if not _legend_lines(panel):
        return
    axes.legend(
        handles=[
            Line2D([], [], color=colour, linestyle=_STYLES[style], linewidth=1.4, label=plain(_cut(label)))
            for label, colour, style in panel.labels
        ],
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + _below(axes),
        ncols=_legend_columns(panel),
        fontsize=7,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.5,
        columnspacing=1.0,
        labelspacing=0.2,
    )


def _below(axes: Axes) -> Any:
    """Down to where the label of x has ended."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure()
    assert figure is not None
    return ScaledTranslation(0, -0.4, figure.dpi_scale_trans)


def _legend_columns(panel: Panel) -> int:
    longest = max((len(_cut(label)) for label, *_ in panel.labels), default=1)
    return max(1, min(len(panel.labels), int(48 / (longest + 5))))


def _legend_lines(panel: Panel) -> int:
    """Lines that the legend takes; none where the title says it all."""
    labels = panel.labels
    return 0 if len(labels) < 2 else -(-len(labels) // _legend_columns(panel))


def _rows_of_legend(runs: dict[str, str], width: float) -> Iterator[list[str]]:
    """Names of runs in lines that fit."""
    line: list[str] = []
    room = width - 0.6
    for name in runs:
        needed = 0.42 + 0.075 * len(_cut(name))
        if line and needed > room:
            yield line
            line, room = [], width - 0.6
        line.append(name)
        room -= needed
    if line:
        yield line


def _cut(name: str) -> str:
    """Without its middle, if it is long: names differ at their ends."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[:half]}…{name[-half:]}"


def _is_shown(value: float, is_log: bool) -> bool:
    return is_drawn(value) if is_log else abs(value) < 1e150
