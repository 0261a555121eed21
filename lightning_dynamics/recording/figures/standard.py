"""Which figures runs have: what a report shows, and what the public functions draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.figures.depth import DepthView
from lightning_dynamics.recording.figures.panels import Curve, Panel, Style, draw
from lightning_dynamics.recording.figures.spectra import draw_over_time, draw_overlaps, draw_spectra, has_overlaps
from lightning_dynamics.recording.figures.style import CYCLE, GREEN, VERMILION, View, time_colours
from lightning_dynamics.recording.figures.views import densities, diffusions, phases, through_depth
from lightning_dynamics.recording.quantity import LAST_LAYER, Quantity, QuantityTable
from lightning_dynamics.recording.reading import Run, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES: tuple[Style, ...] = ("line", "dotted", "dashed")
_LAYERED_RUNS = 3  # that are drawn by layer, each for itself
_COST = "dynamics"
_EDGE, _FITTED = "at the edge", "no errors"
_SHORT = 6  # letters of a symbol that says more than a key


@dataclass(frozen=True)
class Shown:
    """A figure of runs.

    Attributes:
        name: Unique in its section.
        title: What it shows.
        caption: How to read it.
        draw: Draws it.
        panels: The axes that it is made of, where they are curves over steps.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]
    panels: Sequence[Panel] = ()

    @classmethod
    def of_panels(cls, name: str, title: str, caption: str, panels: Sequence[Panel]) -> Shown:
        return cls(name, title, caption, partial(draw, panels, title=title), panels)


@dataclass(frozen=True)
class Section:
    """The figures of one family of keys.

    Attributes:
        family: First part of the keys.
        title: What it is called.
        figures: What one looks at.
        more: What else was recorded.
    """

    family: str
    title: str
    figures: Sequence[Shown]
    more: Sequence[Shown] = ()


def sections(runs: Sequence[Run]) -> list[Section]:
    """What can be drawn of runs, family by family, the same quantities of several runs in the same axes."""
    families = dict.fromkeys(table.family for run in runs for table in run.tables if table.family != _COST)
    found = [section(runs, family) for family in families]
    cost = cost_panels(runs)
    if cost:
        caption = "Share of the wall-clock time that measuring took so far, and what could not be measured."
        found.append(Section(_COST, "Cost of the monitors", [Shown.of_panels("cost", "Cost", caption, cost)]))
    return [each for each in found if each.figures or each.more]


def section(runs: Sequence[Run], family: str) -> Section:
    """What can be drawn of one family of keys."""
    tables = [table for run in runs for table in run.tables if table.family == family]
    title = tables[0].title if tables else family
    figures: list[Shown] = []
    overview, marks = panels_of(runs, family), _marks(runs, family)
    if overview:
        figures.append(Shown.of_panels("overview", title, _caption(overview, marks), overview))
    figures += [*_spectra(runs, family), *_layers(runs, family), *_motions(runs, family)]
    more = []
    beside = panels_of(runs, family, logged=False)
    if beside:
        more.append(Shown.of_panels("recorded", f"{title}: what else was recorded", _caption(beside), beside))
    for i, run in enumerate(runs[:_LAYERED_RUNS]):
        panels = layer_panels(run, family)
        if panels:
            of = f", {run.name}" if len(runs) > 1 else ""
            text = "One line for each layer, from the input (pale) to the output (dark)."
            more.append(Shown.of_panels(f"layers-{i}", f"{title} by layer{of}", text, panels))
    return Section(family, title, figures, more)


def panels_of(
    runs: Sequence[Run], family: str, *, logged: bool = True, only: Callable[[Quantity], bool] | None = None
) -> list[Panel]:
    """The curves of a family, one panel for each of its charts.

    Args:
        runs: The runs; colours tell them apart, where there are several.
        family: First part of the keys.
        logged: Whether to take the quantities that are logged by default, or the others.
        only: Which of them, instead.
    """
    chosen: dict[str, dict[str, Quantity]] = {}
    log: set[str] = set()
    references: set[str] = set()
    levels: dict[str, float] = {}
    for table in (table for run in runs for table in run.tables if table.family == family):
        log |= set(table.log_panels)
        references |= set(table.references)
        levels.update(table.levels)
        for quantity in table.quantities:
            wanted = quantity.on_by_default == logged if only is None else only(quantity)
            if wanted and quantity.form == "scalar" and not quantity.per_layer:
                chosen.setdefault(quantity.panel, {}).setdefault(quantity.key, quantity)
    marks = _marks(runs, family)
    panels = []
    for title, quantities in chosen.items():
        curves = list(_curves(runs, family, list(quantities.values()), references))
        if not curves:
            continue
        is_compared = bool(set(quantities) & (references | set(levels))) or "accuracy" in quantities
        units = {quantity.unit for quantity in quantities.values()}
        lines = {levels[key] for key in quantities if key in levels}
        panels.append(
            Panel(
                title,
                curves,
                unit=units.pop() if len(units) == 1 else "",
                scale="log" if title in log else "linear",
                levels=[(level, "") for level in sorted(lines)],
                marks=[(x, label if is_compared and len(runs) == 1 else "", colour) for x, label, colour in marks],
            )
        )
    return panels


