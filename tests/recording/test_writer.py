import json
import math

import pytest
from helpers.clients import wandb_records
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.writer import LoggerWriter

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
