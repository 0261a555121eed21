import math
import sys

import pytest
import torch

from lightning_dynamics.recording.figures import DensityView, DepthLine, DepthView, rendered
from lightning_dynamics.recording.writer import LoggerWriter


def view(**changes):
    """Two outliers, and a bulk that two quadratures of five nodes each stand for."""
    bulk = [-0.2, -0.19, -0.05, -0.04, 0.0, 0.01, 0.1, 0.12, 0.3, 0.31]
    values = {
        "key": "hessian/density",
        "nodes": [*bulk, 3.0, 5.0],
        "weights": [0.098] * 10 + [0.01] * 2,
        "size": 100,
        "certain": [5.0, 3.0],
        "num_vectors": 2,
        "threshold": 6.0,
        "title": "Hessian",
        "unit": "loss/θ²",
    }
    return DensityView(**{**values, **changes})


def test_the_histogram_counts_eigenvalues():
    values, edges = view().histogram()
    assert len(values) == 64
    assert len(edges) == 65
    assert float(edges[0]) == pytest.approx(-0.2)
    assert float(edges[-1]) == pytest.approx(5.0)
    counts = 10**values - 1
    assert float(counts.sum()) == pytest.approx(100)
    middles = (edges[1:] + edges[:-1]) / 2
    assert float(counts[(middles > 2.5) & (middles < 3.5)].sum()) == pytest.approx(1, rel=1e-3)
    assert float(counts[(middles > 1.5) & (middles < 2.5)].sum()) < 0.01


def test_a_spectrum_in_one_place_has_a_histogram():
    values, edges = view(nodes=[2.0], weights=[1.0], certain=[2.0]).histogram()
    assert bool(values.isfinite().all())
    assert float(edges[0]) < 2 < float(edges[-1])


def test_the_figure_shows_density_outliers_and_threshold():
    figure = view().figure(step=7)
    (axes,) = figure.axes
    assert axes.get_title() == "Hessian, step 7"
    assert axes.get_xlabel() == "eigenvalue λ [loss/θ²]"
    assert axes.get_yscale() == "log"
    curve, marks, threshold = axes.get_lines()
    assert list(marks.get_xdata()) == [5.0, 3.0]
    assert list(threshold.get_xdata()) == [6.0, 6.0]
    x, y = (torch.as_tensor(data) for data in curve.get_data())
    assert float(torch.trapezoid(y, x)) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("threshold", [None, 400.0, -1.0])
def test_a_threshold_that_is_far_is_not_shown(threshold):
    (axes,) = view(threshold=threshold).figure().axes
    assert len(axes.get_lines()) == 2


def test_a_figure_becomes_pixels_without_pyplot():
    before = "matplotlib.pyplot" in sys.modules
    pixels = rendered(view().figure())
    assert pixels.dtype is torch.uint8
    assert pixels.shape[2] == 3
    assert pixels.float().std() > 10
    assert ("matplotlib.pyplot" in sys.modules) == before


class Experiment:
    """What TensorBoard's writer offers."""

    def __init__(self):
        self.histograms, self.images = [], []

    def add_custom_scalars(self, layout):
        pass

    def add_histogram_raw(self, tag, **values):
        self.histograms.append((tag, values["global_step"]))

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC"
        self.images.append((tag, step))


class TensorBoardLike:
    def __init__(self):
        self.experiment = Experiment()
        self.rows = []

    def log_metrics(self, row, step):
        self.rows.append((row, step))


class Plain:
    experiment = None

    def __init__(self):
        self.rows = []

    def log_metrics(self, row, step):
        self.rows.append((row, step))


def test_every_spectrum_has_a_histogram_and_few_have_figures():
    logger = TensorBoardLike()
    writer = LoggerWriter([logger])
    for step in range(9):
        writer.write({"hessian/trace": 1.0}, step, [view()])
    assert logger.experiment.histograms == [("hessian/density", step) for step in range(9)]
    assert [step for _, step in logger.experiment.images] == [0, 1, 3, 7]
    assert logger.rows == [({"hessian/trace": 1.0}, step) for step in range(9)]


def test_other_loggers_get_the_numbers():
    logger = Plain()
    LoggerWriter([logger]).write({"hessian/trace": 1.0}, 3, [view()])
    assert logger.rows == [({"hessian/trace": 1.0}, 3)]


