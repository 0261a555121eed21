"""A random projection that keeps lengths and angles, whoever holds the weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_dynamics.metrics import Projection, Shard


def squared(vectors):
    return sum(float(each.double().square().sum()) for each in vectors.values())


def test_parameters_that_are_small_stay_as_they_are():
    weight = torch.randn(4, 5)
    assert torch.equal(Projection(size=20)({"w": weight})["w"], weight.flatten())


def test_large_parameters_become_vectors_of_the_size_asked_for():
    projected = Projection(size=64)({"w": torch.randn(30, 40), "b": torch.randn(7)})
    assert {name: tuple(each.shape) for name, each in projected.items()} == {"w": (64,), "b": (7,)}


def test_the_squared_length_is_right_on_average_with_the_stated_error():
    vector = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    exact = float(vector.double().square().sum())
    ratios = torch.tensor([squared(Projection(256, seed)({"w": vector})) / exact for seed in range(200)])
    stated = Projection(256).relative_error
    assert stated == pytest.approx(math.sqrt(2 / 256))
    assert abs(float(ratios.mean()) - 1) < 3 * stated / math.sqrt(200)
    assert float(ratios.std()) == pytest.approx(stated, rel=0.15)


@pytest.mark.parametrize("kind", ["constant", "rank one", "rows alike", "one column"])
def test_structure_in_the_weights_does_not_spoil_it(kind):
    """Signs that repeat, or are shared by rows or columns, fail here by factors."""
    draw = torch.Generator().manual_seed(1)
    matrix = {
        "constant": torch.ones(128, 256),
        "rank one": torch.rand(128, 1, generator=draw) * torch.rand(1, 256, generator=draw),
        "rows alike": torch.randn(1, 256, generator=draw).expand(128, 256),
        "one column": torch.zeros(128, 256).index_fill_(1, torch.tensor([3]), 1.0),
    }[kind]
    exact = float(matrix.double().square().sum())
    ratios = torch.tensor([squared(Projection(251, seed)({"w": matrix})) / exact for seed in range(200)])
    assert abs(float(ratios.mean()) - 1) < 3 * math.sqrt(2 / 251 / 200)
    assert float(ratios.std()) < 1.3 * Projection(251).relative_error


def test_inner_products_are_right_on_average():
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 9_000, generator=draw)
    y = y + 0.5 * x
    found = []
    for seed in range(200):
        project = Projection(128, seed)
        rx = project({"w": x})["w"].clone()
        found.append(float(rx @ project({"w": y})["w"]))
    error = float(x.norm() * y.norm()) * math.sqrt(2 / 128 / 200)
    assert abs(sum(found) / 200 - float(x @ y)) < 3 * error


def test_it_is_linear():
    project = Projection(64)
    x, y = torch.randn(2, 1_000, dtype=torch.float64)
    rx, ry = (project({"w": each})["w"].clone() for each in (x, y))
    assert torch.allclose(project({"w": 2 * x - 3 * y})["w"], 2 * rx - 3 * ry)


def test_it_depends_on_seed_and_name_only():
    x = torch.randn(1_000)
    first = Projection(64, 5)({"w": x})["w"]
    assert torch.equal(first, Projection(64, 5)({"other": torch.randn(500), "w": x.view(10, 100)})["w"])
    assert not torch.equal(first, Projection(64, 6)({"w": x})["w"])
    assert not torch.equal(first, Projection(64, 5)({"v": x})["v"])


@pytest.mark.parametrize("cuts", [[0, 333, 1000], [0, 10, 64, 128, 1000], [0, 1000], [0, 0, 1000]])
@pytest.mark.parametrize("size", [64, 2_000])
def test_parts_add_up_to_the_whole(cuts, size):
    x = torch.randn(1_000, dtype=torch.float64)
    whole = Projection(size)({"w": x})["w"]
    parts = [Projection(size)({"w": x[a:b]}, {"w": Shard(1_000, a)})["w"] for a, b in itertools.pairwise(cuts)]
    assert torch.allclose(sum(parts), whole, atol=1e-12)


def test_what_every_process_holds_counts_once():
    x = torch.randn(1_000, dtype=torch.float64)
    for size in (64, 2_000):
        own = Projection(size)({"w": x}, {"w": Shard(1_000, 0, replicas=4)})["w"]
        assert torch.allclose(4 * own, Projection(size)({"w": x})["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    x = torch.randn(3_000).to(dtype)
    projected = Projection(64)({"w": x, "b": x[:10]})
    assert projected["w"].dtype == projected["b"].dtype == torch.float32
    assert torch.allclose(projected["w"], Projection(64)({"w": x.float()})["w"])


def test_complex_and_permuted_weights_keep_their_length():
    weight = torch.randn(40, 50, dtype=torch.complex64)
    channels_last = torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last)
    for x in (weight, channels_last):
        assert squared(Projection(None)({"w": x})) == pytest.approx(float(x.abs().double().square().sum()))
        assert squared(Projection(512)({"w": x})) == pytest.approx(float(x.abs().double().square().sum()), rel=0.3)


def test_the_tensors_are_not_touched():
    x = torch.randn(1_000, requires_grad=True)
    before = x.detach().clone()
    projected = Projection(64)({"w": x})["w"]
    assert not projected.requires_grad
    assert torch.equal(x.detach(), before)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Projection(size=0)
