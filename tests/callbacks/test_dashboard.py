"""One layout for all monitors, the user's charts in it, and nothing lost that others laid out."""

from __future__ import annotations

import logging

import pytest
from helpers.fit import fit, full_batch
from helpers.modules import Regression
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dynamics import Dashboard, HessianMonitor, Probe, Spectrum
from lightning_dynamics.recording.tensorboard import found_layout

pytestmark = pytest.mark.clients

MINE = {"Mine": {"Loss": ["Multiline", ["^train/loss$"]]}, "Hessian": {"Both": ["Multiline", ["^mine$"]]}}
THEIRS = {"Theirs": {"Band": ["Margin", ["value", "lower", "upper"]], "Loss": ["Multiline", ["^loss$"]]}}


@pytest.fixture
def said(caplog):
    """What has been said of the layout so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "Custom Scalars" in record.getMessage()]


class Arranged(Regression):
    """Lays out charts of its own."""

    def on_train_start(self):
        self.logger.experiment.add_custom_scalars(THEIRS)


def trained(folder, *callbacks, module=None, monitors=None, **options):
    monitors = monitors or [HessianMonitor(1, 0, every_n_train_steps=2, pair=False, probe=Probe(whole=True))]
    module = Regression(lr=1e-3) if module is None else module
    logger = TensorBoardLogger(folder, name="", version="run")
    return fit([*monitors, *callbacks], module, full_batch(), logger=logger, **{"max_epochs": 3, **options})


def test_charts_of_ones_own_stand_first_and_share_categories(tmp_path, said):
    trained(tmp_path, Dashboard(extra_layout=MINE))
    layout = found_layout(tmp_path / "run")
    assert list(layout) == ["Mine", "Hessian", "Cost of the monitors"]
    assert layout["Mine"] == MINE["Mine"]
    assert layout["Hessian"]["Both"] == ["Multiline", ["^mine$"]]
    assert layout["Hessian"]["Edge ratio"] == ["Multiline", ["^hessian/edge_ratio$"]]
    assert not said()


def test_a_layout_of_the_module_is_taken_over_and_said(tmp_path, said):
    trained(tmp_path, module=Arranged(lr=1e-3))
    layout = found_layout(tmp_path / "run")
    assert list(layout) == ["Theirs", "Hessian", "Cost of the monitors"]
    assert layout["Theirs"] == THEIRS["Theirs"]
    (line,) = said()
    assert "(Theirs)" in line
    assert "Dashboard(extra_layout=...)" in line


def test_a_run_that_goes_on_keeps_what_an_earlier_process_laid_out(tmp_path, said):
    first = trained(tmp_path, Dashboard(extra_layout=MINE))
    first.save_checkpoint(tmp_path / "c.ckpt")
    trained(tmp_path, ckpt_path=tmp_path / "c.ckpt", max_epochs=6)
    layout = found_layout(tmp_path / "run")
    assert list(layout) == ["Mine", "Hessian", "Cost of the monitors"]
    assert layout["Hessian"]["Both"] == ["Multiline", ["^mine$"]]
    assert len(said()) == 1


def test_a_run_that_goes_on_and_finds_its_own_layout_says_nothing(tmp_path, said):
    first = trained(tmp_path, Dashboard(extra_layout=MINE))
    first.save_checkpoint(tmp_path / "c.ckpt")
    before = found_layout(tmp_path / "run")
    trained(tmp_path, Dashboard(extra_layout=MINE), ckpt_path=tmp_path / "c.ckpt", max_epochs=6)
    assert found_layout(tmp_path / "run") == before
    assert not said()


def test_no_layout_leaves_that_of_others_alone(tmp_path, said):
    trained(tmp_path, Dashboard(layout=False), module=Arranged(lr=1e-3))
    assert found_layout(tmp_path / "run") == THEIRS
    assert not said()


@pytest.mark.parametrize("figures", [True, False])
def test_figures_are_drawn_unless_told_otherwise(tmp_path, figures):
    monitor = HessianMonitor(1, 0, every_n_train_steps=2, probe=Probe(whole=True), spectrum=Spectrum(2))
    trained(tmp_path, Dashboard(figures=figures), monitors=[monitor])
    events = EventAccumulator(str(tmp_path / "run"), {"histograms": 0, "images": 0}).Reload()
    assert events.Tags()["images"] == (["hessian/density_figure"] if figures else [])
    assert [event.step for event in events.Histograms("hessian/density")] == [0, 2, 3]


def test_two_dashboards_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"one Dashboard.*there are 2"):
        trained(tmp_path, Dashboard(), Dashboard())


def test_impossible_options_are_refused_when_the_dashboard_is_made():
    with pytest.raises(MisconfigurationException, match=r"`extra_layout\['Mine'\]` must be a dictionary of charts"):
        Dashboard(extra_layout={"Mine": ["^loss$"]})
    with pytest.raises(MisconfigurationException, match="`layout=False` lays out no charts"):
        Dashboard(extra_layout=MINE, layout=False)
