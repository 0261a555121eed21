"""What goes wrong after the first step costs a point, one warning and a count; never the run."""

from __future__ import annotations

import csv
import os
import signal
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit, full_batch
from helpers.modules import Regression
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from lightning_dynamics import HessianMonitor, Probe, read_records
from lightning_dynamics.callbacks.stand_ins import NullOptimizer

pytestmark = pytest.mark.chaos

WHOLE = Probe(whole=True)


def seeded():
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


def tracked(**options):
    return HessianMonitor(1, 0, **{"every_n_train_steps": 1, "probe": WHOLE, "pair": False, **options})


class InMeasurements(Regression):
    """Does something in the evaluations of a measurement from some step on, and only there."""

    def __init__(self, happens, at=2):
        super().__init__(seeded(), lr=1e-3)
        self.happens = happens
        self.at = at

    def training_step(self, batch, batch_idx):
        if isinstance(self.optimizers(), NullOptimizer) and self.trainer.global_step == self.at:
            self.happens()
        return super().training_step(batch, batch_idx)


def raises(error):
    def happens():
        raise error

    return happens


def trained(module, monitor, epochs=5, **options):
    """A fit with the weather, and the weights of one without monitors."""
    trainer = fit(monitor, module, max_epochs=epochs, **options)
    bare = Regression(seeded(), lr=1e-3)
    fit([], bare, max_epochs=epochs)
    assert trainer.state.finished
    assert trainer.global_step == epochs
    assert torch.equal(module.net.weight, bare.net.weight)
    return trainer


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("no idea"),
        ValueError("bad value"),
        KeyError("key"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
def test_an_error_in_the_step_costs_its_point(error, engine):
    monitor = tracked(engine=engine)
    with pytest.warns(UserWarning, match=r"HessianMonitor skips a point: .*Training goes on") as caught:
        trained(InMeasurements(raises(error)), monitor)
    assert [r.step for r in monitor.history] == [0, 1, 3, 4, 5]
    assert len([w for w in caught if "skips a point" in str(w.message)]) == 1


def test_a_warning_is_given_once_per_reason_and_every_point_is_counted(tmp_path):
    class Sometimes(InMeasurements):
        def training_step(self, batch, batch_idx):
            self.at = self.trainer.global_step if self.trainer.global_step in (1, 2, 3) else -1
            return super().training_step(batch, batch_idx)

    monitor = tracked()
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="skips a point") as caught:
        trained(Sometimes(raises(RuntimeError("no idea"))), monitor, logger=logger)
    assert len([w for w in caught if "skips a point" in str(w.message)]) == 1
    assert logger.experiment.metrics == []  # all of it is on disk
    last = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = last[0].split(",")
    assert last[-1].split(",")[columns.index("dynamics/skipped")] == "3.0"


def test_out_of_memory_in_a_product_costs_its_point(monkeypatch):
    from lightning_dynamics.objective import Linearization

    monitor, real = tracked(), Linearization.product

    def product(self, *arguments):
        if trainer_step[0] == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, *arguments)

    trainer_step = [0]

    class Counts(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer_step[0] = trainer.global_step

    monkeypatch.setattr(Linearization, "product", product)
    with pytest.warns(UserWarning, match="skips a point: out of memory"):
        fit([Counts(), monitor], Regression(seeded(), lr=1e-3), max_epochs=5)
    assert [r.step for r in monitor.history] == [0, 1, 3, 4, 5]


def test_a_solver_that_fails_costs_its_point(monkeypatch):
    from lightning_dynamics.callbacks import hessian

    monitor, real, calls = tracked(), hessian.eigenpairs, []

    def eigenpairs(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.linalg.LinAlgError("linalg.eigh: did not converge")
        return real(*arguments, **options)

    monkeypatch.setattr(hessian, "eigenpairs", eigenpairs)
    with pytest.warns(UserWarning, match="did not converge"):
        trained(Regression(seeded(), lr=1e-3), monitor)
    assert [r.step for r in monitor.history] == [0, 1, 3, 4, 5]


class TurnsNaN(pl.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.at:
            with torch.no_grad():
                pl_module.net.weight.fill_(float("nan"))


def test_weights_that_are_not_finite_cost_their_points():
    monitor = tracked()
    with pytest.warns(UserWarning, match="skips a point: the probe loss is nan"):
        trainer = fit([TurnsNaN(3), monitor], Regression(seeded(), lr=1e-3), max_epochs=6)
    assert trainer.global_step == 6
    assert [r.step for r in monitor.history] == [0, 1, 2]


def test_points_that_are_skipped_to_the_end_are_counted(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="skips a point"):
        fit([TurnsNaN(3), tracked()], Regression(seeded(), lr=1e-3), max_epochs=6, logger=logger)
    with (tmp_path / "metrics.csv").open() as stream:
        counts = [float(row["dynamics/skipped"]) for row in csv.DictReader(stream) if row["dynamics/skipped"]]
    assert counts[-1] == 4


def test_divergence_costs_its_points():
    monitor = tracked(pair=True)
    with pytest.warns(UserWarning, match="skips a point"):
        trainer = fit(monitor, Regression(lr=1e9), max_epochs=30)
    assert trainer.global_step == 30
    assert monitor.history[0].step == 0


class FailingLogger(Logger):
    name, version = "failing", 0

    def __init__(self, at):
        super().__init__()
        self.at = at

    @property
    def experiment(self):
        return None

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("hessian/") for key in metrics) and step >= self.at:
            raise ConnectionError("no network")


def test_a_logger_that_fails_costs_its_own_points(tmp_path):
    monitor, csv = tracked(), CSVLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="FailingLogger failed") as caught:
        trained(Regression(seeded(), lr=1e-3), monitor, logger=[FailingLogger(1), csv])
    assert len([w for w in caught if "FailingLogger" in str(w.message)]) == 1
    assert [r.step for r in monitor.history] == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "metrics.csv").read_text().count("\n") >= 6


