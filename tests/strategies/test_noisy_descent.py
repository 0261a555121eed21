"""Gradient descent with injected noise: the covariance that it has, and the runs that make it."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from helpers.fit import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dynamics import HessianMonitor, NoisyDescentStrategy, Probe, compose_strategy
from lightning_dynamics.callbacks.optimization import accumulated_batches, heavy_ball, sampling_order
from lightning_dynamics.strategies.noisy_descent import NOISES, batch_weights, noise_scale

N, B, K, P = 20, 5, 4, 3


def data(n=N):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, P, generator=draw, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5])
    return x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=draw, dtype=torch.float64)


def loader(batch_size=B, n=N, **options):
    return DataLoader(TensorDataset(*data(n)), batch_size, **options)


class Linear(pl.LightningModule):
    def __init__(self, lr=0.1, momentum=0.0):
        super().__init__()
        self.net = nn.Linear(P, 1, bias=False).double()
        nn.init.ones_(self.net.weight)
        self.lr, self.momentum = lr, momentum

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).square().mean() / 2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum)


class Gradients(pl.Callback):
    """The gradient of each step, as the optimizer is about to have it."""

    def __init__(self):
        self.seen, self.accumulated = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(pl_module.net.weight.grad.flatten().clone())
        self.accumulated.append(trainer.accumulate_grad_batches)


def strategy(noise="anisotropic", seed=7, **options):
    return compose_strategy(noise={"noise": noise, "noise_seed": seed}, **options)


def train(noise="anisotropic", callbacks=(), module=None, loaders=None, **options):
    gradients = Gradients()
    module = Linear() if module is None else module
    loaders = loader() if loaders is None else loaders
    trainer = fit([gradients, *callbacks], module, loaders, **{"strategy": strategy(noise), **options})
    return gradients, module, trainer


def batch_gradients(weight, x, y, size=B):
    """Gradients ``(k, p)`` of the losses of consecutive batches."""
    each = (x @ weight - y.flatten())[:, None] * x
    return torch.stack([part.mean(0) for part in each.split(size)])


@pytest.mark.parametrize(("n", "b"), [(6, 2), (6, 3), (4, 1)])
def test_the_noise_has_the_covariance_of_a_batch_in_the_mean_over_partitions(n, b):
    g = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away = g - g.mean(0)
    expected = away.mT @ away / n / b
    total, count = torch.zeros(2, 2, dtype=torch.float64), 0
    for order in itertools.permutations(range(n)):
        means = torch.stack([part.mean(0) for part in g[list(order)].split(b)])
        deviations = means - means.mean(0)
        total += noise_scale(n, n // b) ** 2 * deviations.mT @ deviations
        count += 1
    assert torch.allclose(total / count, expected, rtol=1e-12)


def test_weights_have_mean_one_and_the_scale_of_the_noise():
    weights = torch.stack([batch_weights(N, K, 3, step) for step in range(4000)])
    assert torch.allclose(weights.mean(1), torch.ones(4000, dtype=torch.float64))
    expected = (K * noise_scale(N, K)) ** 2 * (torch.eye(K) - 1 / K)
    assert torch.allclose(weights.T.cov(), expected.double(), atol=4 * 1.5 * expected[0, 0] / math.sqrt(4000))


@pytest.mark.parametrize("noise", NOISES)
def test_gradients_of_steps_have_mean_and_covariance(noise):
    """At frozen weights, over many steps, against the gradients of the batches."""
    steps = 250
    module = Linear(lr=0.0)
    gradients, _, trainer = train(noise, module=module, max_epochs=steps)
    assert trainer.global_step == len(gradients.seen) == steps
    assert set(gradients.accumulated) == {K}
    seen = torch.stack(gradients.seen)
    g = batch_gradients(torch.ones(P, dtype=torch.float64), *data())
    away = g - g.mean(0)
    covariance = noise_scale(N, K) ** 2 * away.mT @ away
    if noise == "diagonal":
        covariance = covariance.diag().diag()
    elif noise == "isotropic":
        covariance = covariance.trace() / P * torch.eye(P, dtype=torch.float64)
    scale = covariance.diag().sqrt()
    assert ((seen.mean(0) - g.mean(0)).abs() < 4 * scale / math.sqrt(steps)).all()
    # standard error of a covariance's entries
    error = (scale.outer(scale) ** 2 + covariance**2).sqrt() / math.sqrt(steps)
    assert ((seen.T.cov() - covariance).abs() < 4 * error).all()


def test_a_run_is_that_of_a_hand_written_loop():
    gradients, module, _ = train(module=Linear(momentum=0.5), gradient_clip_val=0.2)
    weight = torch.ones(P, dtype=torch.float64)
    velocity = torch.zeros(P, dtype=torch.float64)
    for step in range(3):
        g = batch_gradients(weight, *data())
        g = (batch_weights(N, K, 7, step)[:, None] * g).mean(0)
        assert torch.allclose(gradients.seen[step], g, rtol=1e-12)
        norm = g.norm()
        velocity = 0.5 * velocity + g * min(1, 0.2 / (norm + 1e-6))
        weight = weight - 0.1 * velocity
    assert norm > 0.2
    assert torch.allclose(module.net.weight.flatten(), weight, rtol=1e-12)


@pytest.mark.parametrize("noise", ["diagonal", "isotropic"])
def test_clipping_sees_the_noise(noise):
    free, clipped = train(noise, max_epochs=1), train(noise, max_epochs=1, gradient_clip_val=0.1)
    assert torch.equal(free[0].seen[0], clipped[0].seen[0])
    moved = torch.ones(P, dtype=torch.float64) - clipped[1].net.weight.flatten()
    assert torch.allclose(moved.norm(), torch.tensor(0.1 * 0.1, dtype=torch.float64), rtol=1e-4)


class Scaled(MixedPrecision):
    """A loss scale, a power of two, without the rounding of half precision."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))

    def autocast_context_manager(self):
        return nullcontext()


