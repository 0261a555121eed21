"""In which precision is computed: float32 at least, double where the run is, the run's own on request."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import HessianMonitor, Probe
from lightning_dynamics.callbacks import curvature

WHOLE = Probe(whole=True)
INPUTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "bf16-mixed": torch.float32, "16-mixed": torch.float32}
"""In which type a batch reaches the step, by the precision of the run."""


class Classifier(pl.LightningModule):
    """A small smooth network, in batches of unequal size."""

    def __init__(self, seed=0, lr=0.1):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
        self.lr = lr
        self.passed = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def on_train_batch_start(self, batch, batch_idx):
        self.passed.append(copy.deepcopy(self.net).double())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def samples(n=20):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n, 4, generator=draw), torch.randint(0, 3, (n,), generator=draw)


def loader():
    return DataLoader(TensorDataset(*samples()), batch_size=8)


def tracked(top_k=3, **options):
    return HessianMonitor(
        top_k, 0, **{"every_n_train_steps": 1, "probe": WHOLE, "pair": False, "tolerance": 1e-8, **options}
    )


def scaled(scale=2.0**10):
    """The Trainer's "16-mixed" would silently be bfloat16 without a scaler on the CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale, growth_interval=3))]}


def in_precision(name):
    return scaled() if name == "16-mixed" else {"precision": name}


def trained(monitors, module, **options):
    trainer = fit(monitors, module, loader(), max_epochs=1, **options)
    if "plugins" in options:
        assert isinstance(trainer.precision_plugin.scaler, torch.amp.GradScaler)
    return trainer