def layer_panels(run: Run, family: str) -> list[Panel]:
    """The quantities of layers, one panel for each, lines coloured by depth."""
    panels = []
    for table in (table for table in run.tables if table.family == family):
        for quantity in (q for q in table.quantities if q.per_layer):
            start = f"{family}/{quantity.key}"
            keys = {key: key.removeprefix(f"{start}/") for key in run.keys if key.startswith(f"{start}/")}
            if not keys:
                continue
            if any(q.key == quantity.key and not q.per_layer for q in table.quantities) and table.of_form("depth"):
                keys[start] = LAST_LAYER
            colours = _depth_colours(len(keys))
            curves = [_curve(run.series(key), keys[key], colour) for key, colour in zip(keys, colours, strict=True)]
            panel = quantity.panel.removesuffix(", by layer")
            is_log = panel in table.log_panels
            title = f"{quantity.symbol} ({quantity.key})" if quantity.symbol else quantity.key
            panels.append(Panel(title, [c for c in curves if len(c.x)], quantity.unit, "log" if is_log else "linear"))
    return panels


def cost_panels(runs: Sequence[Run]) -> list[Panel]:
    """What measuring took."""
    told = [(run, colour) for run, colour in zip(runs, run_colours(len(runs)), strict=True) if run.costs]
    if not told:
        return []
    several = len(runs) > 1
    shares, skipped, seconds = [], [], []
    for run, colour in told:
        name, steps = run.name if several else "", [float(cost.step) for cost in run.costs]
        shares.append(Curve("share of time", steps, [cost.overhead for cost in run.costs], colour, name))
        skipped.append(Curve("skipped points", steps, [float(cost.skipped) for cost in run.costs], colour, name))
        labels = dict.fromkeys(label for cost in run.costs for label in cost.seconds)
        for i, label in enumerate(labels):
            values = [cost.seconds.get(label, math.nan) for cost in run.costs]
            own = CYCLE[i % len(CYCLE)]
            seconds.append(Curve(label, steps, values, colour if several else own, name, _STYLES[i % 3 * several]))
    panels = [Panel("Share of the wall-clock time", shares), Panel("Time by monitor", seconds, unit="s")]
    if any(value for curve in skipped for value in curve.y):
        panels.append(Panel("Skipped points", skipped))
    return panels


def run_colours(count: int) -> list[str]:
    """A colour for each run: told apart by colour-blind readers up to six; more follow a scale."""
    return list(CYCLE[:count]) if count <= len(CYCLE) else _depth_colours(count)


def _curves(runs: Sequence[Run], family: str, quantities: Sequence[Quantity], references: set[str]) -> Iterator[Curve]:
    symbols = [quantity.symbol for quantity in quantities]
    several = len(runs) > 1
    values = [quantity for quantity in quantities if quantity.key not in references]
    for run, colour in zip(runs, run_colours(len(runs)), strict=True):
        for quantity in (*values, *(q for q in quantities if q.key in references)):
            series = run.series(f"{family}/{quantity.key}")
            if not len(series):
                continue
            is_clear = len(quantity.symbol) <= _SHORT and symbols.count(quantity.symbol) == 1
            label = quantity.symbol if is_clear and quantity.symbol else quantity.key
            style: Style = "dashed"
            own = VERMILION
            if quantity.key not in references:
                place = values.index(quantity)
                style = _STYLES[place % len(_STYLES)] if several else "line"
                own = [each for each in CYCLE if each != VERMILION or not references][place % (len(CYCLE) - 1)]
            yield _curve(series, label, colour if several else own, run.name if several else "", style)


def _curve(series: Series, label: str, colour: str, run: str = "", style: Style = "line") -> Curve:
    error = series.errors if any(value > 0 for value in series.errors) else None
    return Curve(label, [float(step) for step in series.steps], series.values, colour, run, style, error)


