"""Misuse raises before the first step, with rule, value and remedy."""

from __future__ import annotations

import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import NoisyStream, Regression, loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_dynamics import DisplacementMonitor, HessianMonitor, Probe
from lightning_dynamics.callbacks.measuring import AsymmetryError, explain

WHOLE = Probe(whole=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": 0}, "`every_n_train_steps` must be an integer of at least 1 or None, got 0"),
        ({"every_n_train_steps": -1}, "got -1"),
        ({"every_n_train_steps": 1.5}, "got 1.5"),
        ({"every_n_train_steps": 1, "every_n_epochs": 1}, "exclude each other: give one of them"),
        ({"top_k": 0}, "`top_k` must be an integer of at least 1, got 0"),
        ({"top_k": 2.0}, "`top_k` must be an integer of at least 1, got 2.0"),
        ({"bottom_k": -1}, "`bottom_k` must be an integer of at least 0, got -1"),
        ({"tolerance": 0}, "`tolerance` must be a number between 0 and 1, got 0"),
        ({"mode": "test"}, "`mode` must be one of 'train', 'eval', got 'test'"),
        ({"precision": 16}, "`precision` must be one of 'float32', 'same', got 16"),
        ({"engine": "fast"}, "`engine` must be one of 'auto', 'kept', 'rebuilt', got 'fast'"),
        ({"noise_draws": 0}, "`noise_draws` must be an integer of at least 1, got 0"),
        ({"name": "a/b"}, "`name` must be made of letters, digits"),
    ],
)
def test_impossible_options_are_refused_when_the_monitor_is_made(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        HessianMonitor(**arguments)


class Steps(Regression):
    """Counts optimizer steps, so that a test can see that none was taken."""

    taken = 0

    def optimizer_step(self, *arguments, **options):
        type(self).taken += 1
        super().optimizer_step(*arguments, **options)


def assert_refused(monitors, message, module=None, data=None, **options):
    module = Steps() if module is None else module
    type(module).taken = 0
    with pytest.raises(MisconfigurationException, match=message):
        fit(monitors, module, data, **options)
    assert type(module).taken == 0


def test_more_eigenvalues_than_parameters():
    assert_refused(
        HessianMonitor(top_k=4, bottom_k=1, probe=WHOLE),
        r"`top_k` \(4\) and `bottom_k` \(1\) ask for more eigenvalues than there are measured parameters \(4\)",
    )


def test_a_pattern_that_matches_nothing():
    assert_refused(HessianMonitor(probe=WHOLE, parameters="encoder"), r"`parameters='encoder'` matches no.*net\.weight")


def test_nothing_to_train():
    module = Steps(optimizer=lambda p: torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    module.net.requires_grad_(False)
    assert_refused(HessianMonitor(probe=WHOLE), "has no parameter that requires a gradient", module)


def test_an_empty_probe():
    assert_refused(HessianMonitor(probe=Probe(dataloader=[])), "`dataloader` is empty")


def test_the_whole_of_a_stream():
    class Stream(Steps):
        def loss(self, batch):
            return self.net(batch[0][:, :4]).square().mean()

    assert_refused(
        HessianMonitor(probe=WHOLE),
        "`whole=True` needs a map-style training set.*`dataloader=`",
        Stream(),
        loader(NoisyStream()),
    )


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: m.net(b[0]), r"scalar tensor, got \(24, 1\)"),
        (lambda m, b: 3.0, "scalar tensor, got float"),
        (lambda m, b: m.loss(b).detach(), "does not depend on any parameter"),
        (
            lambda m, b: b[0].clone().requires_grad_().sum(),
            r"depends on none of the measured parameters \(net\.weight\)",
        ),
        ("no_such_method", "no_such_method"),
    ],
)
def test_a_loss_that_cannot_be_measured(loss_fn, message):
    assert_refused(HessianMonitor(probe=WHOLE, loss_fn=loss_fn), message)


