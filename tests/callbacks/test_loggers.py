"""What a whole fit leaves in each logger, read back."""

from __future__ import annotations

import csv
import json
import re

import pytest
from helpers.clients import wandb_records
from helpers.fit import fit, full_batch
from helpers.modules import Classification, Regression, class_data
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import (
    DisplacementMonitor,
    GradientNoiseMonitor,
    HessianMonitor,
    NeuralCollapseMonitor,
    Probe,
    Spectrum,
    StochasticSharpnessMonitor,
    load_runs,
    read_records,
)
from lightning_dynamics.callbacks.ledger import COST

pytestmark = pytest.mark.clients

WHOLE = Probe(whole=True)


def two_monitors():
    return [
        HessianMonitor(2, 1, every_n_train_steps=2, probe=WHOLE),
        HessianMonitor(1, 0, every_n_train_steps=2, probe=Probe(size=10, batch_size=5), name="small"),
    ]


def trained(logger, epochs=5, monitors=None, **options):
    monitors = two_monitors() if monitors is None else monitors
    fit(monitors, Regression(lr=1e-3), full_batch(), max_epochs=epochs, logger=logger, **options)
    return monitors


def test_tensorboard_shows_the_curves_the_layout_and_the_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    monitor, small = trained(TensorBoardLogger(tmp_path, name="", version="run"))
    events = EventAccumulator(str(tmp_path / "run"), {"scalars": 0, "tensors": 0})
    events.Reload()
    for record in (*monitor.history, *small.history):
        for key, value in record.scalars.items():
            if key in events.Tags()["scalars"]:
                logged = {e.step: e.value for e in events.Scalars(key)}
                assert logged[record.step] == pytest.approx(value, rel=1e-6)
    steps = [event.step for event in events.Scalars("hessian/top_1")]
    assert steps == [0, 2, 4, 5]
    assert "hessian/top_1_swing" not in events.Tags()["scalars"]

    (layout,) = events.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {(c.title, chart.title): list(chart.multiline.tag) for c in parsed.category for chart in c.chart}
    assert {c.title for c in parsed.category} == {"Hessian", "Hessian (small)", "Cost of the monitors"}
    assert charts[("Hessian", "Sharpness and threshold")] == [r"^hessian/top_1$", r"^hessian/stability_threshold$"]
    assert ("Hessian", "Clipping") not in charts  # nothing is clipped, and no chart stays empty
    assert ("Hessian", "Spectral sparsity") not in charts
    drawn = [key for key in events.Tags()["scalars"] if re.match("hessian|dynamics", key)]
    for key in drawn:
        assert any(re.match(pattern, key) for patterns in charts.values() for pattern in patterns), key

    (tag,) = [tag for tag in events.Tags()["tensors"] if "about" in tag]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    for fact in ("the whole training set, 24 samples of 24 (100 %)", "10 samples of 24 (41.7 %)", "every 2 steps"):
        assert fact in text


def test_the_records_tell_what_measuring_has_cost(tmp_path):
    monitor, small = trained(CSVLogger(tmp_path, name="", version="run"))
    (run,) = load_runs(tmp_path)
    assert [cost.step for cost in run.costs] == [0, 2, 4, 5]
    assert 0 < run.overhead <= 1
    assert list(run.costs[-1].seconds) == [monitor.label, small.label]
    for each in (monitor, small):
        # one measurement may end a pair and begin the next: records count it in both
        assert 0 < run.costs[-1].seconds[each.label] <= sum(record.seconds for record in each.history) + 0.01
    with (tmp_path / "run" / "metrics.csv").open() as stream:
        logged = [row["dynamics/overhead"] for row in csv.DictReader(stream) if row["dynamics/overhead"]]
    assert float(logged[-1]) == pytest.approx(run.overhead, abs=1e-6)
    assert run.is_finished


