"""Panels drawn by plotly: curves that can be zoomed and read off under the pointer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from lightning_dynamics.recording.figures.panels import Curve, Panel
from lightning_dynamics.recording.figures.style import GREY, PALE

_DASHES = {"line": "solid", "dashed": "dash", "dotted": "dot"}
_MARKED = 40  # points that are few enough to be marked one by one
_UNIFIED = 6  # curves that are read off together
_INK, _PAPER, _NONE = "#000000", "#ffffff", "rgba(0,0,0,0)"
_BAND = "2e"  # opacity of a band of errors
_DIGITS = 7
_HEIGHT, _LINE = 250, 16  # pixels: of a panel without its legend, of a line of that
_LETTERS = 40  # of a name


def plotly_script() -> str:
    """The library that draws, to stand in a page once.

    Raises:
        ImportError: If plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('Interactive figures need plotly: pip install "lightning-dynamics[interactive]".') from error
    # as a browser reads it, so that its digest is the same
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def plotted(panel: Panel) -> dict[str, Any]:
    """A panel as ``Plotly.newPlot`` takes it: ``data`` and ``layout``; colours as on white paper.

    What a logarithmic axis cannot show is None.
    """
    return {"data": list(_traces(panel)), "layout": _layout(panel)}


def _traces(panel: Panel) -> Iterator[dict[str, Any]]:
    for curve in panel.curves:
        shown = curve.thinned()
        if shown.error is not None:
            yield from _band(shown, panel.is_log)
        yield _line(shown, panel.is_log)
    if len(panel.labels) > 1:
        yield from _legend(panel)


def _line(curve: Curve, is_log: bool) -> dict[str, Any]:
    y = [_shown(value, is_log) for value in curve.y]
    count = sum(value is not None for value in y)
    is_marked = count == 1 or (curve.style == "line" and count <= _MARKED)
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if is_marked else "lines",
        "name": _text(f"{curve.label} · {curve.run}" if curve.run else curve.label),
        "legendgroup": _group(curve.label, curve.style),
        "showlegend": False,
        "x": list(curve.x),
        "y": y,
        "line": {"color": curve.colour, "width": 1.6, "dash": _DASHES[curve.style]},
        "marker": {"size": 4},
        "hovertemplate": "%{y:.5g}<extra>%{fullData.name}</extra>",
    }
    if curve.error is not None and any(math.isfinite(error) for error in curve.error):
        trace["customdata"] = [f" ± {error:.2g}" if math.isfinite(error) else "" for error in curve.error]
        trace["hovertemplate"] = "%{y:.5g}%{customdata}<extra>%{fullData.name}</extra>"
    return trace


def _band(curve: Curve, is_log: bool) -> Iterator[dict[str, Any]]:
    """The errors around a curve: there along the top, back along the bottom."""
    assert curve.error is not None
    known = [
        (x, y, error)
        for x, y, error in zip(curve.x, curve.y, curve.error, strict=True)
        if _shown(y, is_log) is not None and math.isfinite(error)
    ]
    if not any(error > 0 for *_, error in known):
        return
    floor = min(y for _, y, _ in known) / 10 if is_log else -math.inf
    top = [(x, y + error) for x, y, error in known]
    bottom = [(x, max(y - error, floor)) for x, y, error in reversed(known)]
    yield {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "fillcolor": curve.colour + _BAND,
        "line": {"width": 0, "color": curve.colour},
        "hoverinfo": "skip",
        "legendgroup": _group(curve.label, curve.style),
        "showlegend": False,
        "x": [x for x, _ in top + bottom],
        "y": [_short(y) for _, y in top + bottom],
    }


def _legend(panel: Panel) -> Iterator[dict[str, Any]]:
    """One entry for each label, whatever the number of runs; a click hides its curves."""
    for label, colour, style in panel.labels:
        yield {
            "type": "scatter",
            "mode": "lines",
            "name": _text(label),
            "legendgroup": _group(label, style),
            "x": [None],
            "y": [None],
            "line": {"color": colour, "width": 1.6, "dash": _DASHES[style]},
        }


def _layout(panel: Panel) -> dict[str, Any]:
    labels = panel.labels
    lines = len(labels) if len(labels) > 1 else 0
    axis = {
        "zeroline": False,
        "showline": True,
        "linecolor": _INK,
        "ticks": "outside",
        "ticklen": 3,
        "automargin": True,
    }
    return {
        "height": _HEIGHT + _LINE * lines,
        "title": {"text": _text(panel.title), "font": {"size": 12}, "x": 0.01, "xanchor": "left", "y": 0.97},
        "margin": {"l": 48, "r": 12, "t": 34, "b": 40 + _LINE * lines},
        "paper_bgcolor": _NONE,
        "plot_bgcolor": _NONE,
        "font": {"size": 10, "color": _INK},
        "hovermode": "x unified" if len(panel.curves) <= _UNIFIED else "closest",
        "hoverlabel": {"bgcolor": _PAPER, "font": {"size": 10, "color": _INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top", "font": {"size": 9.5}},
        "xaxis": {**axis, "title": {"text": _text(panel.x_label), "standoff": 4}, "showgrid": False},
        "yaxis": {
            **axis,
            "type": "log" if panel.is_log else "linear",
            "exponentformat": "power",
            "gridcolor": PALE + "80",
            "gridwidth": 0.5,
        },
        "shapes": [*_levels(panel), *_marks(panel)],
        "annotations": [*_unit(panel), *_level_labels(panel), *_mark_labels(panel)],
    }


def _levels(panel: Panel) -> Iterator[dict[str, Any]]:
    for level, _ in panel.levels:
        if _shown(level, panel.is_log) is not None:
            line = {"color": GREY, "width": 1, "dash": "dot"}
            yield {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": line}


def _marks(panel: Panel) -> Iterator[dict[str, Any]]:
    for step, _, colour in panel.marks:
        line = {"color": colour, "width": 1, "dash": "dot"}
        yield {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": step, "x1": step, "line": line}


def _unit(panel: Panel) -> Iterator[dict[str, Any]]:
    if panel.y_label:
        place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
        yield {**place, **_note(f"[{panel.y_label}]", GREY)}


def _level_labels(panel: Panel) -> Iterator[dict[str, Any]]:
    for level, label in panel.levels:
        if label and _shown(level, panel.is_log) is not None:
            # an annotation, unlike a shape, stands at the logarithm
            y = math.log10(level) if panel.is_log else level
            yield {"xref": "paper", "x": 1, "xanchor": "right", "y": y, "yanchor": "bottom", **_note(label, GREY)}


def _mark_labels(panel: Panel) -> Iterator[dict[str, Any]]:
    for step, label, colour in panel.marks:
        if label:
            place = {"yref": "paper", "y": 0.02, "yanchor": "bottom", "x": step, "xanchor": "left", "textangle": -90}
            yield {**place, **_note(label, colour)}


def _note(label: str, colour: str) -> dict[str, Any]:
    return {"text": _text(label), "showarrow": False, "font": {"size": 9, "color": colour}}


def _text(label: str) -> str:
    """A name as plotly shows it: it reads a little HTML in texts, and formulas between dollars."""
    cut = label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
    return escape(cut, quote=False).replace("$", "&#36;")


def _group(label: str, style: str) -> str:
    return f"{style}: {_text(label)}"


def _shown(value: float, is_log: bool) -> float | None:
    return _short(value) if math.isfinite(value) and (value > 0 or not is_log) and abs(value) < 1e150 else None


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


__all__: Sequence[str] = ["plotly_script", "plotted"]
