"""What a measurement costs, counted: products, gradients, and the default cadence that follows."""

from __future__ import annotations

import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Regression
from torch import nn

from lightning_dynamics import GradientNoiseMonitor, HessianMonitor, Probe, Spectrum, StochasticSharpnessMonitor
from lightning_dynamics.objective.loss import Linearization, Objective

GRADIENTS_PER_PRODUCT = 2.3
BUDGET = 0.15


@pytest.fixture
def counted(monkeypatch):
    """Products, and evaluations of the loss, of everything that is measured."""
    counts = {"products": 0, "losses": 0}
    product, evaluate = Linearization.product, Objective._evaluate

    def counting_product(self, *arguments):
        counts["products"] += 1
        return product(self, *arguments)

    def counting_evaluate(self, *arguments):
        counts["losses"] += 1
        return evaluate(self, *arguments)

    monkeypatch.setattr(Linearization, "product", counting_product)
    monkeypatch.setattr(Objective, "_evaluate", counting_evaluate)
    return counts


def network():
    torch.manual_seed(0)
    return Regression(nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1)), lr=1e-3)


def test_by_default_monitors_cost_what_is_promised(counted):
    """The promise is in gradients on the probe: 15 % of those that training computes, in the long run."""
    monitor = HessianMonitor(probe=Probe(size=24), engine="kept")
    trainer = fit(monitor, network(), full_batch(), max_epochs=3000)
    spent = counted["products"] * GRADIENTS_PER_PRODUCT + counted["losses"] * 3
    assert len(monitor.history) >= 5
    assert spent <= BUDGET * trainer.global_step


def test_kept_graphs_need_one_evaluation_of_each_batch(counted):
    monitor = HessianMonitor(every_n_train_steps=1, probe=Probe(whole=True), pair=False, engine="kept")
    fit(monitor, network(), mini_batches(24, 8), max_epochs=1)
    points, batches = 4, 3
    audit = batches  # in double precision, at the first point
    assert counted["losses"] == 1 + points * batches + audit  # one for the preflight


def test_two_monitors_on_the_same_data_share_the_graph(counted):
    monitors = [
        HessianMonitor(1, 0, every_n_train_steps=1, probe=Probe(whole=True), pair=False, engine="kept", name=name)
        for name in ("a", "b")
    ]
    fit(monitors, network(), mini_batches(24, 8), max_epochs=1)
    assert counted["losses"] == 1 + 4 * 3 + 3


EVERYTHING = {"spectrum": Spectrum(3, num_vectors=2, num_steps=3, per_layer=True, diagonal=2), "sharpening_rate": True}


@pytest.mark.parametrize(("pair", "options"), [(True, {}), (False, {}), (True, EVERYTHING)])
def test_the_notes_say_how_many_products_a_point_took(counted, pair, options):
    monitor = HessianMonitor(2, 1, every_n_train_steps=3, probe=Probe(whole=True), pair=pair, **options)
    fit(monitor, network(), mini_batches(24, 24), max_epochs=5)
    preflight = 2
    assert counted["products"] == preflight + sum(r.notes["products"] for r in monitor.history)


def test_seconds_stand_with_every_point_and_their_share_in_the_loggers(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    monitor = HessianMonitor(1, 0, every_n_train_steps=2, probe=Probe(whole=True))
    fit(monitor, network(), mini_batches(24, 24), max_epochs=9, logger=CSVLogger(tmp_path, name="", version=""))
    assert all(0 < record.seconds < 10 for record in monitor.history)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    share = float(lines[-1].split(",")[lines[0].split(",").index("dynamics/overhead")])
    assert 0 < share < 1


def test_between_points_nothing_is_computed(counted):
    monitor = HessianMonitor(1, 0, every_n_train_steps=1000, probe=Probe(whole=True), pair=False)
    fit(monitor, network(), mini_batches(24, 24), max_epochs=50)
    one_point_each_end = counted["losses"]
    fit(HessianMonitor(1, 0, every_n_train_steps=1000, probe=Probe(whole=True), pair=False), network(), max_epochs=100)
    assert counted["losses"] == 2 * one_point_each_end


def test_mini_batches_cost_what_is_promised(monkeypatch):
    """In gradients on all of them: a product 2.3, a gradient with graph 1.3, a loss 0.4."""
    spent = {"products": 0, "gradients": 0, "losses": 0}
    images, gradient, after = Linearization.summed_images, Linearization._gradient, Linearization.loss_after

    def counting_images(self, *arguments):
        spent["products"] += 1
        return images(self, *arguments)

    def counting_gradient(self, *arguments, **options):
        spent["gradients"] += 1
        return gradient(self, *arguments, **options)

    def counting_after(self, *arguments):
        spent["losses"] += 1
        return after(self, *arguments)

    monkeypatch.setattr(Linearization, "summed_images", counting_images)
    monkeypatch.setattr(Linearization, "_gradient", counting_gradient)
    monkeypatch.setattr(Linearization, "loss_after", counting_after)
    draws = {"probe": Probe(draws=8), "every_n_train_steps": 1}
    for monitor in (
        StochasticSharpnessMonitor(eigenvalues=False, **draws),
        GradientNoiseMonitor(samples=False, directions=0, **draws),
    ):
        spent.update(dict.fromkeys(spent, 0))
        fit(monitor, network(), mini_batches(24, 8), max_epochs=1)
        points = len(monitor.history)
        assert points == 4
        spread = spent["products"] * GRADIENTS_PER_PRODUCT + spent["losses"] * 0.4
        spread += spent["gradients"] * (1.3 if spent["products"] else 1.0)
        promised = monitor.gradients_per_point(network())
        assert spread / (8 * points) == pytest.approx(promised, rel=0.25)