def reference(net, inputs=torch.float32):
    """Loss, gradient norm and the spectrum, descending, of the dense Hessian in float64."""
    x, y = samples()
    x = x.to(inputs).double()
    names = dict(net.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in names.values()])

    def loss(vector):
        parts = vector.split([p.numel() for p in names.values()])
        values = {k: part.view_as(p) for (k, p), part in zip(names.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    return (
        float(loss(flat)),
        float(torch.autograd.functional.jacobian(loss, flat).norm()),
        torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).flip(0),
    )


def tops(record, family="hessian"):
    """Values and their stated errors."""
    keys = sorted(key for key in record.scalars if key.startswith(f"{family}/top_"))
    values = torch.tensor([record.scalars[key] for key in keys], dtype=torch.float64)
    return values, torch.tensor([record.errors[key] for key in keys], dtype=torch.float64)


@pytest.mark.parametrize(("precision", "engine"), [("float32", "kept"), ("same", "rebuilt")])
def test_double_runs_are_measured_in_double(precision, engine):
    monitor, module = tracked(precision=precision, engine=engine), Classifier()
    trained(monitor, module, precision="64-true")
    assert module.net[0].weight.dtype == torch.float64
    assert len(monitor.history) == 4
    for record, net in zip(monitor.history, module.passed, strict=False):
        loss, gradient, spectrum = reference(net, torch.float64)
        values, bounds = tops(record)
        assert record.scalars["hessian/probe_loss"] == pytest.approx(loss, rel=1e-12)
        assert record.scalars["hessian/gradient_norm"] == pytest.approx(gradient, rel=1e-12)
        assert record.scalars["hessian/edge_ratio"] == pytest.approx(module.lr * float(spectrum[0]) / 2, rel=1e-8)
        assert (values - spectrum[:3]).abs().le(1e-8 * spectrum[0]).all()
        assert (values - spectrum[:3]).abs().le(bounds).all()
        assert bounds.le(1e-8 * spectrum[0]).all()


@pytest.mark.parametrize("name", INPUTS)
def test_narrow_runs_are_measured_in_float32_at_their_rounded_weights(name):
    monitor, module = tracked(engine="rebuilt" if "true" in name else "kept"), Classifier()
    trained(monitor, module, **in_precision(name))
    assert len(monitor.history) == 4
    for record, net in zip(monitor.history, module.passed, strict=False):
        loss, gradient, spectrum = reference(net, INPUTS[name])
        values, bounds = tops(record)
        assert record.scalars["hessian/probe_loss"] == pytest.approx(loss, rel=1e-6)
        assert record.scalars["hessian/gradient_norm"] == pytest.approx(gradient, rel=1e-5)
        assert (values - spectrum[:3]).abs().le(bounds).all()
        assert bounds.le(1e-5 * spectrum[0]).all()


@pytest.mark.parametrize("name", ["bf16-true", "16-true"])
def test_where_weights_are_rounded_the_spectrum_is_that_of_the_rounded_ones(name):
    """What makes the test above one: unrounded weights or inputs would lie far outside of the bounds."""
    monitor, module = tracked(), Classifier()
    rounded = copy.deepcopy(module.net).to(INPUTS[name]).double()
    wide = copy.deepcopy(module.net).double()
    trained(monitor, module, **in_precision(name))
    values, bounds = tops(monitor.history[0])
    assert (values - reference(rounded, INPUTS[name])[2][:3]).abs().le(bounds).all()
    assert (values - reference(wide, INPUTS[name])[2][:3]).abs().gt(3 * bounds).any()
    assert (values - reference(rounded)[2][:3]).abs().gt(3 * bounds).any()


@pytest.mark.parametrize("name", INPUTS)
def test_the_runs_own_precision_is_another_one(name):
    """Accepted before the first step, and really computed in: near the value in float32, and not at it."""
    monitors = [tracked(name="wide"), tracked(name="own", precision="same")]
    module = Classifier(lr=0.0)
    trained(monitors, module, **in_precision(name))
    wide, own = (monitor.history for monitor in monitors)
    assert len(wide) == len(own) == 4
    (values, _), (others, bounds) = tops(wide[0], "hessian_wide"), tops(own[0], "hessian_own")
    eps = torch.finfo(torch.bfloat16 if "bf16" in name else torch.float16).eps
    assert (values - others).abs().le(eps * values[0]).all()
    assert (values - others).abs().gt(1e-6 * values[0]).any()
    assert bounds.gt(1e-3 * eps * values[0]).all(), "the rounding of the products is in the bounds"
    assert own[0].scalars["hessian_own/probe_loss"] != wide[0].scalars["hessian_wide/probe_loss"]


def learned(seed=0, steps=200):
    """A network that knows its data: the Hessian is a small difference of large terms."""
    module = Classifier(seed, lr=0.0)
    x, y = samples()
    optimizer = torch.optim.SGD(module.parameters(), 0.3, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return module


@pytest.mark.parametrize("name", INPUTS)
def test_in_the_runs_own_precision_errors_contain_the_rounding_or_the_record_says_so(name):
    monitors = [tracked(name="wide"), tracked(name="own", precision="same")]
    trained(monitors, learned(), **in_precision(name))
    (record,) = monitors[1].history[:1]
    (values, wide), (others, own) = (tops(monitor.history[0], f"hessian_{monitor.name}") for monitor in monitors)
    assert bool((values - others).abs().le(wide + own).all()) or "rounding" in record.notes


def test_errors_contain_the_rounding_of_float32_in_networks_that_have_learned():
    for seed in range(2):
        for steps in (200, 1000):
            monitor, module = tracked(), learned(seed, steps)
            trained(monitor, module)
            values, bounds = tops(monitor.history[0])
            assert (values - reference(module.passed[0])[2][:3]).abs().le(bounds).all()


def test_asymmetry_in_float32_that_is_none_in_float64_is_rounding(monkeypatch):
    monkeypatch.setitem(curvature._SYMMETRIC, torch.float32, 1e-12)
    monitor = tracked()
    trained(monitor, Classifier())
    assert len(monitor.history) == 4


@pytest.mark.parametrize("precision", ["float32", "same"])
def test_the_scaler_is_left_alone_and_its_scale_is_in_no_value(precision):
    histories = []
    for scale in (2.0**4, 2.0**12):
        states = []
        for monitors in ([], [tracked(precision=precision)]):
            trainer = trained(monitors, Classifier(lr=0.0), **scaled(scale))
            states.append(trainer.precision_plugin.scaler.state_dict())
        assert states[0] == states[1]
        assert states[1]["scale"] == 2 * scale, "it has grown once in three steps"
        histories.append(monitors[0].history)
    for one, other in zip(*histories, strict=True):
        assert one.scalars == other.scalars
        assert one.errors == other.errors
    assert histories[0][0].scalars["hessian/probe_loss"] < 2


def test_what_double_precision_cannot_tell_is_said(monkeypatch):
    monkeypatch.setattr("lightning_dynamics.callbacks.hessian.double_precision", lambda _: "missing")
    monitor = tracked()
    trained(monitor, Classifier())
    assert all(record.notes["rounding"] == "not known" for record in monitor.history)


def test_a_loss_that_insists_on_float32_is_measured_and_its_rounding_not_known():
    class Insists(Classifier):
        def training_step(self, batch, batch_idx):
            if self.dtype is torch.float64 or next(self.parameters()).dtype is torch.float64:
                raise TypeError("float32, please")
            return super().training_step(batch, batch_idx)

    monitor = tracked()
    trained(monitor, Insists())
    assert monitor.history[0].notes["rounding"] == "not known: TypeError: float32, please"
    assert "hessian/top_1" in monitor.history[0].scalars


def test_noise_that_is_other_noise_in_double_precision_is_no_rounding():
    class Noisy(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x + 0.5 * torch.randn_like(x)), y)

    monitor = tracked()
    trained(monitor, Noisy())
    assert monitor.history[0].notes["rounding"] == "not known: the step draws other noise in double precision"
    assert "leading" not in monitor._session._ledger.states[monitor.label].memory


def test_between_comparisons_the_last_rounding_counts():
    monitor = tracked()
    trained(monitor, learned())
    first, second = (record.notes["rounding"] for record in monitor.history[:2])
    assert first == second > 0


def test_a_step_that_shares_what_it_could_write_to_is_not_run_in_double_precision():
    seen = []

    class Holds(Classifier):
        def __init__(self):
            super().__init__()
            self.replay = TensorDataset(torch.zeros(1))  # data sets are shared, not copied

        def training_step(self, batch, batch_idx):
            seen.append(batch[0].dtype)
            return super().training_step(batch, batch_idx)

    monitor = tracked()
    trained(monitor, Holds())
    assert "shares" in monitor.history[0].notes["rounding"]
    assert torch.float64 not in seen
