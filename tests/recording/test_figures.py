import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lightning_dynamics.callbacks.displacement_table import displacement_table
from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.figures.depth import DepthLine, DepthView
from lightning_dynamics.recording.figures.diffusion import DiffusionView
from lightning_dynamics.recording.figures.phase import PhaseView
from lightning_dynamics.recording.figures.style import plus_minus, rendered
from lightning_dynamics.recording.figures.views import views_of
from lightning_dynamics.recording.record import Record
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


LAGS = [float(lag) for lag in (1, 2, 3, 5, 8, 13, 20, 32, 50, 79, 126, 200, 316, 501, 794)]


def moved(arrays=None, notes=None, **changes):
    """A power law of 1.2 from step 200 on, which drift and diffusion imitate."""
    family = "displacement"
    known = {
        "from_init_lags": [1.0, *(200 + lag for lag in LAGS)],
        "from_init_squares": [0.5] + [4.0 + 0.01 * lag for lag in LAGS],
        "from_init_steps": [0.5] + [2e-3] * len(LAGS),
        "diffusion_lags": LAGS,
        "diffusion_squares": [1e-3 * lag**1.2 for lag in LAGS],
        "diffusion_steps": [1e-3] * len(LAGS),
        "ou_squares": [min(1e-3 * lag, 0.05) for lag in LAGS],
        "local_lags": LAGS[2:-2],
        "local_exponents": [1.2] * len(LAGS[2:-2]),
    }
    law = {
        "window": [79.0, 794.0],
        "prefactor": 1e-3,
        "interval": [1.0, 1.3],
        "dimension": 40.0,
        "remarks": ["the learning rate changes 2 times in the window, first at step 600"],
        "drift": {"diffusion": 2e-3, "drift": 1e-6, "excluded": False},
        "ou": {"amplitude": 3.0, "excluded": True},
    }
    known_notes = {"reference": {"step": 200, "lag": 794, "limiting": True}, "exponent": law}
    values = {
        "step": 994,
        "monitor": "DisplacementMonitor",
        "scalars": {f"{family}/exponent": 1.2, f"{family}/exponent_drift": 1.25, f"{family}/exponent_ou": -0.001},
        "errors": {f"{family}/exponent": 0.05},
        "arrays": {f"{family}/{name}": each for name, each in {**known, **(arrays or {})}.items()},
        "notes": known_notes if notes is None else notes,
    }
    return Record(**{**values, **changes})


def diffusion(*args, **changes):
    return DiffusionView("displacement/diffusion", moved(*args, **changes), "Displacement")


START_ONLY = {name: [] for name in ("diffusion_lags", "diffusion_squares", "diffusion_steps", "ou_squares")} | {
    "local_lags": [],
    "local_exponents": [],
}


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts)


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_distances_are_drawn_with_their_fit_and_what_imitates_it():
    figure = diffusion().figure(994)
    distances, steps, _ = figure.axes
    assert figure.get_suptitle() == "Displacement, up to step 994"
    assert (distances.get_xscale(), distances.get_yscale(), steps.get_yscale()) == ("log", "log", "log")
    lines = labelled(distances)
    assert list(lines) == [
        "from the start",
        "from the reference, step 200",
        "D t + v² t², c = 1.25",
        "Ornstein–Uhlenbeck, c = 0.00 (excluded)",
        "a tᶜ, c = 1.200 ± 0.050",
    ]
    start, reference, drift, bowl, fit = lines.values()
    assert list(start.get_xdata()) == [1.0, *(200 + lag for lag in LAGS)]
    assert start.get_ydata()[0] == 0.5
    assert list(reference.get_xdata()) == LAGS
    assert list(reference.get_ydata()) == [1e-3 * lag**1.2 for lag in LAGS]
    assert list(drift.get_ydata()) == pytest.approx([2e-3 * lag + 1e-6 * lag**2 for lag in LAGS])
    assert list(bowl.get_ydata()) == [min(1e-3 * lag, 0.05) for lag in LAGS]
    assert list(fit.get_xdata()) == [79.0, 794.0]
    assert list(fit.get_ydata()) == pytest.approx([1e-3 * lag**1.2 for lag in (79, 794)])
    assert [line.get_linestyle() for line in (drift, bowl)] == ["--", ":"]
    assert distances.get_ylabel() == "squared distance ‖Δₜ‖² [θ²]"
    assert distances.get_xlabel() == "steps t since start or reference"


def test_the_window_of_the_fit_is_shaded_in_every_panel():
    for axes in diffusion().figure().axes:
        shades = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in axes.patches]
        assert [(shade.x0, shade.x1) for shade in shades] == [(79.0, 794.0)]