def test_a_full_disk_costs_lines_of_the_record_file(tmp_path, monkeypatch):
    from lightning_dynamics.recording import record

    monitor, real = tracked(), record.RecordFile.append

    def append(self, entry):
        if entry.step in (2, 3):
            raise OSError(28, "No space left on device")
        real(self, entry)

    monkeypatch.setattr(record.RecordFile, "append", append)
    with pytest.warns(UserWarning, match="misses lines: .*No space left"):
        trained(Regression(seeded(), lr=1e-3), monitor, logger=CSVLogger(tmp_path, name="", version=""))
    assert [r.step for r in monitor.history] == [0, 1, 2, 3, 4, 5]
    assert [r.step for r in read_records(tmp_path)] == [0, 1, 4, 5]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_where_nothing_can_be_written(tmp_path):
    tmp_path.chmod(0o500)
    monitor = tracked()
    with pytest.warns(UserWarning, match="misses lines"):
        trained(Regression(seeded(), lr=1e-3), monitor, default_root_dir=tmp_path)
    assert len(monitor.history) == 6


class SavesInHandler(pl.Callback):
    """As Lightning's SLURM handler does."""

    def __init__(self, number, path):
        self.number = number
        self.path = path
        self.saved = False

    def on_fit_start(self, trainer, pl_module):
        def handler(*_):
            trainer.save_checkpoint(self.path)
            self.saved = True

        self.before = signal.signal(self.number, handler)

    def teardown(self, *_, **__):
        if hasattr(self, "before"):
            signal.signal(self.number, self.before)
            del self.before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_handler_that_saves_during_a_measurement_saves_the_real_run(tmp_path, name):
    """The handler waits until the originals are back; the measurement makes way."""
    number = getattr(signal, name)
    saves = SavesInHandler(number, tmp_path / "during.ckpt")
    monitor = tracked(engine="rebuilt")
    module = InMeasurements(lambda: os.kill(os.getpid(), number))
    # at SIGTERM Lightning itself ends the fit after the batch
    ends = pytest.raises(SIGTERMException) if name == "SIGTERM" else nullcontext()
    with ends, pytest.warns(UserWarning, match="a signal arrived during the measurement"):
        fit([saves, monitor], module, max_epochs=5)
    assert saves.saved
    saved = torch.load(tmp_path / "during.ckpt", weights_only=True)

    plain = Regression(seeded(), lr=1e-3)
    trainer = fit([], plain, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    expected = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.weight"], expected["state_dict"]["net.weight"])
    assert saved["global_step"] == 2
    assert str(saved["optimizer_states"]) == str(expected["optimizer_states"])
    assert [r.step for r in monitor.history] == ([0, 1] if name == "SIGTERM" else [0, 1, 3, 4, 5])


@pytest.fixture
def _interruptible():
    """Shells start what they put into the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_during_a_measurement_ends_the_fit_with_the_real_weights():
    """Ctrl+C arrives as the default handler's KeyboardInterrupt, after the originals are back."""
    seen = []

    class Looks(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append((type(exception), pl_module.net.weight.detach().clone(), pl_module.net.weight is weight))

    module = InMeasurements(lambda: os.kill(os.getpid(), signal.SIGINT))
    weight = module.net.weight
    monitor = tracked(engine="rebuilt")
    with pytest.raises((SystemExit, KeyboardInterrupt)), pytest.warns(UserWarning, match="skips a point"):
        fit([monitor, Looks()], module, max_epochs=5)
    bare = Regression(seeded(), lr=1e-3)
    fit([], bare, max_epochs=2)
    ((kind, weights, is_same),) = seen
    assert kind is KeyboardInterrupt
    assert is_same
    assert torch.equal(weights, bare.net.weight)


def test_an_exception_of_the_users_own_passes_unchanged():
    class Fails(Regression):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 3:
                raise LookupError("mine")

    monitor = tracked(pair=True)
    with pytest.raises(LookupError, match="mine"):
        fit(monitor, Fails(lr=1e-3), full_batch(), max_epochs=5)
    assert [r.step for r in monitor.history] == [0, 1]