def test_without_matplotlib_there_are_histograms_and_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    logger = TensorBoardLike()
    writer = LoggerWriter([logger])
    with pytest.warns(UserWarning, match="figures need matplotlib"):
        writer.write({}, 0, [view()])
    writer.write({}, 1, [view()])  # a second warning would be an error
    writer.write({}, 2, [view()])
    assert len(logger.experiment.histograms) == 3
    assert not logger.experiment.images


def test_a_figure_that_cannot_be_drawn_costs_itself(monkeypatch):
    failures = []
    logger = TensorBoardLike()
    writer = LoggerWriter([logger], lambda: failures.append(1))
    monkeypatch.setattr(DensityView, "figure", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="could not be drawn"):
        writer.write({"a": 1.0}, 0, [view()])
    assert failures
    assert logger.rows


def through_depth(layers=3, **changes):
    lines = [
        DepthLine(10 * t, t, {"nc1": [10.0 ** -(i + t) for i in range(layers)], "floor": [0.5] * layers})
        for t in range(4)
    ]
    named = [f"layer_{i}" for i in range(layers)]
    values = {
        "layers": named,
        "panels": [("nc1", "floor")],
        "lines": lambda: lines,
        "title": "Neural collapse",
        **changes,
    }
    return DepthView("collapse/depth", **values)


def test_depth_is_drawn_line_by_line_over_time():
    figure = through_depth().figure(30)
    axes, bar = figure.axes
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert drawn[:4] == [[10.0 ** -(i + t) for i in range(3)] for t in range(4)]
    assert drawn[4] == [0.5] * 3  # what noise alone gives
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "NC1"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layer_2", "layer_1", "layer_0"]
    assert axes.get_xticks().tolist() == [2, 1, 0]
    assert bar.get_ylabel() == "epoch"
    colours = [line.get_color() for line in axes.lines[:4]]
    assert len(set(map(tuple, colours))) == 4
    # later is darker, in print and for every reader
    brightness = [sum(colour[:3]) for colour in colours]
    assert brightness == sorted(brightness, reverse=True)


def test_within_one_epoch_time_is_counted_in_steps():
    lines = [DepthLine(step, 0, {"nc1": [1.0, 0.1]}) for step in (0, 5)]
    figure = through_depth(layers=2, panels=[("nc1", None)], lines=lambda: lines).figure()
    assert figure.axes[1].get_ylabel() == "step"


def test_of_many_lines_some_are_drawn_the_first_and_the_last_included():
    lines = [DepthLine(round(1.2**t), 0, {"nc1": [1.0, 1.0 / (t + 1)]}) for t in range(60)]
    figure = through_depth(layers=2, panels=[("nc1", None)], lines=lambda: lines).figure()
    ends = [line.get_ydata()[1] for line in figure.axes[0].lines]
    assert len(ends) <= 24
    assert (ends[0], ends[-1]) == (1.0, 1.0 / 60)


@pytest.mark.parametrize("layers", [2, 40])
def test_values_that_a_logarithm_does_not_have_leave_gaps_and_nothing_overflows(layers):
    lines = [DepthLine(0, 0, {"nc1": [0.0, math.nan, *[1.0] * (layers - 2)]})]
    names = [f"backbone_stage_{i}_block_with_a_long_name" for i in range(layers)]
    pixels = rendered(DepthView("collapse/depth", names, [("nc1", None)], lambda: lines, "Neural collapse").figure(1))
    assert pixels.shape[0] > 300
    assert (pixels != 255).any()


def test_of_many_or_long_names_some_are_shown_by_what_tells_them_apart():
    layers = [f"backbone_stage_{i}_block_with_a_long_name" for i in range(40)]
    lines = [DepthLine(0, 0, {"nc1": [1.0] * 40})]
    figure = DepthView(
        "collapse/depth", [*layers[:-1], "last"], [("nc1", None)], lambda: lines, "Neural collapse"
    ).figure()
    texts = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert texts[:2] == ["last", "36_block_with_a_…"]
    assert len(texts) <= 14


def test_depth_has_no_histogram():
    assert through_depth().histogram() is None
