"""Curves over steps as matplotlib draws them."""

import math

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_dynamics.recording.figures.panels import Curve, Panel, draw, kept_points
from lightning_dynamics.recording.figures.style import BLUE, GREY, VERMILION, rendered

STEPS = [float(step) for step in range(0, 100, 10)]


def curve(y, **more):
    return Curve(**{"label": "a", "x": STEPS[: len(y)], "y": y, "colour": BLUE, **more})


def axes_of(panel):
    figure = draw([panel])
    figure.canvas.draw()
    return figure.axes[0]


def lines(axes):
    return [line for line in axes.lines if line.get_linestyle() not in ("None",) and len(line.get_xdata()) > 2]


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_thinning_keeps_every_spike_and_the_ends():
    values = [math.sin(i / 50) for i in range(10_000)]
    values[1234], values[8765] = 50.0, -50.0
    kept = kept_points(values, 500)
    assert len(kept) <= 500
    assert {0, 1234, 8765, 9_999} <= set(kept)
    assert kept == sorted(set(kept))
    steps = [float(i) for i in range(10_000)]
    thinned = curve(values, x=steps, error=steps).thinned(500)
    assert thinned.y == [values[int(x)] for x in thinned.x]
    assert thinned.error == thinned.x


@pytest.mark.parametrize("count", [1, 2, 499, 500, 501])
def test_what_is_short_is_not_thinned(count):
    assert len(kept_points([0.0] * count, 500)) == min(count, 500) or count > 500


def test_gaps_stay_gaps_when_thinned():
    values = [math.nan] * 3000 + [1.0] * 3000
    kept = kept_points(values, 100)
    assert sum(math.isnan(values[i]) for i in kept) > 20


def test_values_are_drawn_at_their_steps_with_a_band_of_errors():
    axes = axes_of(Panel("P", [curve([1.0, 2.0, 4.0], error=[0.5, math.nan, 1.0])]))
    (line,) = lines(axes)
    assert list(line.get_xdata()) == [0, 10, 20]
    assert list(line.get_ydata()) == [1, 2, 4]
    (band,) = axes.collections
    low, high = band.get_datalim(axes.transData).intervaly
    assert (low, high) == (0.5, 5.0)
    assert axes.get_ylim()[0] < 0.5 + 1e-9


def test_bands_end_where_errors_do_and_lone_points_have_bars():
    axes = axes_of(Panel("P", [curve([1.0, 2.0, 3.0, 4.0, math.nan, 6.0], error=[1.0, 1.0, math.inf, 1.0, 1.0, 2.0])]))
    (band,) = axes.collections
    covered = {x for path in band.get_paths() for x, _ in path.vertices}
    assert 20.0 not in covered
    upright = (line for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1)
    assert [list(line.get_ydata()) for line in upright] == [[3.0, 5.0], [4.0, 8.0]]


def test_the_errors_of_a_constant_are_seen():
    low, high = axes_of(Panel("P", [curve([5.0, 5.0], error=[4.0, 4.0])])).get_ylim()
    assert low < 1
    assert high > 9


def test_a_single_point_is_seen_whatever_its_style():
    axes = axes_of(Panel("P", [curve([1.0]), curve([2.0], label="b", style="dashed")]))
    points = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert {1.0, 2.0} <= set(points)


def test_a_logarithmic_axis_marks_what_it_cannot_show():
    axes = axes_of(Panel("P", [curve([0.0, 1.0, -1.0, 100.0, math.nan, math.inf])], scale="log"))
    assert axes.get_yscale() == "log"
    y = axes.lines[0].get_ydata()
    assert [math.isnan(value) for value in y] == [True, False, True, False, True, True]
    triangles = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "v"]
    assert triangles == [0.0, 20.0]
    assert 0 < axes.get_ylim()[0] < 1
    assert "10⁰" in ticks(axes.yaxis)
    assert "10²" in ticks(axes.yaxis)


def test_an_axis_without_positive_values_is_linear():
    axes = axes_of(Panel("P", [curve([0.0, -1.0])], scale="log"))
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] < -1 < 0 < axes.get_ylim()[1]


