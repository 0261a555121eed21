"""Against the authors' own code for the edge of stochastic stability, on the same network, weights and data.

Written against commit f12be5c of March 2026 of arseniqum/edge-of-stochastic-stability, whose folder ``utils`` has to be
importable, with einops 0.8. It draws batches of its own from the clock; both sides are estimates.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.fit import fit
from helpers.modules import Regression
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import Probe, StochasticSharpnessMonitor

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
measure = pytest.importorskip("utils.measure", reason="needs the authors' repository on the path")

B, DRAWS, THEIRS = 16, 256, 256


def half_squared(outputs, targets):
    return (outputs - targets).square().sum(1).mean() / 2


class Problem:
    """A tanh network on digits, some way into training; our numbers at its weights."""

    def __init__(self):
        torch.manual_seed(0)
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels[:512] / 16, dtype=torch.float32)
        self.x = (x - x.mean(0)) / (x - x.mean(0)).std()
        self.y = F.one_hot(torch.tensor(labels[:512]), 10).float()
        net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10))
        self.module = Regression(net, lr=0.0)
        optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.5)
        for _ in range(400):
            chosen = torch.randperm(512)[:B]
            optimizer.zero_grad()
            half_squared(net(self.x[chosen]), self.y[chosen]).backward()
            optimizer.step()
        self.net, self.optimizer = copy.deepcopy(net), optimizer
        monitor = StochasticSharpnessMonitor(
            every_n_train_steps=1,
            eigenvalues_every_n_train_steps=1,
            solved=64,
            step=False,
            probe=Probe(draws=DRAWS, batch_size=B),
        )
        data = DataLoader(TensorDataset(self.x, self.y), batch_size=B)
        fit(monitor, self.module, data, max_steps=1, max_epochs=-1)
        self.record = monitor.history[0]

    def ours(self, key):
        return self.record.scalars[f"sharpness/{key}"], self.record.errors[f"sharpness/{key}"]


@pytest.fixture(scope="module")
def problem():
    return Problem()


def assert_agree(ours, theirs, draws):
    """Within 3.5 combined errors; theirs is that of as many draws of the same spread."""
    value, error = ours
    combined = error * math.sqrt(1 + DRAWS / draws)
    print(f"ours {value:.4f} ± {error:.4f}, theirs {theirs:.4f}, {(theirs - value) / combined:+.2f} combined errors")
    assert abs(theirs - value) < 3.5 * combined
    assert error < 0.1 * value


def test_batch_sharpness_agrees_in_both_definitions(problem):
    options = {"n_estimates": THEIRS, "min_estimates": THEIRS, "eps": 1e-9}
    theirs = measure.calculate_averaged_grad_H_grad_step(problem.net, problem.x, problem.y, half_squared, B, **options)
    assert_agree(problem.ours("batch_sharpness"), float(theirs), THEIRS)
    inside = measure.calculate_averaged_grad_H_grad(
        problem.net, problem.x, problem.y, half_squared, B, expectation_inside=True, **options
    )
    assert_agree(problem.ours("batch_sharpness_of_means"), float(inside), THEIRS)


def test_the_sharpness_of_mini_batches_agrees(problem):
    theirs = measure.calculate_averaged_lambdamax(
        problem.net, problem.x, problem.y, half_squared, B, n_estimates=64, min_estimates=64, hessian_tolerance=1e-4
    )
    value, error = problem.ours("minibatch_top_1")
    mean = sum(theirs) / len(theirs)
    print(f"ours {value:.4f} ± {error:.4f}, theirs {mean:.4f}")
    assert abs(mean - value) < 3.5 * error * math.sqrt(2)


def test_the_interaction_of_gradient_and_noise_agrees(problem):
    """Theirs has the gradient and the Hessian of the whole set; ours estimates both from the draws."""
    theirs = measure.calculate_gni(problem.net, problem.x, problem.y, half_squared, B, n_estimates=500)
    assert_agree(problem.ours("gni"), float(theirs), 500)


def test_the_sharpness_of_the_whole_set_agrees(problem):
    """Of 256 draws of 16 from 512 samples together, which is that of the set to a few per cent."""
    loss = half_squared(problem.net(problem.x), problem.y)
    theirs = float(measure.compute_eigenvalues(loss, problem.net, max_iterations=200, reltol=1e-5))
    assert problem.ours("top_1")[0] == pytest.approx(theirs, rel=0.03)
