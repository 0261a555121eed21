"""When a noisy loss counts as settled."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dynamics.metrics import Settling


def after(values):
    settling = Settling()
    for value in values:
        settling.add(torch.tensor(float(value)))
    return settling.trend()


def test_a_short_series_says_nothing():
    assert after(range(199)) is None


def test_a_loss_that_falls_has_not_settled():
    trend = after(3 - 0.001 * t for t in range(1_000))
    assert not trend.settled
    assert trend.change == pytest.approx(-0.25, rel=0.02)


def test_a_loss_that_fell_and_stays_has_settled():
    draw = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(4_000, generator=draw)
    trend = after(2 * math.exp(-t / 100) + 0.5 + float(noise[t]) for t in range(4_000))
    assert trend.settled
    assert trend.level == pytest.approx(0.5, abs=0.01)
    assert abs(trend.change) < 3 * trend.error
    assert trend.descent == pytest.approx(1.5, abs=0.5)


def test_noise_that_hides_the_descent_does_not_make_it_settled():
    draw = torch.Generator().manual_seed(0)
    noise = 5 * torch.randn(1_000, generator=draw)
    assert not after(1 + float(noise[t]) for t in range(1_000)).settled


def test_a_loss_that_rises_again_has_settled_only_if_it_had_come_down():
    assert not after(1 + 0.01 * t for t in range(1_000)).settled
    assert after(10 * math.exp(-t / 50) + 1e-4 * t for t in range(1_000)).settled


def test_the_error_covers_the_change_of_white_noise():
    inside = 0
    for seed in range(60):
        values = torch.randn(500, generator=torch.Generator().manual_seed(seed))
        trend = after(values.tolist())
        inside += abs(trend.change) < 2 * trend.error
    assert inside >= 52


def test_numbers_that_are_not_finite_do_not_count():
    falling = [3 - 0.001 * t for t in range(1_000)]
    with_gaps = [value for t, value in enumerate(falling) for value in ([math.nan, value] if t % 7 == 0 else [value])]
    assert after(with_gaps) == after(falling)
    assert after([math.inf] * 500) is None


def test_a_long_series_is_kept_in_few_means():
    settling = Settling()
    for t in range(5_000):
        settling.add(torch.tensor(float(t)))
    state = settling.state_dict()
    assert len(state["means"]) < 256
    assert state["stretch"] == 32
    assert settling.trend().level == pytest.approx(4_992 - 39 * 16, abs=100)


def test_its_state_goes_on_in_another():
    one, other = Settling(), Settling()
    for t in range(777):
        one.add(torch.tensor(math.sin(t)))
    other.load_state_dict(one.state_dict())
    for t in range(777, 2_000):
        one.add(torch.tensor(math.sin(t)))
        other.add(torch.tensor(math.sin(t)))
    assert one.trend() == other.trend()
