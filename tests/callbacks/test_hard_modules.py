"""Modules and data that are written as people write them: measured rightly, refused with a cure, and never altered."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import threading
import weakref

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Regression, loader, regression_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_dynamics import HessianMonitor, Probe, read_records

WHOLE = Probe(whole=True)


def tracked(**options):
    return HessianMonitor(1, 0, **{"every_n_train_steps": 1, "probe": WHOLE, "pair": False, **options})


def seeded(*sizes):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def first_loss(monitor):
    return monitor.history[0].scalars["hessian/probe_loss"]


# Numbers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_both_kinds_is_exact(reentrant):
    class Checkpointed(Regression):
        def loss(self, batch):
            hidden = checkpoint(self.net[:2], batch[0].clone().requires_grad_(), use_reentrant=reentrant)
            return (self.net[2](hidden) - batch[1]).square().mean() / 2

    monitor, plain = tracked(), tracked()
    fit(monitor, Checkpointed(seeded(4, 5, 1), lr=1e-3), max_epochs=1)
    fit(plain, Regression(seeded(4, 5, 1), lr=1e-3), max_epochs=1)
    assert monitor.history[0].scalars == plain.history[0].scalars


def test_a_step_that_normalizes_its_weights_first_has_no_loss_as_a_function_of_them():
    class Prototypes(Regression):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net.weight.copy_(F.normalize(self.net.weight))
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match=r"writes to its own weights \(net\.weight\).*outside"):
        fit(tracked(), Prototypes(lr=1e-3))


@pytest.mark.parametrize("batches", [1, 3])
def test_what_a_manual_step_writes_after_its_backward_changes_nothing(batches):
    class Clamps(Regression):
        def __init__(self):
            super().__init__(seeded(4, 1), lr=1e-3)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
            self.optimizers().zero_grad()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(-0.1, 0.1)

    monitor, plain = tracked(), tracked()
    data = mini_batches(24, 24 // batches)
    fit(monitor, Clamps(), data, max_epochs=1)
    fit(plain, Regression(seeded(4, 1), lr=1e-3), data, max_epochs=1)
    assert monitor.history[0].scalars == plain.history[0].scalars
    assert len(monitor.history) == batches + 1


def test_a_second_fit_on_other_data_is_measured_on_that_data():
    monitor = tracked()
    trainer = fit(monitor, Regression(nn.Linear(4, 1), lr=0.0), max_epochs=1)
    before = first_loss(monitor)
    x, y = regression_data(24, seed=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(TensorDataset(x, 3 * y), batch_size=24))
    expected = trainer.lightning_module.loss((x, 3 * y)).item()
    assert monitor.history[-1].scalars["hessian/probe_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - before) > 0.1


def test_the_current_batch_has_its_own_number():
    class Numbered(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (1 + batch_idx)

    monitor = tracked(probe=Probe(current_batch=True))
    module = Numbered(seeded(4, 1), lr=0.0)
    fit(monitor, module, mini_batches(), max_epochs=1)
    losses = [module.loss(batch).item() * (1 + i) for i, batch in enumerate(mini_batches())]
    assert [r.scalars["hessian/probe_loss"] for r in monitor.history] == pytest.approx(losses, rel=1e-5)


def test_large_tensors_written_past_autograd_are_copied_again():
    class Bank(Regression):
        def __init__(self):
            super().__init__(seeded(4, 1), lr=1e-3)
            self.bank = torch.ones(1 << 19)

        def training_step(self, batch, batch_idx):
            self.bank.data.mul_(2)
            return self.loss(batch) * self.bank[0]

    monitor, module = tracked(), Bank()
    fit(monitor, module, mini_batches(), max_epochs=1)
    assert float(module.bank[0]) == 8
    plain = tracked()
    fit(plain, Regression(seeded(4, 1), lr=1e-3), mini_batches(), max_epochs=1)
    assert first_loss(monitor) == pytest.approx(2 * first_loss(plain), rel=1e-5)


def test_the_last_point_is_in_the_last_epoch():
    class ByEpoch(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (1.0, 2.0)[self.current_epoch]

    monitor = tracked()
    module = ByEpoch(seeded(4, 1), lr=0.0)
    fit(monitor, module, max_epochs=2)
    losses = [r.scalars["hessian/probe_loss"] for r in monitor.history]
    assert losses == pytest.approx([losses[0], 2 * losses[0], 2 * losses[0]])
    assert [r.epoch for r in monitor.history] == [0, 1, 1]


def test_loaders_that_drop_an_incomplete_batch_have_no_incomplete_probe_batch():
    class Exact(Regression):
        def training_step(self, batch, batch_idx):
            assert len(batch[0]) == 8
            return self.loss(batch)

    for probe, n in ((WHOLE, 24), (Probe(size=20), 24)):
        monitor = tracked(probe=probe)
        fit(monitor, Exact(lr=1e-3), mini_batches(25, 8, drop_last=True, shuffle=True), max_epochs=1)
        assert monitor.history[0].notes["probe"]["n"] == n


def test_a_short_last_batch_that_fails_is_noticed_before_the_first_step():
    class Picky(Regression):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) == 1:
                raise ValueError("batches of one have no variance")
            return self.loss(batch)

        def on_train_batch_end(self, *_):
            raise AssertionError("trained a step")

    with pytest.raises(MisconfigurationException, match="batches of one"):
        fit(tracked(), Picky(lr=1e-3), mini_batches(25, 8))


# Resume, and what comes after the first step


def test_a_network_that_has_learned_everything_can_go_on():
    """The Hessian is then a small difference of large terms, and rounding looks like asymmetry."""

    class Certain(Regression):
        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), (batch[1][:, 0] > 0).long())

    net = seeded(4, 16, 2)
    with torch.no_grad():
        net[2].weight.mul_(400)
    torch.manual_seed(0)
    fit([], Certain(net, optimizer=lambda p: torch.optim.Adam(p, 0.05)), max_epochs=300)
    monitor = tracked()
    module = Certain(net, lr=1e-3)
    fit(monitor, module, max_epochs=1)
    assert first_loss(monitor) < 1e-4
    assert len(monitor.history) == 2


def test_parameters_that_are_frozen_later_cost_their_points():
    class Freezes(Regression):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.net[0].requires_grad_(False)

    monitor = tracked(parameters=r"net\.0\..*")
    with pytest.warns(UserWarning, match="matches no trainable parameter"):
        trainer = fit(monitor, Freezes(seeded(4, 5, 1), lr=1e-3), max_epochs=5)
    assert trainer.global_step == 5
    assert [r.step for r in monitor.history] == [0, 1]


class Locked:
    """A batch that can be neither pickled nor copied."""

    def __init__(self, x, copies):
        self.x = x
        self.lock = threading.Lock()
        self.copies = copies

    def __deepcopy__(self, memo):
        if not self.copies:
            raise TypeError("cannot copy a lock")
        return Locked(self.x.clone(), True)


class LockedStream(IterableDataset):
    def __init__(self, copies):
        self.copies = copies

    def __iter__(self):
        x, _ = regression_data()
        return (Locked(part, self.copies) for part in x.split(8))


class Unsupervised(Regression):
    def loss(self, batch):
        return self.net(batch.x).square().mean()


def test_batches_that_cannot_be_copied_are_refused():
    data = DataLoader(LockedStream(False), batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"cannot copy a batch of type Locked.*`dataloader=`"):
        fit(tracked(probe=Probe(first_batches=2)), Unsupervised(lr=1e-3), data)


def test_batches_that_cannot_be_kept_cost_only_the_resume(tmp_path):
    data = DataLoader(LockedStream(True), batch_size=None)
    monitor = tracked(probe=Probe(first_batches=2))
    with pytest.warns(UserWarning, match="cannot be kept for a resume"):
        fit(monitor, Unsupervised(lr=1e-3), data, max_epochs=1, default_root_dir=tmp_path)
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]


def test_headers_are_written_whatever_the_hyperparameters(tmp_path):
    class Odd(Regression):
        def __init__(self, name="a\u2028b\ud800", limit=float("inf"), **_):
            super().__init__(lr=1e-3)
            self.save_hyperparameters()

    monitor = tracked()
    fit(monitor, Odd(), gradient_clip_val=float("inf"), default_root_dir=tmp_path)
    assert [r.step for r in read_records(monitor.record_path)] == [0, 1, 2, 3]


def test_no_more_copies_of_the_weights_wait_than_a_few(monkeypatch):
    monkeypatch.setattr("lightning_dynamics.callbacks.measurements._MOST_SAVED", 2)
    monitor = tracked(probe=Probe(first_batches=6))
    with pytest.warns(UserWarning, match="more than 2 points were due before the probe was complete"):
        fit(monitor, Regression(lr=1e-3), mini_batches(24, 4), max_epochs=1)
    assert [r.step for r in monitor.history] == [0, 1, 5, 6]


# Legitimate modules


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, *arguments, **options):
        return Batch(self.x.to(*arguments, **options), self.y.to(*arguments, **options))


def test_narrow_runs_raise_batches_of_any_class():
    class Narrow(Regression):
        def loss(self, batch):
            return (self.net(batch.x.to(self.dtype)) - batch.y).square().mean() / 2

    x, y = regression_data()
    data = DataLoader(TensorDataset(x, y), 24, collate_fn=lambda s: Batch(*map(torch.stack, zip(*s, strict=True))))
    monitor, plain = tracked(), tracked()
    fit(monitor, Narrow(seeded(4, 1)), data, precision="bf16-true", max_epochs=1)
    fit(plain, Narrow(seeded(4, 1)), data, max_epochs=1)
    assert first_loss(monitor) == pytest.approx(first_loss(plain), rel=2e-2)


def test_attributes_of_parameters_are_there_and_private():
    class Anchored(Regression):
        def __init__(self):
            super().__init__(seeded(4, 1), lr=1e-3)
            for parameter in self.parameters():
                parameter.anchor = parameter.detach().clone()

        def loss(self, batch):
            pull = sum((p - p.anchor).square().sum() for p in self.parameters())
            for parameter in self.parameters():
                parameter.anchor.add_(0.001)
            return super().loss(batch) + pull

    monitor, module = tracked(), Anchored()
    fit(monitor, module, max_epochs=3)
    bare = Anchored()
    fit([], bare, max_epochs=3)
    assert torch.equal(module.net[0].weight.anchor, bare.net[0].weight.anchor)
    assert torch.equal(module.net[0].weight, bare.net[0].weight)


class Augmented(pl.LightningDataModule):
    """Augments after the transfer, with a generator and counters of its own."""

    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(3)
        self.norm = nn.BatchNorm1d(4)
        self.count = 0

    def train_dataloader(self):
        return mini_batches()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.count += 1
        x, y = batch
        return self.norm(x + 0.1 * torch.randn(x.shape, generator=self.noise)).detach(), y


def test_transforms_of_a_data_module_leave_no_trace():
    results = []
    for monitors in ([tracked()], []):
        module, data = Regression(seeded(4, 1), lr=1e-2), Augmented()
        fit(monitors, module, data, max_epochs=2)
        results.append((module.net[0].weight, data.noise.get_state(), data.norm.running_mean, torch.tensor(data.count)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_step_that_draws_from_an_iterator_is_refused_and_one_that_holds_one_is_not():
    class Draws(Regression):
        def __init__(self, draws):
            super().__init__(lr=1e-3)
            self.draws = draws
            self.source = (x for x in range(1000))

        def training_step(self, batch, batch_idx):
            if self.draws:
                next(self.source)
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match="draws from the iterator `source`"):
        fit(tracked(), Draws(True))
    module = Draws(False)
    monitor = tracked()
    fit(monitor, module)
    assert len(monitor.history) == 4
    assert next(module.source) == 0


def test_the_profiler_sees_the_run_alone():
    from lightning.pytorch.profilers import SimpleProfiler

    def calls(monitors):
        profiler = SimpleProfiler()
        fit(monitors, Regression(lr=1e-3), profiler=profiler)
        return {k: len(v) for k, v in profiler.recorded_durations.items() if "HessianMonitor" not in k}

    assert calls([tracked()]) == calls([])


class Gathers(Dataset):
    """Answers for a whole batch at once, as large stores do; its loader has nothing to collate."""

    def __init__(self):
        self.x, self.y = regression_data()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        raise AssertionError("asked for a single sample")

    def __getitems__(self, indices):
        return self.x[indices], self.y[indices]


def test_data_sets_that_answer_for_whole_batches():
    monitor, plain = tracked(), tracked()
    fit(monitor, Regression(seeded(4, 1)), DataLoader(Gathers(), 8, collate_fn=lambda batch: batch), max_epochs=1)
    fit(plain, Regression(seeded(4, 1)), mini_batches(), max_epochs=1)
    assert monitor.history[0].notes["probe"]["kind"] == "the whole training set"
    assert first_loss(monitor) == first_loss(plain)


def test_sparse_gradients_are_refused_with_the_cure():
    class Sparse(Regression):
        def __init__(self):
            super().__init__(nn.Linear(4, 1), lr=1e-3)
            self.table = nn.Embedding(3, 4, sparse=True)

        def loss(self, batch):
            rows = self.table((batch[0][:, 0] > 0).long())
            return (self.net(batch[0] * rows) - batch[1]).square().mean()

    with pytest.raises(MisconfigurationException, match="`sparse=False`"):
        fit(tracked(), Sparse())
    monitor = tracked(parameters=r"net\..*")
    fit(monitor, Sparse())
    assert len(monitor.history) == 4


# Memory


def test_runs_do_not_stay_in_memory():
    modules = []
    for _ in range(2):
        module = Regression(lr=1e-3)
        modules.append(weakref.ref(module))
        fit(tracked(), module)
        del module
    gc.collect()
    assert [module() for module in modules] == [None, None]


@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
def test_measurements_leave_no_tensors_behind(engine):
    counts = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, *_):
            gc.collect()
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    fit([tracked(engine=engine), Counts()], Regression(seeded(4, 5, 1), lr=1e-3), max_epochs=8)
    assert counts[-1] <= counts[2]


class Counted(Dataset):
    reads = 0

    def __len__(self):
        return 24

    def __getitem__(self, i):
        type(self).reads += 1
        return torch.randn(4) + random.random(), torch.zeros(1)


def test_the_data_set_is_read_elsewhere():
    Counted.reads = 0
    fit(tracked(), Regression(lr=1e-3), loader(Counted(), 24), max_epochs=3)
    assert Counted.reads == 3 * 24


def test_two_runs_of_one_trainer_keep_the_probe_of_the_same_data():
    monitor = tracked(probe=Probe(size=10))
    data = full_batch()
    trainer = fit(monitor, Regression(seeded(4, 1), lr=0.0), data, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, data)
    assert len({r.scalars["hessian/probe_loss"] for r in monitor.history}) == 1
