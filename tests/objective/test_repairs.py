"""Repaired operations: PyTorch's values and gradients, and right second derivatives whatever PyTorch has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dynamics.objective import repairs
from lightning_dynamics.objective.repairs import Repaired, distances

INF = float("inf")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def repaired(function):
    def run(*inputs):
        with Repaired():
            return function(*inputs)

    return run


def first(function, *inputs):
    value = function(*inputs)
    return value, *torch.autograd.grad(value.sin().sum(), inputs)


def is_right_twice(function, *inputs):
    return gradgradcheck(lambda *i: function(*i).sin(), inputs, raise_exception=False)


def assert_repaired(function, *inputs, rounding=1e-12):
    """Values and gradients agree with PyTorch's, second derivatives with differences of gradients."""
    for own, plain in zip(first(repaired(function), *inputs), first(function, *inputs), strict=True):
        torch.testing.assert_close(own, plain, rtol=rounding, atol=rounding)
    assert gradgradcheck(lambda *i: repaired(function)(*i).sin(), inputs)


@pytest.mark.parametrize(
    ("v", "g", "dim"),
    [((3, 4), (3, 1), 0), ((3, 4), (1, 4), 1), ((2, 3, 2), (1, 3, 1), 1), ((3, 2), (), -1)],
)
def test_weight_norm_is_right(v, g, dim):
    assert_repaired(lambda v, g: torch._weight_norm(v, g, dim), draw(*v), draw(*g, seed=1))


