"""Displacements against what a loop over whole trajectories gives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_dynamics.metrics import Displacement, Projection


def path(steps=40, seed=0, dtype=torch.float64):
    """A trajectory of three parameters in two layers."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 7)}
    weights = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    for _ in range(steps + 1):
        yield {name: each.to(dtype).flatten() for name, each in weights.items()}
        weights = {n: w + 0.1 * torch.randn(w.shape, generator=draw, dtype=torch.float64) for n, w in weights.items()}


def follow(points, moved=None, since=0):
    moved = Displacement() if moved is None else moved
    for weights in points[since:]:
        moved.update(weights)
    return moved


def by_hand(points, since=0):
    """The definitions, literally, of all weights and of each layer; intervals from point ``since`` on."""
    found = {}
    for layer in ("", "a", "b"):
        flat = [torch.cat([w.double() for n, w in each.items() if n.startswith(layer)]) for each in points]
        steps = [now - before for before, now in itertools.pairwise(flat)]
        lengths = [float(step.norm()) for step in steps]
        start, end = flat[0], flat[-1]
        away = end - start
        recent = range(since, len(steps))
        cosines = [
            float(steps[i] @ steps[i - 1]) / (lengths[i] * lengths[i - 1]) for i in recent if i > 0 and lengths[i - 1]
        ]
        before = flat[-2] - start
        u, v = end / end.norm(), start / start.norm()
        step = math.sqrt(sum(lengths[i] ** 2 for i in recent) / len(recent))
        found[layer] = {
            "norm": float(end.norm()),
            "from_init": float(away.norm()),
            "relative": float(away.norm() / start.norm()),
            "angle": 2 * math.atan2(float((u - v).norm()), float((u + v).norm())),
            "path_length": sum(lengths),
            "straightness": float(away.norm()) / sum(lengths),
            "step": step,
            "update_ratio": step / float(end.norm()),
            "step_cosine": sum(cosines) / len(cosines),
            "start_cosine": float(steps[-1] @ before) / (lengths[-1] * float(before.norm())),
        }
    return found


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for layer, values in expected.items():
        assert found[layer].keys() == values.keys()
        for name, value in values.items():
            assert found[layer][name] == pytest.approx(value, **tolerance), (layer, name)


def test_every_number_is_what_its_definition_says():
    points = list(path())
    assert_same(follow(points).read(), by_hand(points), rel=1e-10)


def test_single_precision_keeps_five_digits():
    points = list(path(dtype=torch.float32))
    assert_same(follow(points).read(), by_hand(points), rel=1e-5, abs=1e-6)


def test_intervals_begin_anew_with_each_reading_and_the_path_does_not():
    points = list(path(60))
    moved = follow(points[:31])
    moved.read()
    for weights in points[31:]:
        moved.update(weights)
    assert_same(moved.read(), by_hand(points, since=30), rel=1e-10)


def test_many_steps_between_readings_are_all_counted():
    points = list(path(700))
    assert_same(follow(points).read(), by_hand(points), rel=1e-9)


def test_squares_of_layers_add_up_to_that_of_all():
    found = follow(list(path())).read()
    assert found["a"]["from_init"] ** 2 + found["b"]["from_init"] ** 2 == pytest.approx(found[""]["from_init"] ** 2)
    assert found["a"]["step"] ** 2 + found["b"]["step"] ** 2 == pytest.approx(found[""]["step"] ** 2)


def test_a_straight_line_is_straight():
    moved = Displacement()
    direction = torch.randn(50, dtype=torch.float64)
    for t in range(200):
        moved.update({"w": torch.ones(50, dtype=torch.float64) + t * direction})
    found = moved.read()[""]
    assert found["straightness"] == pytest.approx(1, abs=1e-12)
    assert found["step_cosine"] == pytest.approx(1, abs=1e-12)
    assert found["start_cosine"] == pytest.approx(1, abs=1e-12)


def test_lengths_scale_with_the_weights_and_ratios_do_not():
    points = list(path())
    small = follow(points).read()[""]
    large = follow([{n: 8 * w for n, w in each.items()} for each in points]).read()[""]
    lengths = {"norm", "from_init", "path_length", "step"}
    for name, value in small.items():
        assert large[name] == pytest.approx(value * (8 if name in lengths else 1))


def test_a_small_angle_is_not_lost_in_rounding():
    start = torch.randn(1_000, dtype=torch.float64)
    aside = torch.randn(1_000, dtype=torch.float64)
    aside -= (aside @ start) / (start @ start) * start
    moved = Displacement()
    moved.update({"w": start})
    moved.update({"w": start + 1e-9 * aside})
    assert moved.read()[""]["angle"] == pytest.approx(1e-9 * float(aside.norm() / start.norm()), rel=1e-5)


def test_what_is_not_defined_is_absent():
    moved = Displacement()
    moved.update({"b.bias": torch.zeros(3)})
    assert moved.read()[""] == {"norm": 0.0, "from_init": 0.0, "path_length": 0.0}
    moved.update({"b.bias": torch.ones(3)})
    found = moved.read()[""]
    assert "relative" not in found
    assert "angle" not in found
    assert "start_cosine" not in found
    assert "step_cosine" not in found


