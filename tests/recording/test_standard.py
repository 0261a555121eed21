"""The figures of runs: which there are, and that each shows what was measured."""

import math

import pytest
import torch
from helpers.recorded import TABLES, write_run

from lightning_dynamics import figures
from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.recording import Quantity, QuantityTable, Record, Run, load_records, load_runs
from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.figures.standard import layer_panels, panels_of, run_colours, sections
from lightning_dynamics.recording.figures.style import rendered

EVERY = {
    "hessian": ["overview", "spectrum", "spectrum-over-time", "overlap"],
    "collapse": ["overview", "depth-0"],
    "displacement": ["overview", "diffusion-0", "phase-0"],
    "sharpness": ["overview"],
    "noise": ["overview"],
    "sam": ["overview"],
    "dynamics": ["cost"],
}
OF_ONE = (figures.depth, figures.diffusion, figures.phase)
OF_SEVERAL = (
    figures.sharpness,
    figures.spectrum,
    figures.spectrum_over_time,
    figures.overlap,
    figures.collapse,
    figures.displacement,
    figures.stochastic_sharpness,
    figures.noise,
    figures.sam,
    figures.cost,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    write_run(place / "one", run="1")
    write_run(place / "two", run="2", hyperparameters={"lr": 0.1})
    return place


def ink(figure):
    """Share of the pixels that are not white."""
    return float((rendered(figure) < 250).any(dim=2).double().mean())


def by_title(panels):
    return {panel.title: panel for panel in panels}


def test_a_run_has_every_figure_of_its_monitors(folder):
    found = sections(load_runs(folder / "one"))
    assert {each.family: [shown.name for shown in each.figures] for each in found} == EVERY
    names = [(each.family, shown.name) for each in found for shown in (*each.figures, *each.more)]
    assert len(names) == len(set(names))
    assert all(shown.title for each in found for shown in (*each.figures, *each.more))


def test_all_figures_are_drawn_with_ink(folder):
    for section in sections(load_runs(folder)):
        for shown in (*section.figures, *section.more):
            assert ink(shown.draw()) > 0.01, shown.name


def test_everything_that_was_recorded_is_in_some_panel(folder):
    (run,) = load_runs(folder / "one")
    shown = [figure for section in sections([run]) for figure in (*section.figures, *section.more)]
    drawn = {tuple(curve.y) for figure in shown for panel in figure.panels for curve in panel.curves}
    for key in run.keys:
        assert tuple(run.series(key).values) in drawn, key


def test_the_sharpness_stands_with_its_threshold_and_the_crossing_is_marked(folder):
    (run,) = load_runs(folder / "one")
    panels = by_title(panels_of([run], "hessian"))
    sharpness = panels["Sharpness and threshold"]
    assert [(curve.label, curve.style) for curve in sharpness.curves] == [("λ₁", "line"), ("λ*", "dashed")]
    ratio = run.series("hessian/edge_ratio")
    first = next(step for step, value in zip(ratio.steps, ratio.values, strict=True) if value >= 1)
    assert [(x, label) for x, label, _ in sharpness.marks] == [(first, "at the edge")]
    assert panels["Edge ratio, ρ"].levels == [(1.0, "")]
    assert panels["Probe loss, L"].scale == "log"
    assert list(sharpness.curves[0].error) == [0.01] * 20


def test_a_run_that_never_comes_to_the_edge_has_no_mark(tmp_path):
    write_run(tmp_path, steps=range(0, 50, 10))
    assert all(not panel.marks for panel in panels_of(load_runs(tmp_path), "hessian"))


def test_a_run_that_starts_beyond_the_edge_has_not_crossed_it(tmp_path):
    write_run(tmp_path, steps=range(400, 600, 10))
    assert all(not panel.marks for panel in panels_of(load_runs(tmp_path), "hessian"))


def test_several_runs_share_axes_and_are_told_apart(folder):
    runs = load_runs(folder)
    panel = by_title(panels_of(runs, "hessian"))["Sharpness and threshold"]
    assert [(c.run, c.label) for c in panel.curves] == [("one", "λ₁"), ("one", "λ*"), ("two", "λ₁"), ("two", "λ*")]
    assert len({curve.colour for curve in panel.curves}) == 2
    assert {curve.style for curve in panel.curves if curve.label == "λ*"} == {"dashed"}


def test_a_family_that_one_run_lacks_is_drawn_for_the_others(folder, tmp_path):
    write_run(tmp_path / "three", run="3", tables=TABLES[:1])
    runs = load_runs(folder / "one", tmp_path / "three")
    found = {each.family: each for each in sections(runs)}
    assert list(found) == list(EVERY)
    (collapse,) = (shown for shown in found["collapse"].figures if shown.name == "overview")
    assert {curve.run for panel in collapse.panels for curve in panel.curves} == {"one"}


def test_many_runs_have_colours_of_their_own():
    for count in (1, 6, 7, 20):
        assert len(set(run_colours(count))) == count


def test_layers_are_coloured_by_depth_and_named(folder):
    (run,) = load_runs(folder / "one")
    (collapse,) = (each for each in sections([run]) if each.family == "collapse")
    (layers,) = (shown for shown in collapse.more if shown.name == "layers-0")
    (panel,) = (panel for panel in layers.panels if panel.title.endswith("(nc1)"))
    assert [curve.label for curve in panel.curves] == ["net_0", "last"]
    assert panel.scale == "log"


@pytest.mark.parametrize("draw", [*OF_SEVERAL, *OF_ONE], ids=lambda draw: draw.__name__)
def test_every_function_draws_a_run_from_its_path(draw, folder):
    assert draw(str(folder / "one")).axes


@pytest.mark.parametrize("draw", OF_ONE, ids=lambda draw: draw.__name__)
def test_functions_of_one_run_ask_which(draw, folder):
    with pytest.raises(ValueError, match="This figure shows one run; there are 2: one, two"):
        draw(folder)


def test_what_was_not_measured_is_an_error_that_says_so(tmp_path):
    write_run(tmp_path, tables=TABLES[2:3])
    with pytest.raises(
        ValueError, match=r"These records hold no values of hessian/top_1\. They hold displacement, dynamics"
    ):
        figures.sharpness(tmp_path)
    for draw in (figures.spectrum, figures.collapse, figures.depth):
        with pytest.raises(ValueError, match="These records hold no"):
            draw(tmp_path)


def test_records_and_monitors_are_drawn_too(folder):
    (run,) = load_runs(folder / "one")
    records = [record for record in run.records if record.monitor == "HessianMonitor"]

    class Monitor:
        def __init__(self):
            self.run = Run("HessianMonitor", (), records, declared=[TABLES[0]])

    for source in (records, Monitor(), [Monitor(), run]):
        assert ink(figures.sharpness(source)) > 0.01
        assert ink(figures.spectrum(source)) > 0.01
    collapse = [record for record in run.records if record.monitor == "NeuralCollapseMonitor"]
    assert ink(figures.depth(collapse)) > 0.01
    assert ink(figures.phase([record for record in run.records if record.monitor == "DisplacementMonitor"])) > 0.01
    with pytest.raises(TypeError, match="not float"):
        figures.sharpness(1.0)


def test_the_same_run_twice_is_told_apart(folder):
    (run,) = load_runs(folder / "one")
    runs = figures.as_runs([run, run])
    assert [run.name for run in runs] == ["one 1", "one 2"]


def test_paths_in_a_list_are_read_together(tmp_path):
    """Their names tell them apart, and generators will do."""
    write_run(tmp_path / "a" / "version_0", run="1")
    write_run(tmp_path / "b" / "version_0", run="2")
    places = [tmp_path / "a" / "version_0", str(tmp_path / "b" / "version_0")]
    assert [run.name for run in figures.as_runs(places)] == ["a/version_0", "b/version_0"]
    assert [run.name for run in figures.as_runs(path for path in places)] == ["a/version_0", "b/version_0"]
    with pytest.raises(TypeError, match="not RecordTable"):
        figures.sharpness(load_records(tmp_path))


def test_the_only_monitor_with_a_name_is_found(tmp_path):
    table = hessian_table(2, 0, name="head")
    records = [Record(step=i, monitor="M", scalars={"hessian_head/top_1": 1.0 + i}) for i in range(3)]
    (axes,) = figures.sharpness(Run("r", (), records, declared=[table])).axes
    assert list(axes.lines[0].get_ydata()) == [1, 2, 3]


def test_every_line_of_a_chart_has_a_look_of_its_own(tmp_path):
    quantities = tuple(Quantity(f"q{i}", f"Q{i}", "loss", "…", "own", "none", "Many") for i in range(9))
    table = QuantityTable(
        "m", "M", (*quantities, Quantity("t", "T", "loss", "…", "own", "none", "Many")), references=("t",)
    )
    records = [
        Record(step=i, monitor="M", scalars={f"m/{q.key}": i + j for j, q in enumerate(table.quantities)})
        for i in (0, 1)
    ]
    runs = [Run(name, (), records, declared=[table]) for name in "ab"]
    for chosen in (runs[:1], runs):
        panels = panels_of(chosen, "m")
        assert {c.label for panel in panels for c in panel.curves} == {f"Q{i}" for i in range(9)} | {"T"}
        for panel in panels:
            looks = [(curve.colour, curve.style) for curve in panel.curves]
            assert len(looks) == len(set(looks))


def test_two_thresholds_are_told_apart():
    table = TABLES[3]
    keys = ("batch_sharpness", "stability_threshold", "small_batch_level")
    records = [Record(step=i, monitor="M", scalars={f"sharpness/{key}": 1.0 + i for key in keys}) for i in (0, 1)]
    panels = panels_of([Run("r", (), records, declared=[table])], "sharpness")
    assert [(c.label, c.style) for panel in panels for c in panel.curves] == [
        ("BS", "line"),
        ("λ*", "dashed"),
        ("small_batch_level", "dotted"),
    ]


def test_a_layer_has_one_colour_in_all_charts(folder):
    (run,) = load_runs(folder / "one")
    table = next(table for table in run.tables if table.family == "collapse")
    records = [
        Record(step=0, monitor="M", scalars={"collapse/nc1/a": 1.0, "collapse/nc1/b": 1.0, "collapse/cdnv/b": 1.0})
    ]
    panels = layer_panels(Run("r", (), records, declared=[table]), "collapse")
    colours = {(curve.label, curve.colour) for panel in panels for curve in panel.curves}
    assert len(colours) == 2


def test_more_runs_than_fit_are_told(tmp_path):
    for i in range(5):
        write_run(tmp_path / str(i), run=str(i), steps=range(0, 60, 10), tables=TABLES[:1])
    for draw in (figures.spectrum, figures.spectrum_over_time, figures.overlap):
        assert "the first 4 of 5 runs" in [text.get_text() for text in draw(tmp_path).texts]


def test_any_keys_are_drawn_by_their_patterns(folder):
    figure = figures.curves(folder / "one", r"hessian/top_[12]")
    assert len(figure.axes) == 2  # the first stands with its threshold's chart
    assert len(figures.curves(folder, ["noise/trace", "sam/.*"]).axes) == 4
    with pytest.raises(ValueError, match=r"hold no values of 'hessian/nothing'"):
        figures.curves(folder, "hessian/nothing")


def test_every_column_of_the_heat_map_holds_all_eigenvalues(folder, tmp_path):
    """Narrow spectra beside wide ones, too."""
    edges = torch.linspace(-1, 20, 161, dtype=torch.float64)
    for span in (0.0, 1e-3, 0.1, 5.0):
        nodes = [-span / 10, 0.0, span / 2, span]
        view = DensityView("k", nodes, [0.1, 0.5, 0.3, 0.1], 1000, [span], 1, None, "T", "u")
        assert float(view.in_bins(edges).sum()) == pytest.approx(1000, rel=1e-6)
        grid = torch.linspace(-1, 20, 400, dtype=torch.float64)
        if span < 1:  # else the tails of wide peaks go beyond the axis
            assert float(view.counts(grid).sum()) * float(grid[1] - grid[0]) == pytest.approx(1000, rel=0.02)
        occupied = edges[:-1][view.in_bins(edges) > 0]
        assert float(occupied[0]) > nodes[0] - 0.3


def test_eigenvalues_are_where_the_heat_map_shows_them(folder):
    """A column of it has colour at the bulk and at the outliers, and none between."""
    figure = figures.spectrum_over_time(folder / "one")
    (mesh,) = (each for each in figure.axes[0].collections if each.get_array() is not None)
    counts = torch.tensor(mesh.get_array().filled(math.nan))
    edges = torch.tensor(mesh.get_coordinates()[:, 0, 1])
    (run,) = load_runs(folder / "one")
    top = run.series("hessian/top_1").values[15]
    column = counts[:, 3]  # the fourth spectrum is that of point 15

    def near(value):
        return int(((edges[1:] + edges[:-1]) / 2 - value).abs().argmin())

    assert column[near(0.0)] > 1  # tens of eigenvalues
    assert column[near(top)] > 0.05
    assert math.isnan(column[near(0.75 * top)])


def test_overlaps_are_drawn_as_they_stand_in_the_record(folder):
    figure = figures.overlap(folder / "one")
    values = [text.get_text() for text in figure.axes[0].texts]
    assert values == ["0.90", "0.10", "0.00", "0.10", "0.80", "0.10", "0.00", "0.10", "0.70"]