def test_manual_optimization_without_a_loss_or_with_two():
    class Manual(Steps):
        def __init__(self, losses):
            super().__init__()
            self.automatic_optimization = False
            self.losses = losses

        def training_step(self, batch, batch_idx):
            for _ in range(self.losses):
                self.manual_backward(self.loss(batch))
            self.optimizers().step()

    assert_refused(HessianMonitor(probe=WHOLE), "`manual_backward` on no loss", Manual(0))
    assert_refused(HessianMonitor(probe=WHOLE), "`manual_backward` on 2 losses.*`loss_fn=`", Manual(2))


def test_a_dict_without_a_loss():
    class NoLoss(Steps):
        def training_step(self, batch, batch_idx):
            return {"los": self.loss(batch)}

    assert_refused(HessianMonitor(probe=WHOLE), "a dict without the key 'loss'", NoLoss())


def test_a_step_that_never_returns_a_loss():
    class Never(Steps):
        def training_step(self, batch, batch_idx):
            return None

    assert_refused(HessianMonitor(probe=WHOLE), "No batch of the probe gave a loss", Never())


def test_an_operation_without_a_second_derivative():
    class Ctc(Steps):
        def loss(self, batch):
            scores = self.net(batch[0]).expand(-1, 3)[:, None].log_softmax(-1)
            return F.ctc_loss(scores, torch.ones(1, 2, dtype=torch.long), torch.tensor([24]), torch.tensor([2]))

    assert_refused(HessianMonitor(1, 0, probe=WHOLE), "`ctc_loss` has no second derivative.*`loss_fn=`", Ctc())


def test_a_wrong_second_derivative():
    class Product(torch.autograd.Function):
        """x·w, whose backward forgets that it depends on w."""

        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, slope):
            x, w = ctx.saved_tensors
            return slope * w.detach(), slope * x

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return Product.apply(x, self.scale)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Scaled(), nn.Linear(8, 1))
    assert_refused(HessianMonitor(probe=WHOLE), "is not symmetric", Steps(net))


def test_a_loss_that_is_no_function():
    calls = []

    class Drifts(Steps):
        def loss(self, batch):
            calls.append(1)
            # a module global is beyond the sandbox: the loss changes from evaluation to evaluation
            return super().loss(batch) + len(calls) * self.net.weight.pow(3).sum() * self.net.weight[0, 0]

    assert_refused(HessianMonitor(probe=WHOLE, engine="rebuilt"), "not the same function at every evaluation", Drifts())


def test_two_monitors_that_would_write_the_same_keys():
    from lightning_dynamics.callbacks import DynamicsMonitor

    class Copy(HessianMonitor):
        pass

    assert issubclass(Copy, DynamicsMonitor)
    assert_refused([HessianMonitor(probe=WHOLE), Copy(probe=WHOLE)], r"2 monitors log under 'hessian/'.*`name=`")


def test_sharded_strategies():
    from lightning.pytorch.strategies import ModelParallelStrategy

    from lightning_dynamics.callbacks.checks import check_strategy

    class Trainer:
        strategy = ModelParallelStrategy()

    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy shards the weights"):
        check_strategy(Trainer(), [DisplacementMonitor(), HessianMonitor()])
    with pytest.raises(MisconfigurationException, match="DisplacementMonitor runs on a single device"):
        check_strategy(Trainer(), [DisplacementMonitor(probe=WHOLE)])
    check_strategy(Trainer(), [DisplacementMonitor()])


def test_a_step_that_fails_on_the_probe_says_where():
    class Picky(Steps):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) != 8:
                raise KeyError("only batches of 8")
            return self.loss(batch)

    probe = Probe(dataloader=full_batch())
    assert_refused(
        HessianMonitor(probe=probe), "HessianMonitor cannot measure Picky: KeyError", Picky(), mini_batches()
    )


def test_failures_of_the_symmetry_test_are_known_as_such():
    """Their message speaks of a wrong double backward; they are no missing operation."""
    assert explain(AsymmetryError("an operation has a wrong double backward")).is_asymmetry
