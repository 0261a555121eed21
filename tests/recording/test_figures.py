import sys

import pytest
import torch

from lightning_dynamics.recording.figures import DensityView, rendered
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
