"""Everything by keyword and from a configuration file."""

from __future__ import annotations

import contextlib
import inspect
import io
import re

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import full_batch
from helpers.modules import Classification, Regression, class_data
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_dynamics
from lightning_dynamics import (
    DisplacementMonitor,
    GradientNoiseMonitor,
    HessianMonitor,
    NeuralCollapseMonitor,
    Probe,
    Reference,
    SAMMonitor,
    Spectrum,
    StochasticSharpnessMonitor,
)


class Plain(Regression):
    def __init__(self, lr: float = 0.01):
        super().__init__(lr=lr)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return full_batch()


def outputs(module, batch):
    return module.net(batch[0]), lambda z: (z - batch[1]).square().sum(1) / 2


def loss(module, batch):
    return module.loss(batch)


def only_weights(name, parameter):
    return name.endswith("weight")


TRAINER = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_dynamics.HessianMonitor
      init_args:
        every_n_train_steps: 1
"""

FULL = f"""
        top_k: 2
        bottom_k: 0
        pair: false
        probe: {{size: 16, seed: 1}}
        spectrum: {{every_n_train_steps: 2, num_vectors: 4}}
        parameters: [net.*]
        operator: gauss_newton
        output_fn: {__name__}.outputs
        loss_fn: {__name__}.loss
        tolerance: 1e-2
        also_log: [spectral_sparsity, "block_.*"]
        name: small
"""


def run(tmp_path, options, monkeypatch, kind=HessianMonitor, module=Plain, data=Data):
    file = tmp_path / "config.yaml"
    file.write_text(TRAINER.replace("HessianMonitor", kind.__name__) + options)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "-c", str(file)])
    cli = LightningCLI(module, data, save_config_callback=None)
    return next(c for c in cli.trainer.callbacks if isinstance(c, kind))


def test_every_option_can_be_set_in_a_file(tmp_path, monkeypatch):
    monitor = run(tmp_path, FULL, monkeypatch)
    assert monitor.options.probe == Probe(size=16, seed=1)
    assert monitor.spectrum == Spectrum(2, num_vectors=4)
    assert monitor.options.output_fn is outputs
    assert monitor.options.loss_fn is loss
    assert [r.step for r in monitor.history] == [0, 1, 2]
    assert "gauss_newton_small/trace" in monitor.history[0].scalars


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ("        operator: residual\n        output_fn: net\n", lambda m: m.options.output_fn == "net"),
        ("        parameters: net\\..*\n", lambda m: m.options.parameters == r"net\..*"),
        (f"        parameters: {__name__}.only_weights\n", lambda m: m.options.parameters is only_weights),
        ("        spectrum: false\n", lambda m: m.spectrum is None),
        ("        also_log: .*\n", lambda m: m._also_log[0].pattern == ".*"),
    ],
)
def test_options_of_several_types(tmp_path, monkeypatch, options, check):
    assert check(run(tmp_path, options, monkeypatch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("        top_k: two\n", r'"top_k".*\n.*Expected a <class .int.>. Got value: two'),
        ("        operator: ggn\n", r'"operator".*\n.*Got value: ggn'),
        ("        probe: {size: many}\n", r'"size".*\n.*Got value: many'),
        ("        spectrum: {num_vectors: 1}\n", "`num_vectors` must be an integer of at least 2, got 1"),
        ("        tolerance: 2.0\n", "`tolerance` must be a number between 0 and 1, got 2.0"),
        ("        every_n_steps: 5\n", "every_n_steps"),
    ],
)
def test_stray_values_are_named(tmp_path, monkeypatch, options, message):
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises((SystemExit, Exception)) as caught:
        run(tmp_path, options, monkeypatch)
    assert re.search(message, printed.getvalue() + str(caught.value))


class Classes(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*class_data()), 16)

    val_dataloader = train_dataloader


class Classifies(Classification):
    def __init__(self, lr: float = 0.01):
        super().__init__(lr=lr)

    def logits(self, batch):
        return self.net(batch[0])


def labels(batch):
    return batch[1]


def features(tensor, layer):
    return tensor * 1


COLLAPSE = f"""
        layers: [auto, "net.0"]
        head: net.6
        reduce: pool
        num_classes: 3
        probe: {{whole: true}}
        validation: {{size: 32, split: validation}}
        forward_fn: {{forward}}
        target_fn: {__name__}.labels
        subclass_fn: {__name__}.labels
        feature_fn: {__name__}.features
        per_class: true
        mode: train
        also_log: [cdnv/.*]
        name: small
"""


@pytest.mark.parametrize("forward", ["logits", f"{__name__}.logits"])
def test_every_option_of_neural_collapse_can_be_set_in_a_file(tmp_path, monkeypatch, forward):
    options = COLLAPSE.replace("{forward}", forward)
    monitor = run(tmp_path, options, monkeypatch, NeuralCollapseMonitor, Classifies, Classes)
    assert monitor.options.validation == Probe(size=32, split="validation")
    assert monitor.options.forward_fn == (forward if forward == "logits" else logits)
    assert monitor.options.target_fn is monitor.options.subclass_fn is labels
    assert monitor.options.feature_fn is features
    assert list(monitor.history[-1].notes["layers"]) == ["net_0", "net_3", "last"]
    assert "collapse_small/nc1_validation" in monitor.history[-1].scalars


def logits(module, batch):
    return module.net(batch[0])


DISPLACEMENT = f"""
        log_spaced: true
        reference: {{reference}}
        window: [10, 100]
        memory: device
        dimensions: 101
        layers: false
        conserved: false
        phase_space: 1
        phase_window: 300
        probe: {{size: 32}}
        probe_every_n_train_steps: 2
        parameters: net.6.*
        loss_fn: {__name__}.cross_entropy
        weight_fn: {__name__}.count
        mode: eval
        precision: same
        noise_draws: 2
        also_log: [norm, from_reference]
        monitor: true
        name: late