@pytest.mark.parametrize("noise", NOISES)
def test_a_loss_scale_changes_nothing(noise):
    _, plain, _ = train(noise, gradient_clip_val=0.5)
    _, scaled, trainer = train(noise, gradient_clip_val=0.5, plugins=[Scaled()])
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**12
    assert torch.allclose(plain.net.weight, scaled.net.weight, rtol=1e-6)


@pytest.mark.parametrize("noise", NOISES)
def test_a_step_whose_gradients_overflow_is_skipped(noise):
    class Overflows(Linear):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if self.current_epoch == 0 and batch_idx == 1 else loss

    gradients, module, trainer = train(noise, module=Overflows(), max_epochs=2, plugins=[Scaled()])
    assert not gradients.seen[0].isfinite().any()
    assert gradients.seen[1].isfinite().all()
    assert module.net.weight.isfinite().all()
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**11


def test_parameters_that_a_batch_does_not_use_count_with_a_gradient_of_zero():
    class Part(Linear):
        def __init__(self):
            super().__init__(lr=0.0)
            self.other = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.unused = nn.Parameter(torch.ones(2))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + (self.other * torch.tensor([3.0, 5.0])).sum() if batch_idx == 2 else loss

    class Kept(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert pl_module.unused.grad is None
            self.seen.append(pl_module.other.grad.clone())

    kept = Kept()
    train("diagonal", [kept], Part(), max_epochs=200)
    seen = torch.stack(kept.seen)
    deviations = torch.tensor([3.0, 5.0], dtype=torch.float64) * noise_scale(N, K) * math.sqrt(K - 1) / math.sqrt(K)
    assert torch.allclose(seen.std(0), deviations, rtol=0.15)
    assert torch.allclose(seen.mean(0), torch.tensor([0.75, 1.25], dtype=torch.float64), atol=0.6)


@pytest.mark.parametrize("noise", NOISES)
def test_seed_and_step_decide_the_noise(noise, monkeypatch):
    first, again = train(noise)[0].seen, train(noise)[0].seen
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = train(noise, strategy=strategy(noise, 8))[0].seen
    assert not torch.allclose(first[0], other[0])
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(train(noise, strategy=strategy(noise, None))[0].seen[0], first[0])


class Saves(pl.Callback):
    def __init__(self, file, batches):
        self.file, self.batches = file, batches

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("batches", [4, 6])  # after a step, and within one, which is begun anew
@pytest.mark.parametrize("order", [None, "random_reshuffling"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, noise, batches, order):
    def options():
        return {"strategy": strategy(noise, order=order), "val_check_interval": 2, "limit_val_batches": 1}

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        val_dataloader = train_dataloader

    file = tmp_path / "saved.ckpt"
    whole = train(noise, [Saves(file, batches)], Linear(momentum=0.9), Data(), **options())
    again = train(noise, [], Linear(momentum=0.9), Data(), ckpt_path=file, **options())
    assert len(again[0].seen) == 2
    assert torch.equal(whole[1].net.weight, again[1].net.weight)
    progress = [trainer.fit_loop.epoch_loop.batch_progress.total.completed for _, _, trainer in (whole, again)]
    assert progress == [12, 12]
    assert whole[2].global_step == again[2].global_step == 3


def test_a_short_last_batch_counts_like_the_others():
    gradients, _, _ = train(loaders=loader(6), max_epochs=1)
    g = batch_gradients(torch.ones(P, dtype=torch.float64), *data(), size=6)
    assert len(g[-1:]) == 1
    assert torch.allclose(gradients.seen[0], (batch_weights(N, 4, 7, 0)[:, None] * g).mean(0))


def test_a_limit_takes_fewer_batches_to_a_step():
    gradients, _, _ = train(limit_train_batches=2)
    g = batch_gradients(torch.ones(P, dtype=torch.float64), *data())[:2]
    assert torch.allclose(gradients.seen[0], (batch_weights(2 * B, 2, 7, 0)[:, None] * g).mean(0))
    assert len(gradients.seen) == 3


def test_schedules_know_the_number_of_steps_and_the_trainer_gets_its_accumulation_back():
    class Asks(Linear):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    _, module, trainer = train(module=Asks())
    assert module.steps == trainer.global_step == 3
    assert trainer.accumulate_grad_batches == 1
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader())
    assert trainer.global_step == 5
    trainer.validate(module, loader(), verbose=False)
    assert trainer.accumulate_grad_batches == 1


class ByHand(Linear):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Lbfgs(Linear):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*data()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accumulate_grad_batches": 2}, "leave `accumulate_grad_batches` at 1"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "the `GradientAccumulationScheduler` out"),
        ({"module": ByHand()}, "set `automatic_optimization = True`"),
        ({"module": Lbfgs()}, "use an optimizer that takes it once"),
        ({"loaders": DataLoader(Stream(), 4)}, "there are inf: use smaller batches, or `limit_train_batches`"),
        (
            {"loaders": DataLoader(Stream(), 4), "limit_train_batches": 3},
            "use one DataLoader over a map-style data set",
        ),
        ({"loaders": {"a": loader(), "b": loader()}}, "use one DataLoader over a map-style data set"),
        ({"reload_dataloaders_every_n_epochs": 1}, "leave `reload_dataloaders_every_n_epochs` out"),
        ({"loaders": loader(N)}, "at least 2 and finitely many, and there are 1"),
    ],
)
def test_what_is_no_step_of_all_batches_is_refused(options, match):
    with pytest.raises(MisconfigurationException, match=match):
        train(**options)


