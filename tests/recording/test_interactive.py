"""Panels as plotly takes them: the curves that matplotlib draws, in the same colours."""

import math

import pytest

from lightning_dynamics.recording.figures.panels import Curve, Panel
from lightning_dynamics.recording.figures.style import BLUE, GREEN, GREY, VERMILION
from lightning_dynamics.recording.interactive import plotly_script, plotted


def curve(label="a", y=(1.0, 2.0, 3.0), colour=BLUE, **more):
    return Curve(label, [float(i) for i in range(len(y))], list(y), colour, **more)


def lines(spec):
    """The curves, without bands and entries of the legend."""
    return [trace for trace in spec["data"] if "hovertemplate" in trace]


def test_plotly_takes_what_a_panel_gives():
    objects = pytest.importorskip("plotly.graph_objects")
    panel = Panel(
        "P",
        [curve(error=[0.1, math.nan, 0.3]), curve("b", style="dashed", colour=VERMILION)],
        unit="loss",
        scale="log",
        levels=[(1.0, "level")],
        marks=[(1.0, "at the edge", VERMILION)],
    )
    figure = objects.Figure(plotted(panel))
    assert figure.layout.yaxis.type == "log"
    assert len(figure.layout.shapes) == 2
    assert {note.text for note in figure.layout.annotations} == {"[loss]", "level", "at the edge"}


def test_curves_keep_their_values_colours_and_styles():
    first, second = lines(plotted(Panel("P", [curve(), curve("b", colour=GREEN, style="dotted")])))
    assert (first["x"], first["y"]) == ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert first["line"] == {"color": BLUE, "width": 1.6, "dash": "solid"}
    assert (second["line"]["color"], second["line"]["dash"]) == (GREEN, "dot")


def test_what_an_axis_cannot_show_is_left_out():
    values = (1.0, 0.0, -2.0, math.nan, math.inf, 4.0)
    (masked,) = lines(plotted(Panel("P", [curve(y=values)], scale="log")))
    assert masked["y"] == [1.0, None, None, None, None, 4.0]
    (whole,) = lines(plotted(Panel("P", [curve(y=values)])))
    assert whole["y"] == [1.0, 0.0, -2.0, None, None, 4.0]


def test_a_logarithmic_axis_without_anything_positive_is_linear():
    spec = plotted(Panel("P", [curve(y=(0.0, -1.0))], scale="log", levels=[(-1.0, "low")]))
    assert spec["layout"]["yaxis"]["type"] == "linear"
    assert spec["layout"]["shapes"][0]["y0"] == -1.0


def test_levels_stand_at_values_and_their_names_at_logarithms():
    layout = plotted(Panel("P", [curve()], scale="log", levels=[(100.0, "level"), (-1.0, "unseen")]))["layout"]
    (shape,) = layout["shapes"]
    (note,) = layout["annotations"]
    assert shape["y0"] == shape["y1"] == 100.0
    assert note["y"] == 2.0
    assert note["text"] == "level"


def test_errors_are_a_band_and_told_under_the_pointer():
    spec = plotted(Panel("P", [curve(y=(1.0, math.nan, 3.0), error=[0.5, 0.5, math.nan])]))
    band, line = spec["data"]
    assert (band["x"], band["y"]) == ([0.0, 0.0], [1.5, 0.5])
    assert band["fillcolor"].startswith(BLUE)
    assert len(band["fillcolor"]) == 9
    assert line["customdata"] == [" ± 0.5", " ± 0.5", ""]


def test_a_band_ends_above_zero_on_a_logarithmic_axis():
    spec = plotted(Panel("P", [curve(y=(1.0, 2.0), error=[5.0, 5.0])], scale="log"))
    assert min(spec["data"][0]["y"]) == pytest.approx(0.1)


def test_runs_share_an_entry_of_the_legend_and_differ_under_the_pointer():
    panel = Panel("P", [curve(label, run=run, style=style, colour=colour)
                        for run, colour in (("one", BLUE), ("two", GREEN))
                        for label, style in (("a", "line"), ("b", "dotted"))])  # fmt: skip
    spec = plotted(panel)
    assert [trace["name"] for trace in lines(spec)] == ["a · one", "b · one", "a · two", "b · two"]
    shown = [trace for trace in spec["data"] if trace.get("showlegend", True)]
    assert [(trace["name"], trace["line"]["color"]) for trace in shown] == [("a", GREY), ("b", GREY)]
    assert {trace["legendgroup"] for trace in shown} == {trace["legendgroup"] for trace in lines(spec)}


def test_one_curve_needs_no_legend():
    assert not any(trace.get("showlegend", True) for trace in plotted(Panel("P", [curve()]))["data"])


def test_names_are_neither_markup_nor_formulas():
    hostile = "<b>$x$</b>"
    spec = plotted(Panel(hostile, [curve(hostile)], unit=hostile, levels=[(1.0, hostile)]))
    safe = "&lt;b&gt;&#36;x&#36;&lt;/b&gt;"
    assert spec["layout"]["title"]["text"] == spec["data"][0]["name"] == safe
    assert [note["text"] for note in spec["layout"]["annotations"]] == [f"[{safe}]", safe]


def test_long_curves_are_thinned():
    (line,) = lines(plotted(Panel("P", [curve(y=[math.sin(i) for i in range(10_000)])])))
    assert 900 < len(line["y"]) <= 1000


def test_the_library_stands_in_one_text_that_a_page_can_hold():
    pytest.importorskip("plotly")
    script = plotly_script()
    assert "Plotly" in script
    assert "</script" not in script
    assert "\r" not in script
