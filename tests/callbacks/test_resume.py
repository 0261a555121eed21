"""A run that was killed and resumed yields the curves of one that was not."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Regression
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_dynamics import HessianMonitor, Probe, Spectrum, load_runs, read_records

WHOLE = Probe(whole=True)


def network():
    torch.manual_seed(4)
    return Regression(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=0.05)


def scalars(records):
    return [(r.step, r.monitor, r.scalars) for r in records]


def kept(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **{"every_n_train_steps": 1, **options})


def interrupted(folder, make_monitors, make_data, at, epochs, logger=CSVLogger, same_place=False):
    """One run of the whole length, and one that is killed at step ``at`` and resumed."""
    whole = make_monitors()
    fit(
        [*whole, kept(folder / "whole")],
        network(),
        make_data(),
        max_epochs=epochs,
        enable_checkpointing=True,
        logger=logger(folder / "whole", name="", version="x"),
    )
    first = make_monitors()
    fit(
        [*first, kept(folder / "ckpt")],
        network(),
        make_data(),
        max_epochs=epochs,
        enable_checkpointing=True,
        logger=logger(folder / "first", name="", version="x"),
    )
    second = make_monitors()
    fit(
        [*second, kept(folder / "ckpt2")],
        network(),
        make_data(),
        max_epochs=epochs,
        enable_checkpointing=True,
        logger=logger(folder / ("first" if same_place else "second"), name="", version="x"),
        ckpt_path=folder / "ckpt" / f"step={at}.ckpt",
    )
    return whole, second, folder / ("first" if same_place else "second") / "x"


@pytest.fixture(scope="module")
def _exact(tmp_path_factory):
    """Old releases of Lightning (2.4 does) repeat a step after such a resume, with monitors and without."""
    folder, networks = tmp_path_factory.mktemp("exact"), [network(), network()]
    options = {"enable_checkpointing": True, "max_epochs": 8}
    fit([kept(folder / "a")], networks[0], **options)
    fit([kept(folder / "b")], networks[1], ckpt_path=folder / "a" / "step=4.ckpt", **options)
    if not torch.equal(networks[0].net[0].weight, networks[1].net[0].weight):
        pytest.skip("this release of Lightning does not itself resume where it stopped")


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize(("at", "same_place"), [(4, False), (5, True), (5, False), (6, True)])  # around a pair
def test_the_curves_are_bit_for_bit_those_of_the_uninterrupted_run(tmp_path, at, same_place):
    def monitors():
        return [
            HessianMonitor(every_n_train_steps=5, probe=WHOLE, spectrum=Spectrum(5, num_vectors=2, num_steps=4)),
            HessianMonitor(every_n_train_steps=2, probe=Probe(size=10), pair=False, name="b"),
        ]

    whole, second, folder = interrupted(tmp_path, monitors, full_batch, at, 12, same_place=same_place)
    for one, other in zip(whole, second, strict=True):
        assert [r.step for r in one.history] == [r.step for r in other.history]
        for ours, theirs in zip(one.history, other.history, strict=True):
            for part in ("scalars", "errors", "arrays", "notes"):
                assert getattr(ours, part) == getattr(theirs, part)
    assert second[0].history[-1].notes["overlap"]["lag_first"] == 12
    joined = read_records(folder)
    assert sorted(map(str, scalars(joined))) == sorted(map(str, scalars(whole[0].history + whole[1].history)))


@pytest.mark.usefixtures("_exact")
def test_copied_batches_come_back_with_the_checkpoint(tmp_path):
    def monitors():
        return [HessianMonitor(every_n_train_steps=2, probe=Probe(first_batches=2), pair=False)]

    # one epoch of three batches is over at step 3: Lightning restarts the order of the data there
    whole, second, _ = interrupted(tmp_path, monitors, mini_batches, 3, 3)
    assert scalars(whole[0].history) == scalars(second[0].history)
    assert second[0].history[-1].notes["probe"]["n"] == 16


@pytest.mark.usefixtures("_exact")
def test_large_batches_go_to_files_beside_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dynamics.callbacks.probe_state._SMALL", 10)

    def monitors():
        return [HessianMonitor(every_n_train_steps=2, probe=Probe(first_batches=2), pair=False)]

    whole, second, _ = interrupted(tmp_path, monitors, mini_batches, 3, 3)
    assert scalars(whole[0].history) == scalars(second[0].history)
    (file,) = (tmp_path / "first" / "x").glob("dynamics-probe-*-rank0.pt")
    assert file.stat().st_size > 0


def test_a_probe_file_that_is_gone_or_changed_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_dynamics.callbacks.probe_state._SMALL", 10)
    monitor = HessianMonitor(every_n_train_steps=2, probe=Probe(first_batches=2), pair=False)
    fit(
        [monitor, kept(tmp_path)],
        network(),
        mini_batches(),
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path, name="", version="x"),
    )
    (file,) = (tmp_path / "x").glob("dynamics-probe-*")
    file.write_bytes(b"something else")
    again = HessianMonitor(every_n_train_steps=2, probe=Probe(first_batches=2), pair=False)
    with caplog.at_level("INFO"):
        fit(
            [again, kept(tmp_path / "more")],
            network(),
            mini_batches(),
            max_epochs=5,
            enable_checkpointing=True,
            ckpt_path=tmp_path / "step=6.ckpt",
        )
    assert any("not where the checkpoint left them" in r.message for r in caplog.records)
    assert again.history[-1].step == 15


def test_the_checkpoint_is_plain(tmp_path):
    """Lightning loads it with `weights_only=True`."""
    monitors = [
        HessianMonitor(every_n_train_steps=5, probe=WHOLE),
        HessianMonitor(every_n_train_steps=5, probe=Probe(first_batches=1), name="b"),
    ]
    fit([*monitors, kept(tmp_path)], network(), max_epochs=6, enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert {"HessianMonitor", "HessianMonitor[b]"} <= set(checkpoint["callbacks"])
    # saved at the end of step 5 the first half of a pair waits for its second
    middle = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["callbacks"]["HessianMonitor"]
    assert middle["pending"]["when"][0] == 5


@pytest.mark.usefixtures("_exact")
def test_a_large_memory_is_left_out_and_the_run_starts_cold(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dynamics.callbacks.monitor_state._SMALL", 10)

    def monitors():
        return [HessianMonitor(every_n_train_steps=2, probe=WHOLE, pair=False)]

    whole, second, _ = interrupted(tmp_path, monitors, full_batch, 6, 12)
    for one, other in zip(whole[0].history, second[0].history, strict=True):
        loose = 2e-2 * one.scalars["hessian/top_1"]
        for key, value in one.scalars.items():
            # vectors are known to the root of the tolerance of their values
            error = 0.05 * value if key.endswith("in_top_k") else 1e-6
            assert other.scalars[key] == pytest.approx(value, rel=2e-3, abs=loose if "bottom" in key else error)


def test_the_share_of_time_goes_on_after_a_resume(tmp_path):
    """Training before it counts as well as measuring before it."""

    class Slow(Regression):
        def on_train_batch_end(self, *_):
            time.sleep(0.05)

    def run(name, **options):
        monitor = HessianMonitor(1, 0, every_n_train_steps=2, probe=Probe(size=4), pair=False)
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=6, save_top_k=-1, filename="{step}")
        where = CSVLogger(tmp_path, name="", version=name)
        fit([monitor, keep], Slow(lr=1e-3), full_batch(), enable_checkpointing=True, logger=where, **options)
        (found,) = load_runs(tmp_path / name)
        return found

    first = run("a", max_epochs=8)
    second = run("b", max_epochs=10, ckpt_path=tmp_path / "a" / "step=6.ckpt")
    before = {cost.step: cost.overhead for cost in first.costs}
    after = {cost.step: cost.overhead for cost in second.costs}
    assert after[4] == before[4]
    assert abs(after[6] - before[6]) < 0.1 + 0.2 * before[6]
    assert second.overhead < 0.8


def test_the_last_value_is_monitored_again_after_a_resume(tmp_path):
    def monitors():
        return HessianMonitor(every_n_train_steps=100, probe=WHOLE, pair=False, monitor=True)

    fit([monitors(), kept(tmp_path)], network(), max_epochs=4, enable_checkpointing=True)

    class Sees(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.seen = dict(trainer.callback_metrics)

    sees = Sees()
    fit(
        [monitors(), sees, EarlyStopping("hessian/top_1"), kept(tmp_path / "more")],
        network(),
        max_epochs=5,
        enable_checkpointing=True,
        ckpt_path=tmp_path / "step=2.ckpt",
    )
    assert float(sees.seen["hessian/top_1"]) > 0


def test_a_new_run_in_the_same_place_leaves_the_old_file_alone(tmp_path):
    for run in range(2):
        monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
        fit(monitor, network(), max_epochs=1 + run, logger=TensorBoardLogger(tmp_path, name="", version="x"))
    files = sorted(path.name for path in (tmp_path / "x").glob("*.jsonl"))
    assert files == ["dynamics-1.jsonl", "dynamics.jsonl"]
    assert [r.step for r in read_records(tmp_path / "x")] == [0, 1, 2]
    assert [r.step for r in read_records(tmp_path / "x" / "dynamics.jsonl")] == [0, 1]


def test_loading_for_a_test_does_not_touch_the_next_fit(tmp_path):
    class Tests(Regression):
        def test_step(self, batch, batch_idx):
            return self.loss(batch)

    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    module = Tests(lr=1e-3)
    trainer = fit([monitor, kept(tmp_path)], module, max_epochs=2, enable_checkpointing=True)
    trainer.test(module, full_batch(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    assert [r.step for r in monitor.history] == [0, 1, 2]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, full_batch())
    assert [r.step for r in monitor.history] == [0, 1, 2, 3, 4]


def test_the_tuner_goes_around_a_monitor(tmp_path):
    from lightning.pytorch.tuner import Tuner

    class Tunable(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    module = Tunable(lr=1e-3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    Tuner(trainer).lr_find(module, full_batch(), num_training=5)
    assert monitor.history == []
    trainer.fit(module, full_batch())
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]


@pytest.mark.ddp
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_history_of_a_fit_in_other_processes_is_read_from_its_file(method):
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(monitor, network(), devices=2, strategy=DDPStrategy(start_method=method), use_distributed_sampler=False)
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]


def test_a_monitor_can_be_pickled_and_copied_in_mid_run():
    import copy
    import pickle

    class Copies(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.copies = [pickle.loads(pickle.dumps(trainer.callbacks[0])), copy.deepcopy(trainer.callbacks[0])]

    copies = Copies()
    fit([HessianMonitor(every_n_train_steps=1, probe=WHOLE), copies], network())
    assert all(isinstance(c, HessianMonitor) and c.history == [] for c in copies.copies)
