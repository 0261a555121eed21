"""Phase space: conventions against torch.optim.SGD, numbers and their errors against simulated quadratics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.operators import generator

from lightning_dynamics.metrics.langevin import HeavyBall
from lightning_dynamics.metrics.phase_space import phase_space

F64 = torch.float64


def descend(curvatures, lrs, momentum, *, start=0.0, noise=0.0, weight_decay=0.0):
    """Positions before and after every step of torch.optim.SGD, shape ``(T + 1, k)``, and its buffers, ``(T, k)``."""
    weights = torch.nn.Parameter(torch.full((len(curvatures),), start, dtype=F64))
    optimizer = torch.optim.SGD([weights], lr=1.0, momentum=momentum, weight_decay=weight_decay)
    draw, positions, buffers = generator(1), [weights.detach().clone()], []
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        push = noise * torch.randn(len(curvatures), generator=draw, dtype=F64)
        optimizer.zero_grad()
        (curvatures @ weights.square() / 2 + push @ weights).backward()
        optimizer.step()
        positions.append(weights.detach().clone())
        buffers.append(optimizer.state[weights]["momentum_buffer"].clone())
    return torch.stack(positions), torch.stack(buffers)


def simulate(dynamics, h, steps, chains, seed=0):
    """Positions of independent stationary chains, shape ``(steps, chains)``; epochs begin anywhere in them."""
    rng = np.random.default_rng(seed)
    k = dynamics.batches or 1
    residuals = rng.normal(size=k)
    residuals = (residuals - residuals.mean()) / max(residuals.std(), 1e-9)
    warm_up = k * math.ceil(-8 / math.log(float(dynamics.radius(h))) / k) + k // 3
    q, p, found = np.zeros(chains), np.zeros(chains), np.empty((steps, chains))
    for t in range(warm_up + steps):
        if dynamics.order == "with_replacement":
            noise = rng.normal(size=chains)
        else:
            if t % k == 0:
                order = np.argsort(rng.random((k, chains)), axis=0)
            noise = residuals[order[t % k]]
        p = dynamics.momentum * p - h * q - noise
        q = q + dynamics.lr * p
        if t >= warm_up:
            found[t - warm_up] = q
    return torch.tensor(found)


def test_velocities_are_minus_the_buffers_that_made_the_step():
    """At learning rates that change: row t of the velocities is of the step that ended at row t of the positions."""
    lrs = [0.1 * (1 + t % 7) for t in range(150)]
    curvatures = torch.tensor([0.5, 0.05], dtype=F64)
    positions, buffers = descend(curvatures, lrs, 0.8, start=1.0, noise=0.3)
    found = phase_space(positions, torch.tensor([math.nan, *lrs]), curvatures)
    torch.testing.assert_close(found.velocities, -buffers)
    torch.testing.assert_close(found.positions, positions[1:])
    assert found.rows == (1, 151)


def test_without_noise_curvature_and_momentum_are_found_exactly_even_under_a_schedule():
    lrs = torch.linspace(0.2, 0.1, 120, dtype=F64)
    curvatures = torch.tensor([1.0, 0.3], dtype=F64)
    positions, _ = descend(curvatures, lrs.tolist(), 0.95, start=1.0, weight_decay=0.01)
    found = phase_space(positions, torch.cat([lrs[:1], lrs]), curvatures + 0.01)
    for mode, h in zip(found.modes, (1.01, 0.31), strict=True):
        assert mode.curvature.value == pytest.approx(h, rel=1e-9)
        assert mode.momentum.value == pytest.approx(0.95, rel=1e-9)
        assert mode.radius.value == pytest.approx(math.sqrt(0.95), rel=1e-9)
        assert mode.curvature.error < 1e-9
        assert math.isnan(mode.curvature.predicted)
    assert found.remarks == ("the learning rate changes from 0.2 to 0.1 in the window",)


@pytest.mark.parametrize("h", [0.05, 2.0, 20.0])
def test_a_mode_without_noise_turns_by_the_predicted_angle(h):
    dynamics = HeavyBall(0.1, 0.9)
    positions, _ = descend(torch.tensor([h], dtype=F64), [0.1] * 120, 0.9, start=1.0)
    (mode,) = phase_space(positions, 0.1, torch.tensor([h]), dynamics).modes
    assert mode.frequency.value == pytest.approx(float(dynamics.frequency(h)), rel=1e-6)
    assert mode.frequency.predicted == pytest.approx(float(dynamics.frequency(h)))
    assert mode.radius.value == pytest.approx(math.sqrt(0.9), rel=1e-6)


SMOOTH = ("curvature", "momentum", "equipartition", "current", "mean_frequency")


def shares_covered(found):
    """Of each number, how often two errors cover its prediction; angle and radius count where they are decided."""
    decided = np.array([not any("oscillates" in remark for remark in mode.remarks) for mode in found.modes])
    shares = {}
    for name in (*SMOOTH, "frequency", "radius", "peak"):
        value, error, predicted = np.array(
            [[m.value, m.error, m.predicted] for m in (getattr(mode, name) for mode in found.modes)]
        ).T
        covered = np.abs(value - predicted) <= 2 * error
        shares[name] = float((covered | ~decided).mean() if name in ("frequency", "radius") else covered.mean())
        if name in SMOOTH:  # neither may the errors be too large
            assert error.mean() < 1.5 * value.std(), name
    return shares


@pytest.mark.parametrize(
    ("order", "k", "beta", "step", "steps"),
    [
        ("with_replacement", None, 0.0, 0.05, 1200),
        ("with_replacement", None, 0.0, 1.5, 600),
        ("with_replacement", None, 0.5, 0.02, 1500),
        ("with_replacement", None, 0.9, 0.03, 1100),
        ("with_replacement", None, 0.9, 1.5, 1100),
        ("reshuffled", 20, 0.0, 0.005, 1000),
        ("reshuffled", 20, 0.5, 0.005, 1000),
        ("reshuffled", 20, 0.5, 0.6, 600),
        ("reshuffled", 20, 0.9, 0.3, 1000),
        ("reshuffled", 100, 0.9, 0.02, 1500),
    ],
)
def test_two_errors_cover_the_prediction(order, k, beta, step, steps):
    dynamics = HeavyBall(0.1, beta, order, k)
    q = simulate(dynamics, step / 0.1, steps, 300, seed=int(100 * step) + steps)
    found = phase_space(q, 0.1, torch.full((300,), step / 0.1), dynamics)
    assert found.remarks == ()
    for name, share in shares_covered(found).items():
        assert share >= 0.86, (name, share)


def test_the_jackknife_takes_bias_off():
    """At 50 relaxation times, in units of the scatter: 0.4 without it, 0.14 with it."""
    dynamics = HeavyBall(0.1, 0.5)
    q = simulate(dynamics, 0.3, 800, 800)
    modes = phase_space(q, 0.1, torch.full((800,), 0.3), dynamics).modes
    for name in ("curvature", "equipartition", "current"):
        values = np.array([getattr(mode, name).value for mode in modes])
        assert abs(values.mean() - getattr(modes[0], name).predicted) < 0.27 * values.std(), name


def test_white_noise_is_the_wrong_theory_for_reshuffled_batches():
    """η = 0.1, β = 0.5, k = 20, h = 0.05: Var p/Var q is 16 times what equipartition says."""
    right = HeavyBall(0.1, 0.5, "reshuffled", 20)
    q = simulate(right, 0.05, 4000, 4)
    h = torch.full((4,), 0.05)
    found, wrong = (phase_space(q, 0.1, h, dynamics).modes for dynamics in (right, HeavyBall(0.1, 0.5)))
    for good, bad in zip(found, wrong, strict=True):
        ratio = bad.equipartition
        assert ratio.value / ratio.predicted == pytest.approx(16.4, rel=0.25)
        assert abs(ratio.value - ratio.predicted) > 10 * ratio.error
        assert abs(bad.current.value - bad.current.predicted) > 10 * bad.current.error
        assert abs(bad.curvature.value - bad.curvature.predicted) > 10 * bad.curvature.error
        for name in SMOOTH:
            each = getattr(good, name)
            assert abs(each.value - each.predicted) < 3.5 * each.error, name


def test_the_periodogram_finds_a_tone_and_white_noise_has_its_mean_in_the_middle():
    time = torch.arange(1000, dtype=F64)
    tone = torch.sin(0.7 * time) + 0.01 * time
    noise = torch.randn(1000, generator=generator(3), dtype=F64)
    modes = phase_space(torch.stack([tone, noise], dim=1), 1.0, torch.ones(2)).modes
    assert modes[0].peak.value == pytest.approx(0.7, abs=math.pi / 1000)
    assert modes[0].mean_frequency.value == pytest.approx(0.7, abs=0.02)
    assert modes[0].peak.error >= 2 * math.pi / 1000
    assert abs(modes[1].mean_frequency.value - math.pi / 2) < 3 * modes[1].mean_frequency.error < 0.2


def test_every_stationary_mode_turns_clockwise():
    dynamics = HeavyBall(0.1, 0.9)
    q = simulate(dynamics, 1.0, 2000, 3)
    assert [mode.rotation for mode in phase_space(q, 0.1, torch.ones(3)).modes] == [-1] * 3
    (mode, *_) = phase_space(-q + 5, 0.1, torch.ones(3)).modes
    assert mode.rotation == -1
    for value, sign in ((0.3, 1), (0.1, 0), (-0.1, 0), (-0.3, -1)):
        assert replace(mode, current=replace(mode.current, value=value, error=0.1)).rotation == sign


def test_numbers_do_not_depend_on_where_the_minimum_lies_or_on_units():
    dynamics = HeavyBall(0.1, 0.5)
    q = simulate(dynamics, 1.0, 1000, 1)
    one = phase_space(q, 0.1, torch.ones(1), dynamics).modes[0]
    other = phase_space(1e3 + 1e-4 * q, 0.1, torch.ones(1), dynamics).modes[0]
    for name in (*SMOOTH, "frequency", "radius", "peak"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, rel=1e-5)
        assert getattr(one, name).error == pytest.approx(getattr(other, name).error, rel=1e-4)


def remarks(q, h=1.0, dynamics=None, lr=0.1):
    found = phase_space(q, lr, torch.tensor([h]), dynamics)
    return " | ".join([*found.remarks, *found.modes[0].remarks])


def test_a_window_that_shows_what_it_should_has_no_remark():
    dynamics = HeavyBall(0.1, 0.9)
    assert remarks(simulate(dynamics, 1.0, 2000, 1), 1.0, dynamics) == ""


def test_a_short_window_is_told():
    dynamics = HeavyBall(0.1, 0.5)
    q = simulate(dynamics, 0.01, 1000, 1)
    assert "only 2 relaxation times long" in remarks(q, 0.01, dynamics)
    assert "relaxation times long" in remarks(q, 0.01)  # by its own fit
    assert "relaxation times long" in remarks(q, 3.0, dynamics)  # which may be slower than the prediction
    assert "only 2 relaxation times long" in remarks(torch.randn(1000, 1, generator=generator()), 0.01, dynamics)
    epochs = HeavyBall(0.1, 0.5, "reshuffled", 400)
    assert "only 2.5 epochs" in remarks(simulate(epochs, 3.0, 1000, 1), 3.0, epochs)


def test_a_drift_is_told():
    dynamics = HeavyBall(0.1, 0.5)
    q = simulate(dynamics, 1.0, 1000, 1)
    assert "a linear trend makes up" in remarks(q + 0.01 * torch.arange(1000)[:, None], 1.0, dynamics)
    assert "drift" in remarks(torch.arange(300, dtype=F64)[:, None])


def test_a_mode_that_stands_still_is_told_and_has_no_numbers():
    found = phase_space(torch.ones(200, 1), 0.1, torch.ones(1), HeavyBall(0.1, 0.5))
    assert found.modes[0].remarks == ("it does not move",)
    assert math.isnan(found.modes[0].equipartition.value)
    assert math.isnan(found.modes[0].peak.value)
    assert found.modes[0].rotation == 0


def test_a_mode_near_critical_damping_is_told():
    dynamics = HeavyBall(0.1, 0.9)
    h = 10 * (1 - math.sqrt(0.9)) ** 2
    assert "not decided" in remarks(simulate(dynamics, h, 4000, 1), h, dynamics)
    assert "not decided" not in remarks(simulate(dynamics, 5.0, 4000, 1), 5.0, dynamics)


@pytest.mark.parametrize("h", [-0.1, 0.0, 30.0])
def test_a_curvature_without_a_stationary_regime_is_told(h):
    q = simulate(HeavyBall(0.1, 0.5), 1.0, 1000, 1)
    assert "has no stationary regime: it must lie between 0 and 30" in remarks(q, h, HeavyBall(0.1, 0.5))
    assert "stationary regime" not in remarks(q, h)


def test_a_prediction_for_another_learning_rate_is_told():
    q = simulate(HeavyBall(0.1, 0.5), 1.0, 1000, 1)
    assert "for a learning rate of 0.2, the mean is 0.1" in remarks(q, 1.0, HeavyBall(0.2, 0.5))
    assert "learning rate" not in remarks(q, 1.0, HeavyBall(0.1, 0.5))


def test_without_an_optimizer_nothing_is_predicted():
    (mode,) = phase_space(simulate(HeavyBall(0.1, 0.5), 1.0, 1000, 1), 0.1, torch.ones(1)).modes
    for name in (*SMOOTH, "frequency", "radius", "peak"):
        assert math.isnan(getattr(mode, name).predicted)
        assert math.isfinite(getattr(mode, name).value)


def test_the_longest_stretch_between_gaps_is_analysed():
    q = simulate(HeavyBall(0.1, 0.5), 1.0, 1000, 2)
    rates = torch.linspace(0.1, 0.2, 1000, dtype=F64)
    holed = q.clone()
    holed[3, 0], holed[300, 1], holed[-5:] = math.nan, math.inf, math.nan
    found = phase_space(holed, rates, torch.ones(2))
    alone = phase_space(q[301:995], rates[301:995], torch.ones(2))
    assert repr(found.modes) == repr(alone.modes)  # NaN does not equal itself
    assert found.rows == (302, 995)
    torch.testing.assert_close(found.positions, q[302:995])
    assert found.remarks[0] == "rows 301 to 994 of 1000 are analysed, the longest stretch without a gap"


@pytest.mark.parametrize(
    ("q", "lr", "h", "message"),
    [
        (torch.ones(200), 0.1, torch.ones(1), "of shape"),
        (torch.ones(200, 2), 0.1, torch.ones(1), "need k `curvatures`"),
        (torch.ones(200, 1), torch.ones(199), torch.ones(1), "one for each of 200 rows"),
        (torch.ones(99, 1), 0.1, torch.ones(1), "At least 100 .* has 99"),
        (torch.full((200, 1), math.nan), 0.1, torch.ones(1), "has 0"),
        (torch.ones(200, 1), 0.0, torch.ones(1), "must be positive"),
        (torch.ones(200, 1), torch.linspace(1, 0, 200), torch.ones(1), "must be positive"),
    ],
)
def test_what_is_no_window_is_refused(q, lr, h, message):
    with pytest.raises(ValueError, match=message):
        phase_space(q, lr, h)