"""


def cross_entropy(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def count(batch):
    return float(len(batch[0]))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("{step: 1}", Reference(step=1)), ("{epoch: 0}", Reference(epoch=0)), ("{every_n_train_steps: 5}", None)],
)
def test_every_option_of_displacement_can_be_set_in_a_file(tmp_path, monkeypatch, reference, expected):
    options = DISPLACEMENT.replace("{reference}", reference)
    monitor = run(tmp_path, options, monkeypatch, DisplacementMonitor, Classifies, Classes)
    assert monitor.reference == (expected or Reference(every_n_train_steps=5))
    assert monitor.window == (10, 100)
    assert monitor.options.loss_fn is cross_entropy
    assert monitor.options.weight_fn is count
    assert ("displacement_late/from_reference" in monitor.history[-1].scalars) == (expected is not None)
    assert "displacement_late/gradient_norm" in monitor.history[-1].scalars


OF_MINI_BATCHES = f"""
        every_n_train_steps: 2
        probe: {{draws: 4, batch_size: 6, seed: 3}}
        parameters: net.6.*
        loss_fn: {__name__}.cross_entropy
        weight_fn: {__name__}.count
        mode: eval
        precision: same
        noise_draws: 2
        engine: kept
        also_log: [".*"]
        monitor: true
        name: late
"""

SHARPNESS = """
        eigenvalues: true
        eigenvalues_every_n_train_steps: 2
        solved: 2
        step: true
        window: 3
"""

NOISE = f"""
        samples: true
        directions: 1
        detail_every_n_train_steps: 2
        series: 100
        output_fn: {__name__}.likelihood
"""


def likelihood(module, batch):
    return module.net(batch[0]), lambda z: torch.distributions.Categorical(logits=z)


@pytest.mark.parametrize(
    ("kind", "options", "keys"),
    [
        (StochasticSharpnessMonitor, SHARPNESS, ["sharpness_late/batch_sharpness", "sharpness_late/minibatch_top_1"]),
        (GradientNoiseMonitor, NOISE, ["noise_late/trace", "noise_late/true_fisher_trace", "noise_late/fisher_trace"]),
    ],
)
def test_every_option_of_monitors_of_mini_batches_can_be_set_in_a_file(tmp_path, monkeypatch, kind, options, keys):
    monitor = run(tmp_path, options + OF_MINI_BATCHES, monkeypatch, kind, Classifies, Classes)
    assert set(re.findall(r"^ {8}(\w+):", options + OF_MINI_BATCHES, re.MULTILINE)) >= set(
        inspect.signature(kind).parameters
    ) - {"every_n_epochs", "log_spaced"}
    assert monitor.options.probe == Probe(draws=4, batch_size=6, seed=3)
    assert monitor.options.loss_fn is cross_entropy
    assert all(key in monitor.history[0].scalars for key in keys)


@pytest.mark.parametrize(
    "kind",
    [
        HessianMonitor,
        NeuralCollapseMonitor,
        DisplacementMonitor,
        StochasticSharpnessMonitor,
        GradientNoiseMonitor,
        Probe,
        Spectrum,
        Reference,
        SAMMonitor,
    ],
)
def test_every_option_has_a_help_text(kind):
    """jsonargparse reads it from the docstring's list of arguments or attributes."""
    text = inspect.getdoc(kind)
    for name in inspect.signature(kind).parameters:
        assert re.search(rf"^    {name}: \S", text, re.MULTILINE), name


SHARPENED = """
        every_n_train_steps: 2
        also_log: [rho, gradient_norm]
        monitor: true
        name: late
"""


def test_every_option_of_the_monitor_of_sam_can_be_set_in_a_file(tmp_path, monkeypatch):
    trainer = TRAINER.replace("trainer:\n", "trainer:\n  strategy: sam\n")
    monkeypatch.setattr(f"{__name__}.TRAINER", trainer)
    monitor = run(tmp_path, SHARPENED, monkeypatch, SAMMonitor)
    assert set(re.findall(r"^ {8}(\w+):", SHARPENED, re.MULTILINE)) == set(inspect.signature(SAMMonitor).parameters) - {
        "every_n_epochs",
        "log_spaced",
    }
    assert monitor.logged(monitor.history[0]) == monitor.history[0].scalars


def test_the_help_of_a_monitor_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "--trainer.callbacks.help", "lightning_dynamics.HessianMonitor"])
    with pytest.raises(SystemExit) as caught:
        LightningCLI(Plain, Data)
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Measure two consecutive steps for each point" in printed
    assert lightning_dynamics.HessianMonitor is HessianMonitor