@pytest.mark.parametrize("order", ["with_replacement", "independent_batches"])
def test_orders_that_repeat_samples_are_refused(order):
    with pytest.raises(MisconfigurationException, match=f"`{order}` repeats samples"):
        fit([], Linear(), loader(), strategy=compose_strategy(noise="anisotropic", order=order))


@pytest.mark.ddp
@pytest.mark.parametrize("noise", ["anisotropic", "diagonal"])
def test_ranks_with_seeds_of_their_own_share_the_noise(tmp_path, noise, monkeypatch):
    class SeedsOfItsOwn(Linear):
        def setup(self, stage):
            pl.seed_everything(7 + self.global_rank, verbose=False)

    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    file = tmp_path / "weights.pt"
    two = compose_strategy("ddp_fork", noise=noise, timeout=timedelta(seconds=60))
    fit([Report(file)], SeedsOfItsOwn(), loader(2, n=24), strategy=two, devices=2, max_epochs=2)
    assert torch.equal(*torch.load(file, weights_only=True))


def test_sparse_gradients():
    class Words(pl.LightningModule):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.words = torch.nn.Embedding(5, 2, sparse=sparse)

        def training_step(self, batch, batch_idx):
            return self.words(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    batches = DataLoader(TensorDataset(torch.arange(12) % 4), 4)
    dense, sparse = Words(False), Words(True)
    for module in (dense, sparse):
        fit([], module, batches, strategy=strategy("diagonal"), max_epochs=2)
    assert torch.allclose(dense.words.weight[:4], sparse.words.weight[:4])


def test_who_asks_early_is_told_the_number_of_steps():
    class Asks(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            self.steps = trainer.estimated_stepping_batches

    asks = Asks()
    train(callbacks=[asks], max_epochs=3)
    assert asks.steps == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"noise": "gaussian"}, "`noise` must be one of anisotropic, diagonal, isotropic, got 'gaussian'"),
        ({"noise_seed": 0.5}, "`noise_seed` must be an int or None"),
        ({"noise_seed": False}, "`noise_seed` must be an int or None"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match):
    with pytest.raises(MisconfigurationException, match=match):
        NoisyDescentStrategy(**options)


