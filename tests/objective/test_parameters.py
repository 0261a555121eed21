import pytest
import torch
from torch import nn

from lightning_dynamics.objective import Layout, select_parameters


@pytest.fixture
def module():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]),
        (r"0\..*", ["0.weight", "0.bias"]),
        ([r"1\.bias", r"2\..*"], ["1.bias", "2.weight"]),
        (lambda name, p: p.dim() == 2, ["0.weight", "2.weight"]),
    ],
)
def test_selection_keeps_the_modules_order(module, where, names):
    assert list(select_parameters(module, where)) == names


def test_tied_parameters_count_once(module):
    module[2].weight = nn.Parameter(torch.zeros(4, 4))
    module.append(nn.Linear(4, 4, bias=False))
    module[3].weight = module[2].weight
    assert list(select_parameters(module, r"[23]\.weight")) == ["2.weight"]


def test_a_pattern_must_match_the_whole_name(module):
    with pytest.raises(ValueError, match=r"`parameters='weight'` matches no trainable parameter.*0\.weight, 0\.bias"):
        select_parameters(module, "weight")


def test_a_broken_pattern_is_said_to_be_one(module):
    with pytest.raises(ValueError, match="is not a regular expression"):
        select_parameters(module, "(")


def test_a_frozen_module_has_nothing_to_measure(module):
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no parameter that requires a gradient"):
        select_parameters(module)


def test_flattening_is_a_bijection():
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(()), "c": torch.randn(4)}
    layout = Layout.of(tensors)
    assert layout.size == 11
    vector = layout.flatten(tensors.values(), torch.empty(0))
    for part, tensor in zip(layout.unflatten(vector), tensors.values(), strict=True):
        assert torch.equal(part, tensor)
    holes = layout.flatten([tensors["a"], None, tensors["c"]], torch.empty(0, dtype=torch.float64))
    assert holes.dtype is torch.float64
    assert holes[6] == 0
    assert layout == Layout.of({name: t + 1 for name, t in tensors.items()})
    assert layout != Layout.of({"a": tensors["a"]})