def test_guides_have_slopes_one_and_two_and_stay_out_of_the_way():
    figure = diffusion().figure()
    distances = figure.axes[0]
    guides = [line for line in distances.get_lines() if line.get_label().startswith("_")]
    slopes = []
    for line in guides:
        (x0, x1), (y0, y1) = line.get_data()
        slopes.append(math.log(y1 / y0) / math.log(x1 / x0))
    assert slopes == pytest.approx([1, 2])
    low, high = distances.get_ylim()
    left, right = distances.get_xlim()
    assert all(low < min(line.get_ydata()) and max(line.get_ydata()) < high for line in guides)
    assert all(left < min(line.get_xdata()) and max(line.get_xdata()) < right for line in guides)
    assert min(min(line.get_ydata()) for line in guides) > 4.0 + 0.01 * LAGS[-1]  # above all that was measured
    assert [text.get_text() for text in distances.texts] == ["t", "t²"]


def test_what_was_measured_lies_below_the_legend():
    figure = diffusion().figure()
    rendered(figure)
    distances = figure.axes[0]
    bottom = distances.get_legend().get_window_extent().y0
    measured = list(labelled(distances).values())[:2]
    highest = max(distances.transData.transform((1, max(line.get_ydata())))[1] for line in measured)
    assert distances.bbox.y0 < highest < bottom


def test_the_sliding_exponent_stands_beside_the_fitted_one():
    local = diffusion().figure().axes[2]
    levels = [line.get_ydata()[0] for line in local.get_lines()[:3]]
    assert levels == [0, 1, 2]
    assert list(local.get_lines()[3].get_xdata()) == LAGS[2:-2]
    assert list(labelled(local)["c"].get_ydata()) == [1.2, 1.2]
    (band,) = local.collections
    extents = band.get_paths()[0].get_extents()
    assert (extents.x0, extents.x1, extents.y0, extents.y1) == (79.0, 794.0, 1.0, 1.3)
    assert local.get_xlim() == diffusion().figure().axes[0].get_xlim()


def test_one_wild_exponent_leaves_the_others_in_sight():
    arrays = {"local_exponents": [1.2] * (len(LAGS) - 5) + [-40.0]}
    low, high = diffusion(arrays).figure().axes[2].get_ylim()
    assert -3 < low < 0
    assert 2 < high < 5


def test_squared_steps_have_a_panel():
    steps = diffusion().figure().axes[1]
    start, reference = steps.get_lines()
    assert start.get_ydata()[0] == 0.5
    assert list(reference.get_ydata()) == [1e-3] * len(LAGS)
    low, high = steps.get_ylim()
    assert 1e-4 < low < 1e-3 < 0.5 < high < 5


def test_remarks_and_changes_of_the_learning_rate_are_told():
    notes = dict(moved().notes, remarks=["other weights were loaded at step 150"])
    said = texts(diffusion(notes=notes).figure())
    assert "the learning rate changes 2 times in the window, first at step 600" in said
    assert "other weights were loaded at step 150" in said


def test_many_remarks_are_cut_off_and_stay_within_the_figure():
    notes = dict(moved().notes, remarks=["the curve bends by more than chance"] * 40)
    figure = diffusion(notes=notes).figure()
    rendered(figure)
    lines = [text for text in figure.texts if "bends" in text.get_text()]
    assert len(lines) == 2
    assert lines[0].get_text().endswith("…") or lines[1].get_text().endswith("…")
    axes = min(each.get_tightbbox().y0 for each in figure.axes)
    for line in lines:
        extent = line.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1
        assert 0 <= extent.y0 < extent.y1 < axes


def test_without_a_reference_the_way_from_the_start_stands_alone():
    figure = diffusion(START_ONLY, notes={}, scalars={}).figure(7)
    assert figure.get_suptitle() == "Displacement from the start, up to step 7"
    distances, _ = figure.axes
    assert list(labelled(distances)) == ["from the start"]
    assert distances.get_xlabel() == "steps t since the start"
    assert "there is no reference yet" in texts(figure)
    assert not distances.patches


def test_where_there_is_no_exponent_the_reason_is_told():
    notes = {"reference": {"step": 0, "lag": 794}, "no_exponent": "training does not start from the reference"}
    arrays = {"ou_squares": [], "local_lags": [], "local_exponents": []}
    figure = diffusion(arrays, notes=notes, scalars={}).figure()
    assert list(labelled(figure.axes[0])) == ["from the start", "from the reference, step 0"]
    assert "no exponent: training does not start from the reference" in texts(figure)


