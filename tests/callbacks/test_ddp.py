"""Two processes: the run is the run without monitors, the numbers are those of one process, and nobody hangs."""

from __future__ import annotations

import csv
import random
from datetime import timedelta

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.digest import OURS, user_rows
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Classification, NoisySamples, NoisyStream, Regression, class_data, loader
from helpers.state import equal
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import (
    DisplacementMonitor,
    GradientNoiseMonitor,
    HessianMonitor,
    NeuralCollapseMonitor,
    Probe,
    Reference,
    StochasticSharpnessMonitor,
)
from lightning_dynamics.callbacks import hessian
from lightning_dynamics.callbacks.measurements import Measurements
from lightning_dynamics.objective import Linearization
from lightning_dynamics.recording.record import RecordFile

pytestmark = pytest.mark.ddp

WHOLE = Probe(whole=True)


def two(timeout=60):
    return {"devices": 2, "strategy": DDPStrategy(start_method="fork", timeout=timedelta(seconds=timeout))}


class Communicates(pl.LightningModule):
    """Synchronizes its logs and gathers in its step, as users do."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.count = 0

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        self.count += 1
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("mean", self.all_gather(loss.detach()).mean())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def logits(module, batch):
    module.count += 1
    return module.net(batch[0])


class Digest(pl.Callback):
    """Everything on every rank, brought home by rank zero."""

    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, pl_module):
        mine = {
            "weights": {k: v.clone() for k, v in pl_module.state_dict().items()},
            "optimizer": str(trainer.optimizers[0].state_dict()),
            "gradients": [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()],
            "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
            "count": pl_module.count,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(OURS)},
        }
        everyone = [None] * trainer.world_size
        dist.all_gather_object(everyone, mine)
        if trainer.is_global_zero:
            torch.save(everyone, self.file)


def trained(folder, monitors, data=None, **options):
    folder.mkdir()
    pl.seed_everything(1)
    manual = options.pop("manual", False)
    fit(
        [*monitors, Digest(folder / "digest.pt")],
        Communicates(manual),
        loader(NoisySamples(), batch_size=6, shuffle=True) if data is None else loader(data(), batch_size=6),
        max_epochs=2,
        logger=CSVLogger(folder, name="", version=""),
        **two(),
        **options,
    )
    return torch.load(folder / "digest.pt", weights_only=False), user_rows(folder / "metrics.csv")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, id="accumulation and clipping"),
        pytest.param({"manual": True}, id="manual optimization", marks=pytest.mark.slow),
        pytest.param({"data": NoisyStream}, id="iterable data", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_two_ranks_is_the_run_without_monitors(tmp_path, options):
    def monitors():
        return [
            HessianMonitor(every_n_train_steps=1, probe=Probe(size=24)),
            HessianMonitor(every_n_train_steps=2, probe=Probe(first_batches=2), name="first", monitor=True),
            HessianMonitor(every_n_train_steps=3, probe=Probe(current_batch=True), name="current", pair=False),
            NeuralCollapseMonitor(every_n_train_steps=1, probe=Probe(size=24), forward_fn=logits),
            NeuralCollapseMonitor(
                every_n_train_steps=2, probe=Probe(first_batches=2), name="first", mode="train", forward_fn=logits
            ),
            StochasticSharpnessMonitor(
                every_n_train_steps=1, eigenvalues_every_n_train_steps=2, solved=2, probe=Probe(draws=4)
            ),
            GradientNoiseMonitor(
                every_n_train_steps=1, detail_every_n_train_steps=2, directions=1, probe=Probe(draws=4)
            ),
        ]

    without = trained(tmp_path / "without", [], **options)
    measured = monitors()
    with_monitors = trained(tmp_path / "with", measured, **options)
    for mine, theirs in zip(without[0], with_monitors[0], strict=True):
        assert [key for key in mine if not equal(mine[key], theirs[key])] == []
    assert without[1] == with_monitors[1]
    assert all(len(monitor.history) >= 2 for monitor in measured)


def test_values_do_not_depend_on_the_number_of_ranks():
    histories = []
    for options in ({}, two()):
        monitor = HessianMonitor(2, 1, every_n_train_steps=1, probe=WHOLE, pair=False, engine="kept")
        other = HessianMonitor(2, 1, every_n_train_steps=1, probe=Probe(size=9), pair=False, name="b", engine="rebuilt")
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        # three batches: one rank has two of them, the other one and a repetition that does not count
        data = mini_batches(n=20, batch_size=8)
        fit([monitor, other], Regression(net, lr=0.0), data, max_epochs=1, **options)
        histories.append((monitor.history[0], other.history[0]))
    for one, both in zip(*histories, strict=True):
        for key, value in one.scalars.items():
            if "bottom" not in key:
                assert both.scalars[key] == pytest.approx(value, rel=1e-4), key
        assert one.notes["probe"]["n"] == both.notes["probe"]["n"]


def collapse(data, **options):
    """The first record of a network that is not trained."""
    monitor = NeuralCollapseMonitor(every_n_train_steps=1, probe=WHOLE, subclass_fn=lambda batch: batch[1] + 3)
    fit(monitor, Classification(lr=0.0), data, max_epochs=1, **options)
    return monitor.history[0]


@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_collapse_does_not_depend_on_the_number_of_ranks(order):
    """Five batches: one rank has a repetition that does not count; of sorted samples no rank sees all classes."""
    x, y = class_data(50)
    if order == "sorted":
        # of three classes one rank, with the even batches, never sees the last, and the other one never the first
        places = torch.arange(50)
        y = places % 2 + places // 10 % 2
    data = DataLoader(TensorDataset(x, y), 10)
    one, both = collapse(data), collapse(data, **two())
    assert set(one.scalars) == set(both.scalars)
    for key, value in one.scalars.items():
        assert both.scalars[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key
    assert one.notes["probe"]["n"] == both.notes["probe"]["n"] == 50


class ForwardFailsOnOneRank(Classification):
    def forward(self, x):
        if not self.training and self.trainer.global_rank == 1 and self.trainer.global_step >= 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:Rank 1 failed in its part", "ignore:NeuralCollapseMonitor skips a point")
def test_a_rank_whose_forward_pass_fails_costs_points_of_collapse():
    monitor = NeuralCollapseMonitor(every_n_train_steps=1, probe=WHOLE)
    data = DataLoader(TensorDataset(*class_data(48)), 6)
    trainer = fit(monitor, ForwardFailsOnOneRank(), data, max_epochs=1, **two(timeout=30))
    assert [record.step for record in monitor.history] == [0, 1]
    assert trainer.state.finished


class FailsOnOneRank(Regression):
    """Its step fails on rank one, in measurements only, from the third step on."""

    def training_step(self, batch, batch_idx):
        from lightning_dynamics.callbacks.stand_ins import NullOptimizer

        measuring = isinstance(self.optimizers(), NullOptimizer)
        if measuring and self.trainer.global_rank == 1 and self.trainer.global_step >= 2:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:Rank 1 failed in its part", "ignore:HessianMonitor skips a point")
def test_a_rank_that_fails_costs_points_and_nothing_else():
    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False)
    module = FailsOnOneRank(lr=1e-3)
    trainer = fit(monitor, module, mini_batches(n=24, batch_size=4), max_epochs=2, **two(timeout=30))
    assert [r.step for r in monitor.history] == [0, 1]
    assert trainer.state.finished


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:Rank 1 failed in its part", "ignore:HessianMonitor.*skips a point")
def test_a_rank_that_cannot_even_begin_costs_that_point(monkeypatch):
    current, save = Measurements._current, Measurements.rule

    def fails_to_copy(self, batch):
        if self._ranks.rank == 1 and self._trainer.global_step == 1:
            raise TypeError("cannot copy")
        return current(self, batch)

    def fails_to_save(self, monitor):
        if self._ranks.rank == 1 and self._trainer.global_step == 2 and monitor.name == "late":
            raise MemoryError
        return save(self, monitor)

    monkeypatch.setattr(Measurements, "_current", fails_to_copy)
    monkeypatch.setattr(Measurements, "rule", fails_to_save)
    options = {"every_n_train_steps": 1, "pair": False}
    monitor = HessianMonitor(1, 0, probe=Probe(current_batch=True), **options)
    late = HessianMonitor(1, 0, probe=Probe(first_batches=5), name="late", **options)
    fit([monitor, late], Regression(lr=1e-3), mini_batches(n=48, batch_size=4), max_epochs=1, **two(timeout=30))
    assert [r.step for r in monitor.history] == [0, 2, 3, 4, 5]
    assert [r.step for r in late.history] == [0, 1, 3, 4, 5, 6]


@pytest.mark.chaos
def test_misuse_is_an_error_on_all_ranks():
    from torch.multiprocessing import ProcessRaisedException

    with pytest.raises(ProcessRaisedException, match="ask for more eigenvalues than there are measured"):
        fit(HessianMonitor(top_k=5, probe=WHOLE), Regression(), full_batch(), **two(timeout=30))


def test_every_rank_can_monitor_the_values():
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = bool(trainer.callback_metrics["hessian/top_1"] > 0)

    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False, monitor=True)
    fit([monitor, Stops()], Regression(lr=1e-3), max_epochs=50, **two(timeout=30))
    assert monitor.history[-1].step == 1


class Offline(Logger):
    """A logger that lost its network, on whichever rank writes."""

    name, version, experiment = "offline", 0, None

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("hessian/") for key in metrics) and step >= 5:
            raise ConnectionError("no network")


class Diverges(pl.Callback):
    """Notes what becomes of each rank's weights and steps; after step ten they are no numbers any more."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 10:
            self.weights = pl_module.net.weight.detach().clone()
            with torch.no_grad():
                pl_module.net.weight.fill_(float("nan"))

    def on_train_end(self, trainer, pl_module):
        torch.save((trainer.global_step, self.weights), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:Rank 1 failed in its part", "ignore:HessianMonitor skips a point")
@pytest.mark.filterwarnings("ignore:Offline failed", "ignore:The record file of lightning_dynamics misses lines")
def test_all_weather_at_once_costs_points_and_no_rank_hangs(tmp_path, monkeypatch):
    """Memory runs out in rank one's double backward, a solver fails, so do a logger and the disk of rank zero, and
    from step ten on the weights of both are no numbers."""
    product, append, solve = Linearization.product, RecordFile.append, hessian.eigenpairs
    now = [0, 0]  # step and rank: the patches below know neither

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            now[:] = [trainer.global_step, trainer.global_rank]

    def runs_out_of_memory(self, *arguments):
        if now == [3, 1]:
            raise torch.OutOfMemoryError("out of memory")
        return product(self, *arguments)

    def fails_to_converge(*arguments, **options):
        if now[0] == 7:
            raise torch.linalg.LinAlgError("linalg.eigh: did not converge")
        return solve(*arguments, **options)

    def fills_the_disk(self, entry):
        if entry.step in (2, 6):
            raise OSError(28, "No space left on device")
        append(self, entry)

    monkeypatch.setattr(Linearization, "product", runs_out_of_memory)
    monkeypatch.setattr(hessian, "eigenpairs", fails_to_converge)
    monkeypatch.setattr(RecordFile, "append", fills_the_disk)
    results = {}
    for run, engine in (("bare", None), ("kept", "kept"), ("rebuilt", "rebuilt")):
        folder = tmp_path / run
        folder.mkdir()
        monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False, engine=engine or "auto")
        torch.manual_seed(0)
        trainer = fit(
            [Clock(), *([monitor] if engine else []), Diverges(folder)],
            Regression(lr=1e-3),
            mini_batches(n=24, batch_size=4),
            max_epochs=4,
            logger=[Offline(), CSVLogger(folder, name="", version="")],
            **two(timeout=30),
        )
        assert trainer.state.finished
        results[run] = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
        if not engine:
            continue
        for (steps, weights), (_, bare) in zip(results[run], results["bare"], strict=True):
            assert steps == 12
            assert torch.equal(weights, bare)
        # the disk was full at steps 2 and 6; what could not be measured is in no record
        assert [r.step for r in monitor.history] == [0, 1, 4, 5, 8, 9]
        with (folder / "metrics.csv").open() as stream:
            rows = {int(row["step"]): row for row in csv.DictReader(stream) if row["hessian/top_1"]}
        assert list(rows) == [0, 1, 2, 4, 5, 6, 8, 9]
        # two skipped points, two lines of the file, and what the other logger missed at steps 5, 6 and 8
        assert float(rows[9]["dynamics/skipped"]) == 2 + 2 + 3


