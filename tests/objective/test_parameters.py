import pytest
import torch
from torch import nn

from lightning_dynamics.objective import Layout, Objective, hessian, select_parameters


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


def test_complex_numbers_are_pairs_of_coordinates():
    z = torch.tensor([1 + 2j, 3 - 4j]).conj()
    parameters = {"bias": torch.zeros(1), "waves": nn.Parameter(z)}
    layout = Layout.of(parameters)
    assert layout.size == 5
    vector = layout.flatten([None, z], torch.empty(0))
    assert vector.tolist() == [0, 1, -2, 3, 4]
    bias, waves = layout.directions(vector, list(parameters.values()))
    assert torch.equal(bias, torch.zeros(1))
    assert torch.equal(waves, z)


def test_curvature_in_complex_parameters_is_that_of_their_real_coordinates():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.7]))
            self.waves = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))

    def loss(module, x):
        return (x.to(module.waves.dtype) @ module.waves).abs().tanh().mul(module.scale).square().sum()

    torch.manual_seed(0)
    module, x = Waves(), torch.randn(3, 2)
    for dtype in (torch.float32, torch.float64):
        with hessian(Objective(module, loss, [x], dtype=dtype)) as operator:
            own = torch.stack([operator(column.to(dtype)) for column in torch.eye(9)])

        def of_coordinates(vector, dtype=dtype):
            other = Waves()
            del other.scale, other.waves
            other.scale, other.waves = vector[:1], torch.complex(*vector[1:].view(2, 2, 2).unbind(-1))
            return loss(other, x.to(dtype))

        start = torch.cat([module.scale, torch.view_as_real(module.waves).flatten()]).detach().to(dtype)
        dense = torch.autograd.functional.hessian(of_coordinates, start)
        torch.testing.assert_close(own, dense, rtol=1e-5, atol=1e-5)
