"""Spectra of several times and runs: side by side, over time, and how their eigenvectors turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.figures.style import (
    GREY,
    VERMILION,
    house_style,
    linear_limits,
    plain,
    time_colours,
)
from lightning_dynamics.recording.reading import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spectra = Sequence[tuple[Run, Sequence[tuple[int, DensityView]]]]
"""Runs with their spectra, each at its step."""

_MOST = 6  # times of one run
_IN_A_ROW = 3
_ROWS = 4  # runs
_BINS = 160
_NUMBERED = 5  # eigenvectors whose overlaps are written out
_TIMES = 4


@house_style
def draw_spectra(found: Spectra) -> Figure:
    """Small multiples: several times of one run, or the first, a middle and the last one of several runs."""
    from matplotlib.figure import Figure

    several = len(found) > 1
    rows = [
        (run, [views[i] for i in _spread(len(views), _IN_A_ROW if several else _MOST)]) for run, views in found[:_ROWS]
    ]
    places = [(run, step, view) for run, views in rows for step, view in _padded(views, several)]
    drawn = [view for _, _, view in places if view is not None]
    left = min(view.extent[0] for view in drawn)
    right = max(view.extent[1] for view in drawn)
    grid = torch.linspace(left, right, 400, dtype=torch.float64)
    most = max(float(view.counts(grid).max()) for view in drawn)
    columns = min(_IN_A_ROW, len(places))
    count = -(-len(places) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.5, 2.3 * count + 0.4), dpi=120)
    for i, (run, step, view) in enumerate(places):
        if view is None:
            continue
        axes = figure.add_subplot(count, columns, i + 1)
        view.draw(axes, left, right, most)
        linear_limits(axes, "x", [left, right], 0)
        axes.tick_params(labelsize=7, labelleft=i % columns == 0)
        name = f"{run.name}, " if several else ""
        axes.set_title(plain(f"{name}step {step}"), fontsize=8.5, loc="left", pad=3)
        for text in axes.texts:
            text.set_fontsize(6.5)
        if i % columns == 0:
            axes.set_ylabel("eigenvalues per unit of λ", fontsize=7.5)
        if i + columns >= len(places):
            axes.set_xlabel(plain(f"λ [{view.unit}]"), fontsize=7.5)
    _margins(figure, left=0.62, right=0.12, bottom=0.42, top=0.3, between=(0.09, 0.34))
    _say_how_many(figure, len(rows), len(found))
    return figure


@house_style
def draw_over_time(found: Spectra, family: str) -> Figure:
    """One heat-map for each run: eigenvalues upwards, steps to the right, numbers of eigenvalues as colour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    every, found = len(found), found[:_ROWS]
    low = min(view.extent[0] for _, views in found for _, view in views)
    high = max(view.extent[1] for _, views in found for _, view in views)
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    maps = [torch.stack([torch.log10(1 + view.in_bins(edges)) for _, view in views], dim=1) for _, views in found]
    # single eigenvalues are seen beside thousands
    norm, colours = PowerNorm(0.5, 0, max(float(each.max()) for each in maps)), time_colours()
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.9, 2.9 * rows + 0.3), dpi=120)
    for i, ((run, views), counts) in enumerate(zip(found, maps, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps = [float(step) for step, _ in views]
        borders = _borders(steps)
        shown = torch.where(counts > 0.02, counts, math.nan)  # nothing is drawn where there is nothing
        axes.pcolormesh(borders, edges.tolist(), shown.numpy(), cmap=colours, norm=norm, rasterized=True)
        axes.spines[["top", "right"]].set_visible(False)
        _lines_over_time(axes, run, family)
        linear_limits(axes, "x", [borders[0], borders[-1]], 0)
        linear_limits(axes, "y", [low, high], 0)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=7.5)
        if i % columns == 0:
            axes.set_ylabel(plain(f"eigenvalue λ [{views[0][1].unit}]"), fontsize=7.5)
        if len(found) > 1:
            axes.set_title(plain(run.name), fontsize=8.5, loc="left", pad=3)
    _margins(figure, left=0.6, right=0.95, bottom=0.42, top=0.25, between=(0.5, 0.5))
    wide, tall = figure.get_size_inches()
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        cax=figure.add_axes((1 - 0.8 / wide, 0.42 / tall, 0.12 / wide, 1 - 0.67 / tall)),
    )
    bar.set_label("log₁₀(1 + eigenvalues)", fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    _say_how_many(figure, len(found), every)
    return figure


def _lines_over_time(axes: Axes, run: Run, family: str) -> None:
    top = run.series(f"{family}/top_1")
    axes.plot(top.steps, top.values, color="black", linewidth=0.9)
    edge = run.series(f"{family}/stability_threshold")
    axes.plot(edge.steps, edge.values, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 2)))