def test_batch_norm_that_synchronizes_is_refused():
    class Synchronizes(nn.BatchNorm1d):
        """What ``nn.SyncBatchNorm`` does on several GPUs, where alone it runs."""

        def forward(self, x):
            state = (self.weight, self.bias, self.running_mean, self.running_var)
            return nn.modules.batchnorm.sync_batch_norm.apply(x, *state, self.eps, 0.1, dist.group.WORLD, 2)

    module = Regression(nn.Sequential(nn.Linear(4, 4), Synchronizes(4), nn.Linear(4, 1)))
    with pytest.raises(Exception, match=r"SyncBatchNorm, which couples the losses of all processes"):
        fit(HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE), module, mini_batches(), **two())


class SaysWhatItRead(pl.Callback):
    """What every rank has read of the weights."""

    def __init__(self, monitor, file):
        self.monitor = monitor
        self.file = file

    def on_train_end(self, trainer, pl_module):
        mine = self.monitor.follower.state_dict()["displacement"]["sums"].tolist()
        everyone = [None] * trainer.world_size
        dist.all_gather_object(everyone, mine)
        if trainer.is_global_zero:
            torch.save(everyone, self.file)


def test_displacements_of_two_processes_are_those_of_one(tmp_path):
    def run(name, **options):
        monitor = DisplacementMonitor(
            every_n_train_steps=1, reference=Reference(step=2), probe=Probe(whole=True), probe_every_n_train_steps=2
        )
        module = Regression(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))
        module.load_state_dict(weights)
        says = [SaysWhatItRead(monitor, tmp_path / "read.pt")] if options else []
        data = DataLoader(full_batch(24).dataset, batch_size=12 if options else 24)
        fit([*says, monitor], module, data, default_root_dir=tmp_path / name, max_epochs=5, **options)
        return monitor.history

    weights = Regression(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))).state_dict()
    one, other = run("one"), run("two", **two())
    assert len(one) == len(other) == 6
    for expected, found in zip(one, other, strict=True):
        assert found.scalars.keys() == expected.scalars.keys()
        for key, value in expected.scalars.items():
            assert found.scalars[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    first, second = torch.load(tmp_path / "read.pt", weights_only=True)
    assert first == second


@pytest.mark.parametrize("accumulate", [1, 2])
def test_drawn_mini_batches_do_not_depend_on_the_number_of_ranks(accumulate):
    """A mini-batch is that of all ranks together, accumulated."""

    def run(batch_size, **options):
        detail = {"every_n_train_steps": 1, "probe": Probe(draws=8)}
        sharpness = StochasticSharpnessMonitor(eigenvalues_every_n_train_steps=2, solved=4, **detail)
        noise = GradientNoiseMonitor(detail_every_n_train_steps=2, directions=2, **detail)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        module = Regression(net, optimizer=lambda p: torch.optim.SGD(p, 1e-7, momentum=0.5))
        data = DataLoader(full_batch(24).dataset, batch_size=batch_size)
        fit([sharpness, noise], module, data, max_epochs=1, accumulate_grad_batches=accumulate, **options)
        return sharpness.history, noise.history

    one, both = run(6), run(3, **two())
    of_the_step = ("step", "update", "change")  # which samples it was made of depends on the ranks
    for alone, together in zip(one, both, strict=True):
        assert [r.step for r in alone] == [r.step for r in together] == list(range(4 // accumulate + 1))
        for expected, found in zip(alone, together, strict=True):
            assert found.notes["probe"]["batch_size"] == expected.notes["probe"]["batch_size"] == 6 * accumulate
            assert found.scalars.keys() == expected.scalars.keys()
            for key, value in expected.scalars.items():
                if not any(word in key for word in (*of_the_step, "bottom", "share")):
                    assert found.scalars[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key


@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_step_of_two_ranks_is_that_of_one(batch_size):
    """The whole set in each step; drawn mini-batches of five are less than one rank's batch, and one rank has none."""

    def run(size, **options):
        probe = Probe(draws=4, batch_size=batch_size)
        monitor = StochasticSharpnessMonitor(
            every_n_train_steps=1, eigenvalues_every_n_train_steps=2, solved=4, probe=probe
        )
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        data = DataLoader(full_batch(24).dataset, batch_size=size)
        fit(monitor, Regression(net, lr=0.02), data, max_epochs=3, **options)
        return monitor.history

    one, both = run(24), run(12, **two())
    assert len(one) == len(both) == 4
    for expected, found in zip(one, both, strict=True):
        assert "sharpness/step_edge" in found.scalars or expected.final
        assert found.scalars.keys() == expected.scalars.keys()
        for key, value in expected.scalars.items():
            assert found.scalars[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:Rank 1 failed in its part", "ignore:StochasticSharpnessMonitor skips a point")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_mini_batch_fails_costs_points(monkeypatch, rank):
    pieces_of = Linearization.pieces_of

    def failing(self, number):
        module = self._objective.module
        if number == 3 and module.trainer.global_rank == rank and module.trainer.global_step == 2:
            raise MemoryError("a mini-batch too many")
        return pieces_of(self, number)

    monkeypatch.setattr(Linearization, "pieces_of", failing)
    detail = {"every_n_train_steps": 1, "probe": Probe(draws=4)}
    sharpness = StochasticSharpnessMonitor(eigenvalues=False, step=False, **detail)
    fit(sharpness, Regression(lr=1e-3), mini_batches(24, 3), max_epochs=1, **two())
    assert [record.step for record in sharpness.history] == [0, 1, 3, 4]