def test_weight_norm_is_wrong_without():
    """Once this fails, PyTorch has mended it."""
    assert not is_right_twice(lambda v, g: torch._weight_norm(v, g, 0), draw(3, 4), draw(3, 1, seed=1))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_modules_with_weight_norm_are_right(norm):
    torch.manual_seed(0)
    module = norm(nn.Linear(3, 2).double())
    names, values = zip(*module.named_parameters(), strict=True)
    x = torch.randn(4, 3, dtype=torch.float64)

    def function(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [value.detach().requires_grad_() for value in values]
    assert_repaired(function, *inputs)
    assert not is_right_twice(function, *inputs)


FLAT = torch.tensor([0, 3, 1, 1, 4, 2, 0])
SQUARE = torch.tensor([[0, 3, 1], [1, 4, 2]])
BAGS = {
    "square": (SQUARE, {}),
    "offsets": (FLAT, {"offsets": torch.tensor([0, 2, 2, 5])}),
    "offsets with an end": (FLAT, {"offsets": torch.tensor([0, 2, 7, 7]), "include_last_offset": True}),
    "padding": (SQUARE, {"padding_idx": 1}),
    "padding from the end": (FLAT, {"offsets": torch.tensor([0, 1, 4]), "padding_idx": -5}),
    "only padding": (torch.tensor([[2, 2], [2, 1]]), {"padding_idx": 2}),
    "empty": (FLAT[:0], {"offsets": torch.tensor([0, 0])}),
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", BAGS)
def test_embedding_bags_are_right(name, mode):
    indices, options = BAGS[name]
    assert_repaired(lambda weight: F.embedding_bag(indices, weight, mode=mode, **options), draw(5, 3))


@pytest.mark.parametrize("name", [name for name in BAGS if name != "empty"])
def test_weighted_embedding_bags_are_right(name):
    indices, options = BAGS[name]
    assert_repaired(
        lambda weight, by: F.embedding_bag(indices, weight, mode="sum", per_sample_weights=by, **options),
        draw(5, 3),
        draw(*indices.shape, seed=1),
    )


def test_embedding_bags_bound_their_rows_as_without():
    rows = [nn.EmbeddingBag.from_pretrained(torch.ones(5, 3), freeze=False, max_norm=1.0) for _ in range(2)]
    plain, own = rows[0](SQUARE), repaired(rows[1])(SQUARE)
    torch.testing.assert_close(own, plain)
    assert torch.equal(rows[0].weight, rows[1].weight)


def test_embedding_bags_have_no_second_derivative_without():
    """Once this fails, PyTorch has one."""
    with pytest.raises(RuntimeError, match="_embedding_bag"):
        is_right_twice(lambda weight: F.embedding_bag(SQUARE, weight), draw(5, 3))


@pytest.mark.parametrize("embed", [F.embedding, F.embedding_bag])
def test_gradients_are_those_of_the_loss_whatever_embeddings_scale_them_by(embed):
    weight = draw(5, 3)
    scaled = first(repaired(lambda w: embed(SQUARE, w, scale_grad_by_freq=True)), weight)
    for own, plain in zip(scaled, first(lambda w: embed(SQUARE, w), weight), strict=True):
        torch.testing.assert_close(own, plain)


def test_sparse_gradients_stay_sparse():
    weight = draw(5, 3)
    assert first(repaired(lambda w: F.embedding(SQUARE, w, sparse=True)), weight)[1].is_sparse


ORDERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, INF]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("is_missing", [False, True])
def test_distances_are_right(p, is_missing, monkeypatch):
    if is_missing:
        monkeypatch.setattr(repairs, "_cdist_is_differentiable_twice", lambda: False)
    assert_repaired(lambda a, b: torch.cdist(a, b, p), draw(3, 2), draw(4, 2, seed=1))
    assert_repaired(lambda a, b: torch.cdist(a, b, p), draw(2, 1, 3, 2), draw(2, 4, 2, seed=1))
    assert_repaired(lambda a: F.pdist(a, p), draw(4, 2))


def test_the_own_second_derivative_of_distances_is_taken_where_pytorch_has_one():
    function = lambda a: torch.cdist(a, a + 1)  # noqa: E731
    try:
        has_one = is_right_twice(function, draw(3, 2))
    except NotImplementedError:
        has_one = False
    repairs._cdist_is_differentiable_twice.cache_clear()
    assert repairs._cdist_is_differentiable_twice() == has_one


@pytest.mark.parametrize("p", ORDERS)
def test_derivatives_of_distances_are_finite_where_points_coincide(p):
    points = draw(5, 3)
    with torch.no_grad():
        points[1] = points[0]
        points[2, 0] = points[3, 0]
    for function in (lambda x: distances(x, x, p), repaired(lambda x: torch.cdist(x, x, p))):
        (gradient,) = torch.autograd.grad(function(points).sin().sum(), points, create_graph=True)
        assert gradient.isfinite().all()
        if gradient.requires_grad:
            (second,) = torch.autograd.grad(gradient.sin().sum(), points)
            assert second.isfinite().all()


def test_many_distances_are_multiplied_out(monkeypatch):
    def derivatives():
        x = draw(6, 3)
        with torch.no_grad():
            x[1] = x[0]
        value = distances(x, 2 * x)
        (gradient,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        return value.detach(), gradient.detach(), torch.autograd.grad(gradient.sin().sum(), x)[0]

    expected = derivatives()
    monkeypatch.setattr(repairs, "_AT_ONCE", 1)
    for one, other in zip(derivatives(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_distances_of_narrow_numbers_are_wide():
    assert distances(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)).dtype is (
        torch.float32
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid_is_right(inplace):
    x = torch.tensor([-4.0, -1.0, 0.5, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    # PyTorch rounds a sixth to single precision
    assert_repaired(lambda x: F.hardsigmoid(x.square().sub(x), inplace=inplace), x, rounding=1e-7)


def test_hardsigmoid_has_no_second_derivative_without():
    """Once this fails, PyTorch has one."""
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        is_right_twice(F.hardsigmoid, draw(3))


@pytest.mark.parametrize("by", ["function", "module"])
def test_attention_is_right_within_kernels_that_the_user_chose(by):
    torch.manual_seed(0)
    heads = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def attention(x):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if by == "module":
                return heads(x, x, x, need_weights=False)[0]
            return F.scaled_dot_product_attention(x, x, x)

    assert_repaired(attention, draw(1, 2, 3, 4) if by == "function" else draw(2, 3, 4))
    with pytest.raises(RuntimeError, match="not implemented"):
        is_right_twice(attention, draw(1, 2, 3, 4) if by == "function" else draw(2, 3, 4))


def test_everything_else_is_left_alone():
    x = torch.ones(3, requires_grad=True)
    with Repaired():
        assert F.elu(2 * x, inplace=True).grad_fn.name() == "EluBackward1"
        assert F.embedding(SQUARE, draw(5, 3)).grad_fn.name() == "EmbeddingBackward0"