def _marks(runs: Sequence[Run], family: str) -> list[tuple[float, str, str]]:
    """Where runs first come to the edge, and where they first make no errors."""
    marks = []
    for run, colour in zip(runs, run_colours(len(runs)), strict=True):
        for key, label, own in (("edge_ratio", _EDGE, VERMILION), ("accuracy", _FITTED, GREEN)):
            series = run.series(f"{family}/{key}")
            reached = next((x for x, y in zip(series.steps, series.values, strict=True) if y >= 1), None)
            if reached is not None and reached > series.steps[0]:
                marks.append((float(reached), label, colour if len(runs) > 1 else own))
    return marks


def _caption(panels: Sequence[Panel], marks: Sequence[tuple[float, str, str]] = ()) -> str:
    """How to read them: only what they show."""
    text = []
    if any(curve.error is not None for panel in panels for curve in panel.curves):
        text.append("Bands: errors, of the kind that the definitions give.")
    if any(curve.style == "dashed" and not curve.run for panel in panels for curve in panel.curves):
        text.append("Dashed: what the curve is compared with.")
    labels = {label for _, label, _ in marks}
    if _EDGE in labels:
        text.append("Vertical lines: the first point at or beyond the edge of stability.")
    if _FITTED in labels:
        text.append("Vertical lines: the first point without errors on the probe.")
    if any(panel.is_log and any(y <= 0 for c in panel.curves for y in c.y) for panel in panels):
        text.append("Triangles: values that are zero or negative, on a logarithmic axis.")
    return " ".join(text)


def _spectra(runs: Sequence[Run], family: str) -> Iterator[Shown]:
    found = [(run, list(_densities_of(run, family))) for run in runs]
    found = [(run, views) for run, views in found if views]
    if found:
        yield Shown(
            "spectrum",
            "Spectral density",
            "Number of eigenvalues per unit of λ, on a logarithmic axis. Ticks at the bottom: certified eigenvalues. "
            "Dashed: the edge of stability.",
            partial(draw_spectra, found),
        )
    longer = [(run, views) for run, views in found if len(views) > 1]
    if longer:
        yield Shown(
            "spectrum-over-time",
            "Spectrum over time",
            "Colour: log₁₀(1 + number of eigenvalues) in each bin of λ. Line: λ₁. Dashed: the edge of stability.",
            partial(draw_over_time, longer, family),
        )
    turned = [run for run in runs if has_overlaps(run, family)]
    if turned:
        yield Shown(
            "overlap",
            "Overlap of the leading eigenvectors",
            "|⟨v_i(t), v_j(t′)⟩|² of the leading eigenvectors at t and at an earlier t′: the identity where they stay.",
            partial(draw_overlaps, turned, family),
        )


def _densities_of(run: Run, family: str) -> Iterator[tuple[int, DensityView]]:
    tables = [table for table in run.tables if table.family == family]
    for record in run.records:
        for view in densities(record, tables):
            yield record.step, view


def _layers(runs: Sequence[Run], family: str) -> Iterator[Shown]:
    """The last record with layers shows all before it."""
    for i, run in enumerate(runs):
        tables = [table for table in run.tables if table.family == family]
        last: dict[str, DepthView] = {}
        for record in run.records:
            last.update((view.key, view) for view in through_depth(record, run.records, tables))
        for view in last.values():
            yield Shown(
                f"{_name(view.key)}-{i}",
                f"Through depth{_of(run, runs)}",
                "One line for each measurement, coloured by time; layers from the input to the classifier.",
                view.figure,
            )


def _motions(runs: Sequence[Run], family: str) -> Iterator[Shown]:
    for i, run in enumerate(runs):
        tables: list[QuantityTable] = [table for table in run.tables if table.family == family]
        last: dict[str, tuple[int, View]] = {}
        for record in run.records:
            views: list[View] = [*diffusions(record, run.records, tables), *phases(record, tables)]
            last.update((view.key, (record.step, view)) for view in views)
        for key, (step, view) in last.items():
            is_phase = key.endswith("phase")
            yield Shown(
                f"{_name(key)}-{i}",
                f"{'Phase planes' if is_phase else 'Displacement over time'}{_of(run, runs)}",
                "Position and velocity of the weights along frozen eigenvectors of the Hessian."
                if is_phase
                else "Squared distance over time on logarithmic axes, with the fitted power and what only looks like "
                "one; its sliding exponent; squared step length.",
                partial(view.figure, step),
            )


def _name(key: str) -> str:
    return key.rpartition("/")[2].replace("_", "-")


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f", {run.name}" if len(runs) > 1 else ""


def _depth_colours(count: int) -> list[str]:
    from matplotlib.colors import to_hex

    colours = time_colours()
    return [to_hex(colours(0.15 + 0.85 * i / max(1, count - 1))) for i in range(count)]