def has_overlaps(run: Run, family: str) -> bool:
    """Whether overlaps of single eigenvectors stand in its records."""
    return any(f"{family}/overlap_first_matrix" in record.arrays for record in run.records)


@house_style
def draw_overlaps(runs: Sequence[Run], family: str) -> Figure:
    """For each run the matrix of squared cosines with the first and with the previous measurement, at several times."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = [(run, which) for run in runs[:_ROWS] for which in ("first", "previous")]
    norm, colours = Normalize(0, 1), time_colours()
    figure = Figure(figsize=(1.95 * _TIMES + 1.7, 2.05 * len(rows) + 0.3), dpi=120)
    for row, (run, which) in enumerate(rows):
        name = f"{family}/overlap_{which}_matrix"
        records = [record for record in run.records if name in record.arrays]
        for column, place in enumerate(_spread(len(records), _TIMES)):
            record = records[place]
            axes = figure.add_subplot(len(rows), _TIMES, row * _TIMES + column + 1)
            k = math.isqrt(len(record.arrays[name]))
            matrix = torch.tensor(record.arrays[name], dtype=torch.float64).reshape(k, k)
            axes.pcolormesh(matrix.numpy(), cmap=colours, norm=norm, edgecolors="face", linewidth=0.2)
            axes.set_aspect("equal")
            axes.invert_yaxis()
            ticks = [i + 0.5 for i in range(k)] if k <= _NUMBERED else [0.5, k - 0.5]
            names = [str(round(tick + 0.5)) for tick in ticks]
            axes.set_xticks(ticks, names)
            axes.set_yticks(ticks, names)
            axes.tick_params(labelsize=7, length=0)
            if k <= _NUMBERED:
                for i in range(k):
                    for j in range(k):
                        value = float(matrix[i, j])
                        shade = "#fefefe" if value > 0.5 else "#111111"
                        axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=shade)
            lag = (record.notes.get("overlap") or {}).get(f"lag_{which}")
            since = f" and {record.step - lag}" if isinstance(lag, int) else ""
            axes.set_title(f"step {record.step}{since}", fontsize=8, loc="left", pad=3)
            axes.set_xlabel("eigenvector now", fontsize=7)
            if column == 0:
                of = f"{run.name}\n" if len(runs) > 1 else ""
                axes.set_ylabel(plain(f"{of}{which} measurement"), fontsize=7.5)
    _margins(figure, left=0.65, right=0.9, bottom=0.4, top=0.3, between=(0.35, 0.45))
    wide, tall = figure.get_size_inches()
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=figure.add_axes((1 - 0.75 / wide, 0.4 / tall, 0.12 / wide, 1 - 0.7 / tall))
    )
    bar.set_label("|⟨v, v′⟩|²", fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    _say_how_many(figure, len(rows) // 2, len(runs))
    return figure


def _margins(
    figure: Figure, *, left: float, right: float, bottom: float, top: float, between: tuple[float, float]
) -> None:
    """Space around and between axes, in inches; between them as shares of theirs."""
    wide, tall = figure.get_size_inches()
    figure.subplots_adjust(
        left=left / wide,
        right=1 - right / wide,
        bottom=bottom / tall,
        top=1 - top / tall,
        wspace=between[0],
        hspace=between[1],
    )


def _say_how_many(figure: Figure, shown: int, there_are: int) -> None:
    if shown < there_are:
        text = f"the first {shown} of {there_are} runs"
        figure.text(0.995, 0.995, text, ha="right", va="top", fontsize=7, color=GREY)


def _spread(length: int, most: int) -> list[int]:
    """At most this many places, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _padded(views: Sequence[tuple[int, DensityView]], several: bool) -> list[tuple[int, DensityView | None]]:
    """Filled up to a whole row, where each run has one."""
    empty = [(0, None)] * (_IN_A_ROW - len(views)) if several else []
    return [*views, *empty]


def _borders(steps: Sequence[float]) -> list[float]:
    """Half way between the steps."""
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - (inner[0] - steps[0]), *inner, steps[-1] + (steps[-1] - inner[-1])]