def test_steps_of_length_zero_have_no_cosine():
    moved = Displacement()
    for x in (0.0, 1.0, 1.0, 2.0, 4.0):
        moved.update({"w": torch.tensor([x, 3.0])})
    assert moved.read()[""]["step_cosine"] == pytest.approx(1)


def test_the_reference_is_another_point():
    points = list(path(30))
    moved = follow(points[:11])
    assert "from_reference" not in moved.read()[""]
    moved.anchor()
    follow(points, moved, since=11)
    flat = [torch.cat(list(each.values())) for each in points]
    assert moved.read()[""]["from_reference"] == pytest.approx(float((flat[-1] - flat[10]).norm()))
    assert moved.squared() == pytest.approx(float((flat[-1] - flat[10]).square().sum()))
    moved.anchor(points[3])
    assert moved.read()[""]["from_reference"] == pytest.approx(float((flat[-1] - flat[3]).norm()))


def test_what_was_set_and_not_stepped_to_is_not_part_of_the_path():
    points = list(path(10))
    moved = follow(points[:6])
    length = moved.read()[""]["path_length"]
    moved.update(points[10], is_step=False)
    found = moved.read()[""]
    assert found["path_length"] == length
    assert "step" not in found
    assert found["from_init"] == pytest.approx(by_hand(points)[""]["from_init"])


def test_a_parameter_that_appears_later_has_not_moved_before():
    points = list(path(20))
    moved = Displacement()
    for weights in points[:11]:
        moved.update({name: w for name, w in weights.items() if name != "b.weight"})
    for weights in points[10:]:
        moved.update(weights)
    expected = by_hand(points[10:])["b"]
    found = moved.read()
    assert found["b"]["path_length"] == pytest.approx(expected["path_length"])
    assert found["b"]["from_init"] == pytest.approx(expected["from_init"])
    assert found["a"]["from_init"] == pytest.approx(by_hand(points)["a"]["from_init"])


@pytest.mark.parametrize("change", ["gone", "reshaped"])
def test_all_begins_anew_where_a_parameter_is_another(change):
    points = list(path(20))
    moved = follow(points[:10])
    others = [dict(each) for each in points[10:]]
    for each in others:
        weight = each.pop("b.weight")
        if change == "reshaped":
            each["b.weight"] = weight[:14]
    said = [moved.update(each) for each in others]
    assert "`b.weight`" in said[0]
    assert not any(said[1:])
    assert moved.steps == len(others) - 1
    first, last = (torch.cat(list(each.values())) for each in (others[0], others[-1]))
    assert moved.read()[""]["from_init"] == pytest.approx(float((last - first).norm()))


def test_its_state_goes_on_in_another():
    points = list(path(300))
    whole = follow(points[:100])
    whole.read()
    whole.anchor()
    follow(points[:270], whole, since=100)
    other = Displacement()
    other.load_state_dict(whole.state_dict())
    for moved in (whole, other):
        follow(points, moved, since=270)
    assert other.read() == whole.read()
    assert other.energy == whole.energy
    assert other.squared() == whole.squared()


def test_the_state_survives_a_checkpoint(tmp_path):
    moved = follow(list(path(5)))
    torch.save(moved.state_dict(), tmp_path / "state.pt")
    other = Displacement()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.read() == moved.read()


def test_the_state_is_a_copy():
    points = list(path(10))
    moved = follow(points[:5])
    state = moved.state_dict()
    kept = {name: each.clone() for name, each in state["previous"].items()}
    follow(points, moved, since=5)
    assert all(torch.equal(state["previous"][name], each) for name, each in kept.items())


def test_on_the_host_it_is_the_same():
    points = list(path())
    assert_same(follow(points, Displacement(on_host=True)).read(), by_hand(points), rel=1e-10)


def test_projected_weights_give_the_same_within_their_error():
    draw = torch.Generator().manual_seed(3)
    project = Projection(4_096)
    exact, projected = Displacement(), Displacement()
    weight = torch.randn(60_000, generator=draw)
    for _ in range(30):
        exact.update({"w": weight})
        projected.update(project({"w": weight}))
        weight = weight + 0.01 * torch.randn(60_000, generator=draw)
    one, other = exact.read()[""], projected.read()[""]
    for name in ("norm", "from_init", "path_length", "step"):
        assert other[name] == pytest.approx(one[name], rel=4 * project.relative_error / 2)
    for name in ("step_cosine", "start_cosine"):
        assert other[name] == pytest.approx(one[name], abs=4 / math.sqrt(4_096))


def test_blocks_do_not_matter(monkeypatch):
    points = list(path())
    whole = follow(points).read()
    monkeypatch.setattr("lightning_dynamics.metrics.displacement._BLOCK", 4)
    assert_same(follow(points).read(), whole, rel=1e-10)
