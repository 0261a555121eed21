"""HessianMonitor beside SAM: the certificate of its oscillation, and measurements at w."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Regression
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, Adam

from lightning_dynamics import (
    DDPSAMStrategy,
    DisplacementMonitor,
    GradientNoiseMonitor,
    HessianMonitor,
    Probe,
    SAMStrategy,
    StochasticSharpnessMonitor,
)

WHOLE = Probe(whole=True)
KEY = "hessian/sam_oscillation"


class Quadratic(Regression):
    """½Σλᵢwᵢ², whatever the data."""

    def __init__(self, top=10.0, lr=0.1, momentum=0.0, **options):
        super().__init__(nn.Linear(3, 1, bias=False), lr=lr, optimizer=lambda p: SGD(p, lr, momentum, **options))
        self.curvatures = top * torch.tensor([1.0, 0.6, 0.01])
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[0.03, -0.02, 0.01]]))

    def loss(self, batch):
        return (self.curvatures * self.net.weight.square().squeeze()).sum() / 2


def monitor(**options):
    return HessianMonitor(
        1, 0, **{"every_n_train_steps": 1, "probe": WHOLE, "pair": False, "spectrum": False, **options}
    )


def sharpened(monitors, module, data=None, rho=0.05, strategy=None, **options):
    strategy = SAMStrategy(rho=rho) if strategy is None else strategy
    return fit(monitors, module, full_batch() if data is None else data, strategy=strategy, **options)


@pytest.mark.parametrize(("top", "momentum"), [(5.0, 0.0), (10.0, 0.0), (15.0, 0.0), (10.0, 0.3)])
def test_in_the_cycle_that_sam_ends_in_it_is_one_at_any_stable_curvature(top, momentum):
    """Whatever the edge ratio of the base optimizer is."""
    measured = monitor(every_n_train_steps=200)
    sharpened(measured, Quadratic(top, momentum=momentum), max_epochs=201)
    record = measured.history[1]
    assert record.step == 200
    assert record.scalars[KEY] == pytest.approx(1, abs=1e-3)
    assert abs(record.scalars[KEY] - 1) <= record.errors[KEY] + 1e-5
    assert record.scalars["hessian/edge_ratio"] == pytest.approx(0.1 * top / 2 / (1 + momentum), rel=1e-3)


def test_it_is_made_of_the_gradient_of_the_step_before():
    """Unknown at step 0; ρ is that of the step that comes."""

    class Norms(Callback):
        def __init__(self):
            self.norms = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.norms.append(trainer.strategy.last_step.gradient_norm)

    measured, norms = monitor(), Norms()
    sharpened([measured, norms], Quadratic(), rho=lambda step, lr: lr * 0.1 * (step + 1), max_epochs=4)
    first, *others = measured.history
    assert KEY not in first.scalars
    assert first.notes["no_sam_oscillation"] == "no gradient has perturbed yet"
    for record, norm in zip(others, norms.norms, strict=True):
        reach = 0.01 * (record.step + 1) / norm
        assert record.scalars[KEY] == pytest.approx(10 * (1 + 10 * reach) / 20, rel=1e-3)


def test_unnormalized_sam_needs_no_gradient_and_has_its_edge_at_one():
    edge = ((1 + 8 * 0.05 / 0.1) ** 0.5 - 1) / (2 * 0.05)
    measured = monitor()
    sharpened(measured, Quadratic(edge), strategy=SAMStrategy(rho=0.05, variant="usam"), max_epochs=2)
    assert [record.scalars[KEY] for record in measured.history] == pytest.approx([1, 1, 1], abs=1e-3)


def test_a_pair_is_the_mean_of_two_points():
    single, pairs = monitor(), monitor(every_n_train_steps=2, pair=True)
    sharpened(single, Quadratic(), max_epochs=6)
    sharpened(pairs, Quadratic(), max_epochs=6)
    values = {record.step: record.scalars.get(KEY) for record in single.history}
    for record in pairs.history[1:-1]:
        mean = (values[record.step] + values[record.step + 1]) / 2
        assert record.scalars[KEY] == pytest.approx(mean, rel=1e-3)
    assert KEY not in pairs.history[0].scalars


@pytest.mark.parametrize("rho", [0.05, lambda step, lr: 0.5 * lr], ids=["constant", "scheduled"])
def test_after_a_resume_it_is_that_of_the_uninterrupted_run(tmp_path, rho):
    def trained(name, **options):
        kept = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, every_n_epochs=1)
        measured = monitor()
        sharpened([measured, kept], Quadratic(), rho=rho, enable_checkpointing=True, **{"max_epochs": 6, **options})
        return measured.history

    whole, first = trained("whole"), trained("first", max_epochs=3)
    second = trained("second", ckpt_path=tmp_path / "first" / "step=3.ckpt")
    assert [KEY in record.scalars for record in first] == [False, True, True, True]
    by_step = {record.step: record.scalars[KEY] for record in second if KEY in record.scalars}
    assert by_step[3] == first[-1].scalars[KEY]
    assert by_step == {record.step: record.scalars[KEY] for record in whole[1:]}


@pytest.mark.parametrize(
    ("sam", "module", "reason"),
    [
        ({"variant": "asam"}, Quadratic, "no theory of ASAM"),
        ({"variant": "gsam"}, Quadratic, "no theory of GSAM"),
        ({"m": 4}, Quadratic, "parts of a batch"),
        ({"every_k": 2}, Quadratic, "not a second gradient"),
        ({}, lambda: Regression(lr=1e-3, optimizer=lambda p: Adam(p, 1e-3)), "not one number"),
        ({}, lambda: Quadratic(lr=0.0), "the learning rate is 0"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_where_there_is_no_theory_the_reason_stands_in_the_record(sam, module, reason):
    measured = monitor(every_n_train_steps=2)
    sharpened(measured, module(), strategy=SAMStrategy(rho=0.05, **sam), max_epochs=2)
    assert not any(KEY in record.scalars for record in measured.history)
    assert reason in measured.history[-1].notes["no_sam_oscillation"]


def test_without_sam_there_is_no_word_of_it():
    measured = monitor()
    fit(measured, Quadratic())
    for record in measured.history:
        assert KEY not in record.scalars
        assert "no_sam_oscillation" not in record.notes


@pytest.mark.parametrize(("strategy", "logged"), [(SAMStrategy(rho=0.05), True), ("auto", False)])
def test_it_is_logged_where_the_strategy_is_sam(tmp_path, strategy, logged):
    measured = monitor()
    sharpened(measured, Quadratic(), strategy=strategy, logger=CSVLogger(tmp_path, name="", version=""))
    columns = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert (KEY in columns) is logged
    assert ("sam_oscillation" in measured.shown(False, True)) is True
    assert "sam_oscillation" not in measured.shown(False)
    assert "sam_oscillation" not in HessianMonitor(operator="preconditioned").shown(False, True)


@pytest.mark.parametrize("data", [full_batch(), mini_batches()], ids=["probed at once", "probed later"])
def test_points_that_wait_for_their_probe_have_the_perturbation_of_their_step(data):
    waits, ready = monitor(probe=Probe(first_batches=3)), monitor(name="ready")
    sharpened([waits, ready], Quadratic(), data, rho=lambda step, lr: 0.01 * (step + 1))
    for late, prompt in zip(waits.history, ready.history, strict=True):
        assert (late.step, late.scalars.get(KEY)) == (
            prompt.step,
            pytest.approx(prompt.scalars["hessian_ready/sam_oscillation"], rel=1e-4) if late.step else None,
        )


@pytest.mark.ddp
@pytest.mark.parametrize(("perturbation", "has_one"), [("global", True), ("per_rank", False)])
def test_on_two_ranks_only_a_global_perturbation_has_one_gradient(tmp_path, perturbation, has_one):
    measured = monitor()
    options = {"start_method": "fork", "timeout": timedelta(seconds=60)}
    strategy = DDPSAMStrategy(rho=0.05, perturbation=perturbation, **options)
    logger = CSVLogger(tmp_path, name="", version="")
    sharpened(measured, Quadratic(), mini_batches(n=16, batch_size=4), strategy=strategy, devices=2, logger=logger)
    assert [KEY in record.scalars for record in measured.history[1:]] == [has_one] * (len(measured.history) - 1)


class Classes(Regression):
    """A loss whose curvature changes."""

    def __init__(self):
        torch.manual_seed(2)
        super().__init__(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), lr=0.05)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), (batch[1] > 0).long().squeeze(1))


def test_all_monitors_measure_at_w():
    """On the whole set, which is the step's own batch, they find the losses at w that the strategy tells of."""

    class Tells(Callback):
        def __init__(self):
            self.losses, self.gaps, self.norms = [], [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            step = trainer.strategy.last_step
            self.losses.append(float(step.loss))
            self.gaps.append(step.sharpness_gap)
            self.norms.append(step.gradient_norm)

    often = {"every_n_train_steps": 1}
    drawn = {"probe": Probe(draws=4, batch_size=24), **often}
    monitors = [
        HessianMonitor(1, 0, probe=WHOLE, pair=False, spectrum=False, **often),
        HessianMonitor(1, 0, probe=Probe(current_batch=True), pair=False, spectrum=False, name="current", **often),
        DisplacementMonitor(probe=WHOLE, probe_every_n_train_steps=1, memory="device", **often),
        StochasticSharpnessMonitor(eigenvalues=False, **drawn),
        GradientNoiseMonitor(directions=0, samples=False, **drawn),
    ]
    tells = Tells()
    sharpened([*monitors, tells], Classes(), rho=0.5, max_epochs=4)
    assert min(tells.gaps) > 0.02

    def series(number, key):
        return [record.scalars[key] for record in monitors[number].history]

    for number, key in enumerate(("hessian/probe_loss", "hessian_current/probe_loss", "displacement/probe_loss")):
        assert series(number, key)[:4] == pytest.approx(tells.losses, rel=1e-5), key
    assert series(3, "sharpness/loss")[:4] == pytest.approx(tells.losses, rel=1e-5)
    assert series(0, "hessian/gradient_norm")[:4] == pytest.approx(tells.norms, rel=1e-5)
    assert [value**0.5 for value in series(4, "noise/squared_gradient_norm")][:4] == pytest.approx(
        tells.norms, rel=1e-4
    )
    changes = [after - before for before, after in zip(tells.losses, tells.losses[1:], strict=False)]
    realized = [r.scalars["sharpness/realized_change"] for r in monitors[3].history[:3]]
    assert realized == pytest.approx(changes, rel=1e-3)
