"""What is kept of a trajectory: enough of it, and not too much."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dynamics.metrics import Trail


def walk(trail, steps, d=500, seed=0):
    """Follow a random walk; return all its positions."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.zeros(d)
    positions = [x]
    for lag in range(steps + 1):
        if lag:
            x = x + torch.randn(d, generator=draw)
            positions.append(x)
        if trail.wants_snapshot(lag):
            trail.add_snapshot(lag, {"a": x[:100], "b": x[100:]})
        if trail.wants_square(lag):
            trail.add_square(lag, float(x.square().sum()), d)
    return torch.stack(positions)


def test_squares_are_kept_at_twenty_lags_per_decade():
    trail = Trail()
    kept = [lag for lag in range(100_001) if trail.wants_square(lag)]
    assert kept[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert sum(1_000 < lag <= 10_000 for lag in kept) == sum(10_000 < lag <= 100_000 for lag in kept) == 20


def test_snapshots_are_evenly_spaced_and_never_more_than_256():
    trail = Trail(dimensions=16)
    walk(trail, 1_500)
    even = trail.evenly()
    assert trail.stride == 8
    assert len(even) == 1 + 1_500 // 8
    lags, snapshots = trail.all()
    rows = {int(lag): row for lag, row in zip(lags, snapshots, strict=True)}
    assert all(torch.equal(rows[8 * i], row) for i, row in enumerate(even))
    assert {1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 100, 158, 251, 398, 631, 1000} <= set(rows)
    assert len(rows) < 300


def test_distances_between_snapshots_have_the_stated_error():
    errors = []
    for seed in range(30):
        trail = Trail(dimensions=128, seed=seed)
        positions = walk(trail, 60, seed=seed)
        lags, snapshots = trail.all()
        squares = (snapshots[-1] - snapshots[10]).square().sum()
        exact = (positions[lags[-1]] - positions[lags[10]]).square().sum()
        errors.append(float(squares / exact) - 1)
    found = torch.tensor(errors)
    assert abs(float(found.mean())) < 3 * math.sqrt(2 / 128 / 30)
    assert float(found.std()) == pytest.approx(math.sqrt(2 / 128), rel=0.4)


@pytest.mark.parametrize("d", [3, 2_000, 100_000])
def test_snapshots_of_any_network_have_the_same_length(d):
    trail = Trail(dimensions=64)
    trail.add_snapshot(0, {"w": torch.ones(d)})
    trail.add_snapshot(1, {"w": 3 * torch.ones(d)})
    rows = trail.evenly()
    assert rows.shape == (2, 64)
    assert float((rows[1] - rows[0]).square().sum()) == pytest.approx(4 * d, rel=1e-6 if d < 64 else 0.8)
    assert trail.projected_from == (None if d < 64 else d)


def test_a_trail_without_snapshots_keeps_none():
    trail = Trail(0)
    assert not trail.wants_snapshot(0)
    assert not trail.wants_snapshot(64)


def test_its_state_goes_on_in_another(tmp_path):
    trail = Trail(dimensions=16)
    walk(trail, 700)
    torch.save(trail.state_dict(), tmp_path / "state.pt")
    other = Trail(dimensions=16)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.lags, other.squares, other.steps) == (trail.lags, trail.squares, trail.steps)
    assert torch.equal(other.evenly(), trail.evenly())
    assert other.stride == trail.stride == 4
    assert not other.wants_snapshot(702)
    assert other.wants_snapshot(704)
