import json
import math

import pytest
import torch
from helpers.clients import wandb_records
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.tensorboard import found_layout
from lightning_dynamics.recording.writer import Display, LoggerWriter

pytestmark = pytest.mark.clients

TABLE = QuantityTable(
    "hessian",
    "Hessian",
    (
        Quantity("top_1", "λ₁", "loss/θ²", "The largest.", "a paper", "bound", "Sharpness"),
        Quantity("top_10", "λ₁₀", "loss/θ²", "The tenth.", "a paper", "bound", "Sharpness"),
    ),
)


def write(logger):
    writer = LoggerWriter([logger])
    writer.begin([TABLE], "about this run")
    for step in (0, 10, 20):
        writer.write({"hessian/top_1": 1.0 + step, "hessian/top_10": math.nan if step == 10 else 0.5}, step)
    logger.save()
    logger.finalize("success")


def test_tensorboard_has_the_points_the_layout_and_the_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    write(logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("hessian/top_1")] == [(0, 1.0), (10, 11.0), (20, 21.0)]
    assert [e.step for e in events.Scalars("hessian/top_10")] == [0, 20]
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "Hessian"
    assert [list(chart.multiline.tag) for chart in category.chart] == [["^hessian/top_1$", "^hessian/top_10$"]]
    text = events.Tensors("about/lightning_dynamics/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"about this run"


def test_csv_has_one_row_per_measurement(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    write(logger)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",") == ["hessian/top_1", "hessian/top_10", "step"]
    assert lines[1:] == ["1.0,0.5,0", "11.0,,10", "21.0,0.5,20"]


def test_wandb_has_one_row_per_measurement_and_its_own_axis(tmp_path):
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=settings)
    write(logger)
    run_dir = logger.experiment.dir
    wandb.finish()
    wandb.teardown()
    records = wandb_records(run_dir)
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    ours = [row for row in rows if "hessian/top_1" in row]
    assert [row["trainer/global_step"] for row in ours] == [0, 10, 20]
    assert ours[0]["hessian/top_10"] == 0.5
    assert len(rows) == 3
    metrics = {(r.metric.name or r.metric.glob_name): r.metric.step_metric for r in records if r.HasField("metric")}
    assert metrics["hessian/*"] == "trainer/global_step" or metrics.get("hessian/top_1") == "trainer/global_step"


def test_a_logger_that_fails_is_named_once_and_the_others_go_on(tmp_path):
    class Broken:
        experiment = None

        def log_metrics(self, metrics, step):
            raise OSError("disk full")

    failures = []
    logger = CSVLogger(tmp_path, name="", version="")
    writer = LoggerWriter([Broken(), logger], lambda: failures.append(1))
    with pytest.warns(UserWarning, match=r"Broken failed.*disk full"):
        writer.write({"hessian/top_1": 1.0}, 0)
    for step in (1, 2):
        writer.write({"hessian/top_1": 1.0}, step)  # warnings are errors: no second one comes
    assert len(failures) == 3
    logger.save()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