def test_an_exponent_without_an_error_has_none():
    assert "a tᶜ, c = 1.20" in labelled(diffusion(errors={}).figure().axes[0])


def test_a_short_axis_has_ticks_too():
    arrays = {"from_init_lags": [20.0, 22.0, 24.0], "from_init_squares": [3.0, 3.1, 3.2], "from_init_steps": [2e-7] * 3}
    distances, steps = diffusion({**START_ONLY, **arrays}, notes={}).figure().axes
    assert [label.get_text() for label in distances.get_xticklabels()] == ["20", "30", "40"]
    assert next(label.get_text() for label in steps.get_yticklabels()) == "2·10⁻⁷"


HARD = {
    "zero": [0.0] * 15,
    "nan": [math.nan] * 15,
    "one point": [1.0],
    "empty": [],
    "huge": [*(10.0 ** (50 * i - 300) for i in range(13)), 1.7e308, -1.7e308],
    "mixed": [math.inf, -1.0, 0.0, math.nan, 1.0] * 3,
}


@pytest.mark.parametrize("values", HARD.values(), ids=HARD.keys())
def test_whatever_was_measured_a_figure_of_diffusion_is_drawn(values):
    names = [name.removeprefix("displacement/") for name in moved().arrays]
    figure = diffusion({name: values for name in names if not name.endswith("lags")}).figure(1)
    assert (rendered(figure) != 255).any()
    for line in figure.axes[0].get_lines():
        assert all(math.isnan(y) or 0 < y < math.inf for y in line.get_ydata())


def test_lags_that_make_no_sense_are_left_out():
    names = [name.removeprefix("displacement/") for name in moved().arrays]
    figure = diffusion(dict.fromkeys(names, HARD["mixed"])).figure(1)
    assert (rendered(figure) != 255).any()
    assert list(labelled(figure.axes[0])["from the start"].get_xdata()) == [1.0] * 3


def test_notes_out_of_a_file_may_lack_numbers():
    law = {"window": [None, 794.0], "prefactor": None, "interval": [None, None], "drift": {"diffusion": None}}
    view = diffusion(notes={"exponent": law, "reference": None}, scalars={"displacement/exponent": math.nan})
    assert rendered(view.figure()).shape[2] == 3


ANGLE, RATE = 2 * math.pi / 25, 0.1


def orbit(rows=500, modes=("top_1", "bottom_1"), **changes):
    """A circle along every mode, whose Var p/Var q is 2(1 - cos φ)/η²; theory says four times that."""
    q = [3.0 + 2.0 * math.cos(ANGLE * t) for t in range(-1, rows)]
    p = [(after - before) / RATE for before, after in pairwise(q)]
    ratio = 2 * (1 - math.cos(ANGLE)) / RATE**2
    scalars, errors, arrays = {}, {}, {}
    for mode in modes:
        arrays |= {f"displacement/q_{mode}": q[1:], f"displacement/p_{mode}": p}
        scalars |= {
            f"displacement/frequency_{mode}": ANGLE,
            f"displacement/frequency_predicted_{mode}": 0.25,
            f"displacement/equipartition_{mode}": ratio,
            f"displacement/equipartition_predicted_{mode}": 4 * ratio,
        }
        errors |= {f"displacement/frequency_{mode}": 0.003, f"displacement/equipartition_{mode}": 0.2}
    notes = {"phase": {"since": 5, "rows": rows, "remarks": [], "modes": {mode: [] for mode in modes}}}
    values = {"step": 994, "monitor": "DisplacementMonitor", "scalars": scalars, "errors": errors, "arrays": arrays}
    return Record(**{**values, "notes": notes, **changes})


def phase(**changes):
    return PhaseView("displacement/phase", orbit(**changes), "Phase planes")


def test_trajectories_are_drawn_in_the_order_of_time():
    figure = phase().figure(994)
    assert figure.get_suptitle() == "Phase planes, step 994"
    first, second, bar = figure.axes
    (trajectory,) = first.collections
    drawn = torch.cat([torch.as_tensor(piece)[int(i > 0) :] for i, piece in enumerate(trajectory.get_segments())])
    record = orbit()
    q = torch.tensor(record.arrays["displacement/q_top_1"], dtype=torch.float64)
    p = torch.tensor(record.arrays["displacement/p_top_1"], dtype=torch.float64)
    assert torch.allclose(drawn, torch.stack([q - q.mean(), p], dim=1))
    times = list(trajectory.get_array())
    assert times == sorted(set(times))
    assert times[-1] == 0  # the last step
    brightness = trajectory.to_rgba(trajectory.get_array())[:, :3].sum(axis=1)
    assert bool((brightness[1:] <= brightness[:-1]).all())  # later is darker
    assert brightness[-1] < brightness[0] / 2
    assert bar.get_ylabel() == "steps, counted back from the last"
    assert bar.get_ylim() == (-499, 0)
    assert first.get_xlabel() == "q - ⟨q⟩ [θ]"
    assert second.get_ylabel() == "p [θ per unit of time ηt]"