def test_spectra_are_seen_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = HessianMonitor(2, 1, every_n_train_steps=2, probe=WHOLE, spectrum=Spectrum(2), also_log="median_ratio/.*")
    trained(TensorBoardLogger(tmp_path, name="", version="run"), monitors=[monitor])
    events = EventAccumulator(str(tmp_path / "run"), {"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("hessian/trace")] == [0, 2, 4, 5]
    layout = (
        events.Tensors("custom_scalars__config__") if "custom_scalars__config__" in events.Tags()["tensors"] else []
    )
    assert any(b"hessian/median_ratio/.+$" in event.tensor_proto.string_val[0] for event in layout)
    histograms = events.Histograms("hessian/density")
    assert [event.step for event in histograms] == [0, 2, 4, 5]
    top = monitor.history[0].scalars["hessian/top_1"]
    assert histograms[0].histogram_value.max == pytest.approx(top, rel=1e-2)
    assert [event.step for event in events.Images("hessian/density_figure")] == [0, 2, 5]


def test_spectra_are_in_the_row_of_their_step_in_wandb(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("run", tmp_path, offline=True, project="test")
    trained(logger, monitors=[HessianMonitor(2, 1, every_n_train_steps=2, probe=WHOLE, spectrum=Spectrum(2))])
    run_dir = logger.experiment.dir
    wandb.finish()
    kinds = {}
    for record in wandb_records(run_dir):
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "hessian/trace" in row:
                step = row["trainer/global_step"]
                kinds[step] = (row["hessian/density/_type"], "hessian/density_figure/_type" in row)
    assert kinds == {0: ("histogram", True), 2: ("histogram", True), 4: ("histogram", False), 5: ("histogram", True)}


def test_collapse_is_one_row_per_measurement_with_its_figure_in_wandb(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("run", tmp_path, offline=True, project="test")
    data = DataLoader(TensorDataset(*class_data()), 60)
    monitor = NeuralCollapseMonitor(every_n_train_steps=1, probe=WHOLE, also_log="cdnv/.*")
    fit(monitor, Classification(), data, max_epochs=4, logger=logger)
    run_dir = logger.experiment.dir
    wandb.finish()
    drawn = {}
    for record in wandb_records(run_dir):
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "collapse/nc1" in row:
                assert row["collapse/cdnv/net_2"] > 0
                drawn[row["trainer/global_step"]] = row.get("collapse/depth/_type")
    assert drawn == {0: "image-file", 1: "image-file", 2: None, 3: "image-file", 4: "image-file"}


def test_the_edge_of_sgd_is_one_chart_and_each_point_one_call(tmp_path):
    """Also where a point is measured only after its step: other monitors' values of that step wait for it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    calls = []

    class Watched(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("dynamics/") for key in metrics):
                calls.append((step, set(metrics)))
            super().log_metrics(metrics, step)

    monitors = [
        HessianMonitor(1, 0, every_n_train_steps=1, pair=False, spectrum=False),
        StochasticSharpnessMonitor(
            every_n_train_steps=1, eigenvalues_every_n_train_steps=1, solved=2, probe=Probe(draws=4)
        ),
        GradientNoiseMonitor(every_n_train_steps=1, detail_every_n_train_steps=1, directions=1, probe=Probe(draws=4)),
    ]
    trained(Watched(tmp_path, name="", version="run"), monitors=monitors)
    steps = [step for step, _ in calls]
    assert steps == sorted(set(steps))
    for _, keys in calls:
        assert {"hessian/top_1", "sharpness/batch_sharpness", "noise/trace", "dynamics/overhead"} <= keys
    events = EventAccumulator(str(tmp_path / "run"), {"tensors": 0, "scalars": 0}).Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {(c.title, chart.title): list(chart.multiline.tag) for c in parsed.category for chart in c.chart}
    curves = ["batch_sharpness", "minibatch_top_1", "top_1", "stability_threshold", "small_batch_level"]
    drawn = charts["Stochastic sharpness", "Sharpness of mini-batches"]
    assert drawn == [f"^sharpness/{key}$" for key in curves]
    assert charts["Gradient noise", "Noise"] == ["^noise/trace$", "^noise/squared_gradient_norm$"]
    tags = events.Tags()["scalars"]
    assert {"sharpness/batch_sharpness", "sharpness/minibatch_top_1", "sharpness/top_1"} <= set(tags)


def test_the_default_monitors_stay_within_what_a_dashboard_can_show():
    tables = [HessianMonitor().table, NeuralCollapseMonitor().table, DisplacementMonitor().table, COST]
    shown = [quantity for table in tables for quantity in table.quantities if quantity.on_by_default]
    forms = [quantity.form for quantity in shown]
    assert forms.count("scalar") <= 25
    assert forms.count("density") == 1  # a histogram and a figure
    assert len(forms) - forms.count("scalar") <= 3
    assert not any(quantity.per_layer for quantity in shown)


def test_the_dashboard_has_at_most_the_scalars_that_were_promised(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trained(logger, monitors=[HessianMonitor(probe=WHOLE, every_n_train_steps=1)])
    columns = set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    ours = {key for key in columns if key.startswith(("hessian/", "dynamics/"))}
    assert ours == {
        "hessian/edge_ratio",
        "hessian/top_1",
        "hessian/top_2",
        "hessian/top_3",
        "hessian/bottom_1",
        "hessian/stability_threshold",
        "hessian/probe_loss",
        "hessian/gradient_norm",
        "dynamics/overhead",
        "dynamics/skipped",
    }


def test_csv_has_one_row_per_measured_step(tmp_path):
    monitor, small = trained(CSVLogger(tmp_path, name="", version=""))
    table = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    rows = [row for row in table if row["hessian/top_1"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    for row, record, other in zip(rows, monitor.history, small.history, strict=True):
        assert float(row["hessian/top_1"]) == pytest.approx(record.scalars["hessian/top_1"])
        assert float(row["hessian_small/top_1"]) == pytest.approx(other.scalars["hessian_small/top_1"])


def test_wandb_has_one_row_per_measured_step_on_its_own_axis(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("run", tmp_path, offline=True, project="test")
    monitor, _ = trained(logger)
    run_dir = logger.experiment.dir
    wandb.finish()
    records = wandb_records(run_dir)
    rows = []
    for record in records:
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "hessian/top_1" in row:
                rows.append(row)
    assert [row["trainer/global_step"] for row in rows] == [0, 2, 4, 5]
    assert all("hessian_small/top_1" in row and "dynamics/overhead" in row for row in rows)
    assert rows[0]["hessian/top_1"] == pytest.approx(monitor.history[0].scalars["hessian/top_1"])
    metrics = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert metrics["hessian/*"] == metrics["hessian_small/*"] == "trainer/global_step"
    assert [r.step for r in read_records(monitor.record_path)] == [0, 0, 2, 2, 4, 4, 5, 5]


def test_wandb_runs_have_records_of_their_own(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    places = []
    for _ in range(2):
        monitors = trained(WandbLogger("run", tmp_path, offline=True, project="test"))
        places.append(monitors[0].record_path)
        wandb.finish()
    assert places[0].parent != places[1].parent


def test_several_loggers_get_the_same_points(tmp_path):
    trained([TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b", "other")])
    tables = [next((tmp_path / place).rglob("metrics.csv")).read_text() for place in ("a", "b")]
    assert tables[0] == tables[1]


def test_without_a_logger_there_are_records(tmp_path):
    monitors = trained(False, default_root_dir=tmp_path)
    (file,) = tmp_path.rglob("dynamics.jsonl")
    assert monitors[0].record_path == file
    assert [r.step for r in read_records(file.parent)] == [0, 0, 2, 2, 4, 4, 5, 5]
    trained(False, default_root_dir=tmp_path)
    assert len(list(tmp_path.rglob("dynamics.jsonl"))) == 2


def test_the_header_says_what_the_run_was(tmp_path):
    class Secretive(Regression):
        def __init__(self, api_key="abc", width=3):
            super().__init__(lr=1e-3)
            self.save_hyperparameters()

    monitor = HessianMonitor(2, 1, every_n_train_steps=2, probe=WHOLE)
    fit(monitor, Secretive(), max_epochs=1, default_root_dir=tmp_path)
    text = monitor.record_path.read_text()
    header = json.loads(text.splitlines()[0])
    assert header["hyperparameters"] == {"width": 3}
    assert "abc" not in text
    assert header["module"] == "Secretive"
    assert header["monitors"]["HessianMonitor"]["probe"]["n"] == 24
    assert "SGD" in header["monitors"]["HessianMonitor"]["threshold_rule"]
    assert set(header["versions"]) == {"lightning_dynamics", "lightning", "torch", "python"}
    assert header["quantities"]["hessian/top_1"]["unit"] == "loss/θ²"