def test_nothing_is_logged_where_nothing_is_finite(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    LoggerWriter([logger]).write({"hessian/top_1": math.inf}, 0)
    logger.save()
    assert not (tmp_path / "metrics.csv").exists()


class Drawing:
    """A view of a histogram over ``edges``, and a picture of one pixel."""

    def __init__(self, edges=(0.0, 1.0, 2.0), values=(3.0, 1.0), key="hessian/density"):
        self.key = key
        self.edges, self.values = edges, values

    def histogram(self):
        return torch.tensor(self.values), torch.tensor(self.edges)

    def figure(self, step=None):
        return step


@pytest.fixture
def pixels(monkeypatch):
    """Figures without matplotlib."""
    monkeypatch.setattr("lightning_dynamics.recording.writer.rendered", lambda figure: torch.zeros(1, 1, 3))


def drawn(logger, steps, **options):
    """Steps at which a figure and a histogram of the drawing were logged."""
    writer = LoggerWriter([logger], **options)
    for step in range(steps):
        writer.write({}, step, [Drawing()], is_last=step == steps - 1)
    logger.save()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    images = events.Images("hessian/density_figure") if "hessian/density_figure" in events.Tags()["images"] else []
    return [event.step for event in images], [event.step for event in events.Histograms("hessian/density")]


@pytest.mark.parametrize(
    ("steps", "figures"),
    [
        (1, [0]),
        (5, [0, 1, 3, 4]),
        (64, [0, 1, 3, 7, 15, 31, 63]),
        (3000, [0, 1, 3, 7, 15, 31, 63, 255, 1023, 2999]),
    ],
)
def test_ten_figures_of_a_kind_at_most_and_the_last_one_always(tmp_path, pixels, steps, figures):
    assert drawn(TensorBoardLogger(tmp_path), steps) == (figures, list(range(steps)))


def test_without_figures_there_are_histograms(tmp_path, pixels):
    assert drawn(TensorBoardLogger(tmp_path), 3, display=Display(figures=False)) == ([], [0, 1, 2])


def test_heights_of_a_ridge_do_not_follow_the_widths_of_bins(tmp_path, pixels):
    """TensorBoard sorts all steps into bins of one width: what stands there is the area that it finds."""
    logger = TensorBoardLogger(tmp_path)
    writer = LoggerWriter([logger])
    narrow, wide = Drawing((0.0, 0.5, 1.0), (2.0, 2.0)), Drawing((0.0, 5.0, 10.0), (2.0, 2.0))
    for step, view in enumerate((narrow, wide)):
        writer.write({}, step, [view])
    logger.save()
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    density = [
        [
            count / (right - left)
            for count, left, right in zip(h.bucket, [h.min, *h.bucket_limit], h.bucket_limit, strict=False)
            if count
        ]
        for h in (event.histogram_value for event in events.Histograms("hessian/density"))
    ]
    assert density == [[2.0, 2.0], [2.0, 2.0]]


def test_the_layout_comes_with_the_first_point_after_those_of_others(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    said = []
    writer = LoggerWriter([logger], display=Display(extra_layout={"Mine": {}}), say=said.append)
    writer.begin([TABLE], "about this run")
    logger.experiment.add_custom_scalars({"Theirs": {"Loss": ["Multiline", ["^loss$"]]}})
    writer.write({"hessian/top_1": math.nan}, 0)  # nothing to log
    logger.experiment.flush()
    assert list(found_layout(logger.log_dir)) == ["Theirs"]
    for step in (1, 2):
        writer.write({"hessian/top_1": 1.0}, step)
    logger.experiment.flush()
    assert list(found_layout(logger.log_dir)) == ["Theirs", "Mine", "Hessian"]
    assert len(said) == 1
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    assert len(events.Tensors("custom_scalars__config__")) == 2  # theirs, and ours once


def test_no_layout_is_written_where_none_is_wanted(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    writer = LoggerWriter([logger], display=Display(layout=False))
    writer.begin([TABLE], "about this run")
    writer.write({"hessian/top_1": 1.0}, 1)
    logger.save()
    assert found_layout(logger.log_dir) == {}


@pytest.mark.parametrize("place", ["s3://bucket/run", None, 3])
def test_a_layout_that_cannot_be_looked_for_costs_nothing(tmp_path, place):
    """Writers of other places, and those that are not quite like TensorBoard's."""

    class Elsewhere:
        log_dir = place

        def __init__(self):
            self.layouts = []

        def add_custom_scalars(self, layout):
            self.layouts.append(layout)

        def add_text(self, tag, text, step):
            pass

    class Logger:
        experiment = Elsewhere()

        def log_metrics(self, metrics, step):
            pass

    writer = LoggerWriter([Logger()])
    writer.begin([TABLE], "about this run")
    writer.write({"hessian/top_1": 1.0}, 0)  # warnings are errors: none comes
    (layout,) = Logger.experiment.layouts
    assert list(layout) == ["Hessian"]