def ellipses(axes):
    return [torch.as_tensor(line.get_xydata()) for line in axes.get_lines()[2:]]


def covariance(ellipse):
    """Of the distribution that an ellipse of one standard deviation stands for."""
    rim = ellipse[:-1]  # the last point is the first one
    return 2 * (rim - rim.mean(dim=0)).T @ (rim - rim.mean(dim=0)) / len(rim)


def test_ellipses_have_the_width_that_is_measured_and_that_theory_says():
    record = orbit()
    axes = phase().figure().axes[0]
    measured, theory = ellipses(axes)
    path = torch.tensor([record.arrays["displacement/q_top_1"], record.arrays["displacement/p_top_1"]])
    assert torch.allclose(covariance(measured), path.double().cov(correction=0), rtol=1e-4, atol=1e-4)
    one, other = covariance(measured), covariance(theory)
    assert float(other[0, 0]) == pytest.approx(float(one[0, 0]))
    assert float(other[1, 1]) == pytest.approx(4 * float(one[1, 1]))
    assert float(other[0, 1]) == pytest.approx(RATE * float(other[1, 1]) / 2)
    assert [line.get_linestyle() for line in axes.get_lines()[2:]] == ["-", "--"]
    assert axes.get_ylim()[1] > float(theory[:, 1].max())


def test_ellipses_are_those_of_the_whole_window_where_it_is_known():
    notes = {"phase": {"moments": {"top_1": [2.5, 0.25, 8.0], "bottom_1": [None, None, None]}}}
    first, second, _ = phase(notes=notes).figure().axes
    measured, theory = ellipses(first)
    assert float(covariance(measured)[0, 0]) == pytest.approx(8.0)
    assert float(measured[:-1, 1].mean()) == pytest.approx(0.25)
    assert float(theory[:-1, 1].mean()) == pytest.approx(0, abs=1e-9)
    start = torch.as_tensor(first.collections[0].get_segments()[0])[0]
    assert float(start[0]) == pytest.approx(5.0 - 2.5)
    assert float(covariance(ellipses(second)[0])[0, 0]) == pytest.approx(2.0, rel=1e-3)


def test_an_ellipse_out_of_all_proportion_leaves_the_trajectory_in_sight():
    record = orbit()
    scalars = {**record.scalars, "displacement/equipartition_predicted_top_1": 1e6}
    axes = phase(scalars=scalars).figure().axes[0]
    fastest = max(record.arrays["displacement/p_top_1"])
    assert fastest < axes.get_ylim()[1] < 3 * fastest


def test_planes_say_what_is_measured_and_what_theory_says():
    axes = phase().figure().axes[0]
    assert axes.get_title(loc="left") == (
        "top 1\nφ = 0.2513 ± 0.0030 rad/step (theory 0.250)\nVar p/Var q = 6.28 ± 0.20 (theory 25.1)"
    )


def test_without_a_theory_there_is_what_was_measured_and_the_reason():
    record = orbit()
    scalars = {key: value for key, value in record.scalars.items() if "predicted" not in key}
    notes = {"phase": {"no_prediction": "Adam", "remarks": ["the learning rate changes"], "modes": {}}}
    figure = phase(scalars=scalars, notes=notes).figure()
    assert len(ellipses(figure.axes[0])) == 1
    assert "theory" not in figure.axes[0].get_title(loc="left")
    assert "the learning rate changes; no prediction: Adam" in texts(figure)


def test_remarks_on_a_mode_stand_under_its_plane():
    said = ["the window of 90 steps is only 2 relaxation times long: errors are too small", "drift"]
    notes = {"phase": {"modes": {"top_1": said, "bottom_1": []}}}
    first, second, _ = phase(notes=notes).figure().axes
    assert " ".join(text.get_text() for text in first.texts) == (
        "the window of 90 steps is only 2 relaxation times long; drift"
    )
    assert not second.texts


def test_of_many_modes_the_first_three_of_both_ends_are_drawn():
    modes = [f"{end}_{i + 1}" for end in ("top", "bottom") for i in range(11)]
    figure = phase(modes=modes, rows=100).figure()
    names = [axes.get_title(loc="left").partition("\n")[0] for axes in figure.axes[:-1]]
    assert names == ["top 1", "top 2", "top 3", "bottom 1", "bottom 2", "bottom 3"]


