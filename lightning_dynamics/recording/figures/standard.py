"""Which figures runs have: what a report shows, and what the public functions draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.figures.panels import Curve, Panel, Style, draw
from lightning_dynamics.recording.figures.spectra import draw_over_time, draw_overlaps, draw_spectra, has_overlaps
from lightning_dynamics.recording.figures.style import CYCLE, GREEN, VERMILION, View, house_style, time_colours
from lightning_dynamics.recording.figures.views import densities, diffusions, phases, through_depth
from lightning_dynamics.recording.quantity import LAST_LAYER, Quantity, QuantityTable
from lightning_dynamics.recording.reading import Run, Series
from lightning_dynamics.recording.record import Cost, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES: tuple[Style, ...] = ("line", "dotted")
_TOGETHER = len(_STYLES)  # quantities of several runs in the same axes
_MARKED_RUNS = 6  # where each comes to the edge
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
        caption = (
            "Share of the wall-clock time that measuring took so far. What monitors measured together is shared "
            "equally among them."
        )
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
            if len(runs) > _LAYERED_RUNS:
                text += f" The first {_LAYERED_RUNS} of {len(runs)} runs."
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
        for part, together in _parts(title, list(quantities.values()), references, len(runs)):
            curves = list(_curves(runs, family, together, references))
            if not curves:
                continue
            keys = {quantity.key for quantity in together}
            is_compared = bool(keys & (references | set(levels))) or "accuracy" in keys
            units = {quantity.unit for quantity in together}
            panels.append(
                Panel(
                    part,
                    curves,
                    unit=units.pop() if len(units) == 1 else "",
                    scale="log" if title in log else "linear",
                    levels=[(level, "") for level in sorted({levels[key] for key in keys if key in levels})],
                    marks=[
                        (x, label if is_compared and len(runs) == 1 else "", colour)
                        for x, label, colour in (marks if len(runs) <= _MARKED_RUNS else ())
                    ],
                )
            )
    return panels


def _parts(
    title: str, quantities: Sequence[Quantity], references: set[str], count: int
) -> Iterator[tuple[str, list[Quantity]]]:
    """The quantities of a chart, one by one where several runs leave too few kinds of lines for all of them."""
    values = [quantity for quantity in quantities if quantity.key not in references]
    beside = [quantity for quantity in quantities if quantity.key in references]
    if count == 1 or len(values) <= _TOGETHER:
        symbol = values[0].symbol if len(quantities) == 1 else ""
        yield f"{title}, {symbol}" if symbol and len(symbol) <= _SHORT else title, list(quantities)
        return
    for quantity in values:
        # what it is compared with, where names say so
        own = [each for each in beside if each.key.replace("_predicted", "") == quantity.key]
        shared = [each for each in beside if "_predicted" not in each.key and each.unit == quantity.unit]
        yield f"{title}: {quantity.key}", [quantity, *(own or shared)]


def layer_panels(run: Run, family: str) -> list[Panel]:
    """The quantities of layers, one panel for each, lines coloured by depth: a layer has one colour in all."""
    panels = []
    for table in (table for table in run.tables if table.family == family):
        has_last = bool(table.of_form("depth"))
        of_layers = [quantity for quantity in table.quantities if quantity.per_layer]
        keys: dict[str, dict[str, str]] = {}
        for quantity in of_layers:
            start = f"{family}/{quantity.key}"
            found = {key.removeprefix(f"{start}/"): key for key in run.keys if key.startswith(f"{start}/")}
            if found and has_last and start in run.keys:
                found[LAST_LAYER] = start
            keys[quantity.key] = found
        layers = dict.fromkeys(layer for found in keys.values() for layer in found if layer != LAST_LAYER)
        layers.update(dict.fromkeys(layer for found in keys.values() for layer in found))
        colours = dict(zip(layers, _depth_colours(len(layers)), strict=True))
        for quantity in of_layers:
            curves = [_curve(run.series(key), layer, colours[layer]) for layer, key in keys[quantity.key].items()]
            if curves:
                is_log = quantity.panel.removesuffix(", by layer") in table.log_panels
                title = f"{quantity.symbol} ({quantity.key})" if quantity.symbol else quantity.key
                panels.append(Panel(title, curves, quantity.unit, "log" if is_log else "linear"))
    return panels


def cost_panels(runs: Sequence[Run]) -> list[Panel]:
    """What measuring took; what monitors measured together is shared equally among them."""
    told = [(run, colour) for run, colour in zip(runs, run_colours(len(runs)), strict=True) if run.costs]
    if not told:
        return []
    several = len(runs) > 1

    def curves(label: str, value: Callable[[Cost], float]) -> list[Curve]:
        return [
            Curve(label, [float(c.step) for c in run.costs], list(map(value, run.costs)), colour, run.name * several)
            for run, colour in told
        ]

    panels = [Panel("Share of the wall-clock time", curves("share of time", lambda cost: cost.overhead))]
    labels = list(dict.fromkeys(label for run, _ in told for cost in run.costs for label in cost.seconds))
    by_monitor = {label: curves(label, partial(_seconds, label)) for label in labels}
    if several:
        panels += [Panel(f"Time of {label}", own, "s") for label, own in by_monitor.items()]
    else:
        colours = CYCLE if len(labels) <= len(CYCLE) else _depth_colours(len(labels))
        lines = [replace(own[0], colour=colour) for own, colour in zip(by_monitor.values(), colours, strict=False)]
        panels.append(Panel("Time by monitor", lines, "s"))
    skipped = curves("skipped points", lambda cost: float(cost.skipped))
    if any(value for curve in skipped for value in curve.y):
        panels.append(Panel("Skipped points", skipped))
    return panels


def _seconds(label: str, cost: Cost) -> float:
    return cost.seconds.get(label, math.nan)


def run_colours(count: int) -> list[str]:
    """A colour for each run: told apart by colour-blind readers up to six; more follow a scale."""
    return list(CYCLE[:count]) if count <= len(CYCLE) else _depth_colours(count)


def _curves(runs: Sequence[Run], family: str, quantities: Sequence[Quantity], references: set[str]) -> Iterator[Curve]:
    symbols = [quantity.symbol for quantity in quantities]
    several = len(runs) > 1
    values = [quantity for quantity in quantities if quantity.key not in references]
    beside = [quantity for quantity in quantities if quantity.key in references]
    kept = [each for each in CYCLE if each != VERMILION]  # which is that of what they are compared with
    own_colours = kept[: len(values)] if len(values) <= len(kept) else _depth_colours(len(values))
    units = {quantity.unit for quantity in quantities}
    for run, colour in zip(runs, run_colours(len(runs)), strict=True):
        for quantity in (*values, *beside):
            series = run.series(f"{family}/{quantity.key}")
            if not len(series):
                continue
            is_clear = len(quantity.symbol) <= _SHORT and symbols.count(quantity.symbol) == 1
            label = quantity.symbol if is_clear and quantity.symbol else quantity.key
            label += f" [{quantity.unit}]" if len(units) > 1 and quantity.unit not in ("", "1") else ""
            is_second = quantity.key in references and quantity is not beside[0]
            style: Style = "dotted" if is_second and (not several or len(values) == 1) else "dashed"
            own = VERMILION
            if quantity.key not in references:
                place = values.index(quantity)
                style = _STYLES[place % len(_STYLES)] if several else "line"
                own = own_colours[place]
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

        def made(record: Record, run: Run = run, tables: list[QuantityTable] = tables) -> Iterator[View]:
            return through_depth(record, run.records, tables)

        for _, view in _last_views(run, made, 1):
            yield Shown(
                f"{_name(view.key)}-{i}",
                f"Through depth{_of(run, runs)}",
                "One line for each measurement, coloured by time; layers from the input to the classifier.",
                view.figure,
            )


def _motions(runs: Sequence[Run], family: str) -> Iterator[Shown]:
    for i, run in enumerate(runs):
        tables: list[QuantityTable] = [table for table in run.tables if table.family == family]

        def made(record: Record, run: Run = run, tables: list[QuantityTable] = tables) -> Iterator[View]:
            yield from diffusions(record, run.records, tables)
            yield from phases(record, tables)

        for step, view in _last_views(run, made):
            is_phase = view.key.endswith("phase")
            yield Shown(
                f"{_name(view.key)}-{i}",
                f"{'Phase planes' if is_phase else 'Displacement over time'}{_of(run, runs)}",
                "Position and velocity of the weights along frozen eigenvectors of the Hessian."
                if is_phase
                else "Squared distance over time on logarithmic axes, with the fitted power and what only looks like "
                "one; its sliding exponent; squared step length.",
                partial(view.figure, step),
            )


def _last_views(run: Run, made: Callable[[Record], Iterator[View]], kinds: int = 2) -> list[tuple[int, View]]:
    """The last view of each key, with its step.

    Args:
        run: The run.
        made: The views of a record.
        kinds: How many keys there are at most.
    """
    last: dict[str, tuple[int, View]] = {}
    for record in reversed(run.records):
        for view in made(record):
            last.setdefault(view.key, (record.step, view))
        if len(last) >= kinds:
            break
    return [last[key] for key in sorted(last)]


def _name(key: str) -> str:
    return key.rpartition("/")[2].replace("_", "-")


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f", {run.name}" if len(runs) > 1 else ""


@house_style
def _depth_colours(count: int) -> list[str]:
    from matplotlib.colors import to_hex

    colours = time_colours()
    return [to_hex(colours(0.15 + 0.85 * i / max(1, count - 1))) for i in range(count)]