@pytest.mark.parametrize("y", [[], [math.nan] * 3, [math.inf, -math.inf]])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_panel_without_values_says_so(y, scale):
    axes = axes_of(Panel("P", [curve(y)], scale=scale))
    assert "no values" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0.0, 3.0], ["0", "1", "2", "3"]),
        ([0.0, 30_000.0], ["0", "10k", "20k", "30k"]),
        ([2.0, 10.0], ["2.5", "5.0", "7.5", "10.0"]),
        ([0.0, 3e6], ["0", "1M", "2M", "3M"]),
        ([0.0, 3e-5], ["0", "1·10⁻⁵", "2·10⁻⁵", "3·10⁻⁵"]),
        ([-3e12, 3e12], ["-2·10¹²", "0", "2·10¹²"]),
        ([0.5, 0.5], ["0.48", "0.50", "0.52"]),
        ([1e9, 1e9 + 4], ["1e+09", "+2", "+4"]),
    ],
)
def test_ticks_are_short(values, names):
    assert ticks(axes_of(Panel("P", [curve(values)])).yaxis) == names


@pytest.mark.parametrize("value", [0.0, 1e-90, -1e140, 5.0])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_one_value_has_room_around_it(value, scale):
    axes = axes_of(Panel("P", [curve([value])], scale=scale))
    low, high = axes.get_ylim()
    assert low < value < high


@pytest.mark.parametrize("ends", [(0.0208, 0.0232), (111.0, 392.0), (0.15, 0.3), (1.0, 2.0), (3e-7, 4e-7), (1.0, 30.0)])
def test_a_logarithmic_axis_can_be_read(ends):
    assert len(ticks(axes_of(Panel("P", [curve(list(ends))], scale="log")).yaxis)) >= 2


def test_levels_and_marks_are_lines_across():
    panel = Panel("P", [curve([0.1, 0.2])], levels=[(1.0, "edge")], marks=[(10.0, "here", VERMILION)])
    axes = axes_of(panel)
    assert axes.get_ylim()[1] > 1  # the level is seen
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["edge", "here"]
    assert any(list(line.get_ydata()) == [1.0, 1.0] for line in axes.lines)
    assert any(list(line.get_xdata()) == [10.0, 10.0] for line in axes.lines)


def test_lines_are_told_apart_in_a_legend_and_runs_in_one_on_top():
    def of(run, colour):
        return [
            curve([1.0, 2.0], label="λ₁", run=run, colour=colour),
            curve([3.0, 3.0], label="λ*", run=run, colour=colour, style="dashed"),
        ]

    panel = Panel("P", [*of("one", BLUE), *of("two", VERMILION)])
    assert panel.labels == [("λ₁", GREY, "line"), ("λ*", GREY, "dashed")]
    figure = draw([panel, panel], title="T")
    (top,) = figure.legends
    assert [text.get_text() for text in top.get_texts()] == ["one", "two"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["λ₁", "λ*"]
    assert not draw([panel], with_runs=False).legends
    assert axes_of(Panel("P", [curve([1.0])])).get_legend() is None


def test_names_are_no_mathematics():
    name = "$x^$ $ \\$"
    panel = Panel(name, [curve([1.0, 2.0], label=name), curve([1.0, 2.0], label=f"{name} 2")], unit=name)
    figure = draw([panel], title=name)
    assert rendered(figure).shape[2] == 3
    shown = [text.get_text() for text in figure.texts] + [figure.axes[0].get_title(loc="left")]
    assert all("\\$" in text for text in shown)


def test_nothing_is_drawn_beyond_the_figure():
    """Titles, legends and labels of many lines stay within."""
    labels = [f"a rather long name of line {i}" for i in range(7)]
    panel = Panel("P", [curve([1.0, 2.0], label=label) for label in labels], unit="loss/θ²", scale="log")
    runs = [curve([1.0, 2.0], run=f"run {i} with a name", colour=f"#0000{i:02x}") for i in range(9)]
    figure = draw([panel, Panel("Q", runs), panel, panel], title="A title")
    renderer = FigureCanvasAgg(figure).get_renderer()
    wide, tall = figure.get_size_inches() * figure.dpi
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [axes.get_tightbbox(renderer) for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= -1
        assert box.x1 <= wide + 1
        assert box.y0 >= -1
        assert box.y1 <= tall + 1
    legends = [axes.get_legend().get_window_extent(renderer) for axes in figure.axes[:1]]
    below = figure.axes[3].get_tightbbox(renderer)
    assert legends[0].y0 >= below.y1 - 1


def test_the_process_s_own_style_is_neither_used_nor_changed():
    own = {"axes.facecolor": "black", "text.color": "white", "lines.linewidth": 9.0}
    with matplotlib.rc_context(own):
        figure = draw([Panel("P", [curve([1.0, 2.0], style="dashed")])])
        assert figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)
        assert figure.axes[0].title.get_color() == "black"
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