def test_planes_do_not_run_into_each_other():
    said = [
        "the window of 1700 steps is only 0.51 relaxation times long: so what",
        "a linear trend makes up 87% of all of its variance",
    ]
    modes = [f"{end}_{i + 1}" for end in ("top", "bottom") for i in range(3)]
    notes = {"phase": {"modes": dict.fromkeys(modes, said), "remarks": ["the learning rate changes"]}}
    figure = phase(modes=modes, rows=100, notes=notes).figure(1000)
    rendered(figure)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [figure.legends[0].get_window_extent(), *(text.get_window_extent() for text in figure.texts)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_small_numbers_get_a_power_of_ten_of_their_own():
    record = orbit()
    arrays = {key: [1e-5 * value for value in values] for key, values in record.arrays.items()}
    axes = phase(arrays=arrays).figure().axes[0]
    rendered(axes.figure)
    assert axes.get_xlabel() == "q - ⟨q⟩ [10⁻⁵ θ]"
    assert {"-2", "0", "2"} <= {label.get_text() for label in axes.get_xticklabels()}


@pytest.mark.parametrize("values", HARD.values(), ids=HARD.keys())
def test_whatever_was_measured_planes_are_drawn(values):
    arrays = {f"displacement/{name}": values for name in ("q_top_1", "p_top_1", "q_bottom_1")}
    assert (rendered(phase(arrays={**orbit().arrays, **arrays}).figure(1)) != 255).any()


def test_without_any_mode_there_is_an_empty_figure():
    assert (rendered(phase(arrays={}, scalars={}, notes={}).figure()) != 255).any()


def test_motion_has_no_histograms():
    assert diffusion().histogram() is None
    assert phase().histogram() is None


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.1349, 0.0512, "1.135 ± 0.051"),
        (0.0, None, "0"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (1974.4, 62.0, "1974 ± 62"),
        (2.179e-4, 9.5e-5, "(2.18 ± 0.95) · 10⁻⁴"),
        (-3.14159e7, None, "-3.14 · 10⁷"),
        (0.5, math.nan, "0.500"),
        (0.5, 1e-300, "0.500000 ± 0.000000"),
        (0.0, 5e-324, "(0.0 ± 0.0) · 10⁻³⁰⁰"),
        (math.nan, 1.0, "?"),
    ],
)
def test_values_are_written_with_the_digits_that_their_errors_allow(value, error, text):
    assert plus_minus(value, error) == text


def drawn(*records):
    """The steps at which views of these records are made, one after the other, and the views."""
    table = displacement_table(None, True, True, ["top_1", "bottom_1"])
    return [
        (record.step, view) for i, record in enumerate(records) for view in views_of(record, records[: i + 1], [table])
    ]


def from_start(step, lags, **changes):
    arrays = {**START_ONLY, **{f"from_init_{name}": [1.0] * lags for name in ("lags", "squares", "steps")}}
    record = moved(arrays, step=step, notes={}, **changes)
    return replace(record, arrays={name: values for name, values in record.arrays.items() if values})


def test_records_with_a_curve_from_the_reference_are_drawn():
    made = drawn(moved(step=994), moved(step=1100))
    assert [(step, view.key, type(view), view.record.step) for step, view in made] == [
        (step, "displacement/diffusion", DiffusionView, step) for step in (994, 1100)
    ]


def test_the_way_from_the_start_is_drawn_now_and_then_and_at_the_end():
    steps = ((1, 1), (9, 9), (11, 10), (12, 11), (50, 19), (60, 20), (61, 20))
    records = [from_start(step, lags) for step, lags in steps]
    assert [step for step, _ in drawn(*records)] == [11, 60]
    assert [step for step, _ in drawn(*records, from_start(62, 20, final=True))] == [11, 60, 62]


def test_a_reference_that_has_no_new_curve_is_not_drawn():
    assert not drawn(replace(from_start(11, 12), notes={"reference": {"step": 5, "lag": 6}}))


def test_phase_planes_are_drawn_where_there_are_trajectories():
    made = drawn(orbit(), orbit(arrays={}, step=1000))
    assert [(step, view.key, type(view), view.title) for step, view in made] == [
        (994, "displacement/phase", PhaseView, "Phase planes")
    ]


def test_figures_of_motion_reach_the_loggers():
    logger = TensorBoardLike()
    LoggerWriter([logger]).write({}, 7, [diffusion(), phase()])
    assert logger.experiment.images == [("displacement/diffusion", 7), ("displacement/phase", 7)]
    assert not logger.experiment.histograms