def test_monitors_know_that_there_is_no_theory():
    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.seen = heavy_ball(trainer)[0], sampling_order(trainer), accumulated_batches(trainer)

    looks = Looks()
    train("diagonal", [looks])
    assert looks.seen == ("diagonal noise is injected into the gradient of all batches", (None, 1), K)


@pytest.mark.parametrize("noise", NOISES)
def test_a_monitor_leaves_a_noisy_run_as_it_was(noise):
    monitor = HessianMonitor(every_n_train_steps=1, probe=Probe(whole=True), top_k=1)
    without, measured = train(noise), train(noise, [monitor])
    assert torch.equal(without[1].net.weight, measured[1].net.weight)
    assert len(monitor.history) >= 3


class Report(pl.Callback):
    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, pl_module):
        everyone = [None] * trainer.world_size
        dist.all_gather_object(everyone, pl_module.net.weight.detach())
        if trainer.is_global_zero:
            torch.save(everyone, self.file)


@pytest.mark.ddp
@pytest.mark.parametrize("noise", NOISES)
def test_two_ranks_train_as_one_process(tmp_path, noise):
    module = Linear()
    train(noise, module=module, loaders=loader(4, n=24), strategy=strategy(noise, order="random_reshuffling"))
    two = strategy(noise, base="ddp_fork", order="random_reshuffling", timeout=timedelta(seconds=60))
    file = tmp_path / "weights.pt"
    train(noise, [Report(file)], loaders=loader(2, n=24), strategy=two, devices=2)
    ranks = torch.load(file, weights_only=True)
    assert torch.equal(ranks[0], ranks[1])
    assert torch.allclose(ranks[0], module.net.weight, rtol=1e-6)
    assert not torch.allclose(ranks[0], torch.ones(P, dtype=torch.float64))
