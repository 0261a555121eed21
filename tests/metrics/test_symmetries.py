"""Symmetries found in gradients of real networks, against what is known of them; charges against gradient descent."""

import copy
import functools
import io
import json
import math

import pytest
import torch
from helpers.operators import generator
from torch import nn
from torch.nn import functional as F

from lightning_dynamics.metrics import symmetries
from lightning_dynamics.metrics.symmetries import (
    Symmetry,
    SymmetryFinder,
    Units,
    breaking,
    charge_scale,
    conserved,
    effective_learning_rate,
    imbalance,
    radial_share,
)

F64 = torch.float64
CLASSES, TOKENS = 5, 11
cross_entropy, mse = F.cross_entropy, F.mse_loss


def vectors(seed, n=24, d=12):
    x = torch.randn(n, d, generator=generator(seed))
    return x, (x @ torch.randn(d, CLASSES, generator=generator(99))).argmax(1)


def targets(seed):
    x, y = vectors(seed)
    return x, F.one_hot(y, CLASSES).to(x.dtype)


def images(seed, n=16):
    y = torch.randint(CLASSES, (n,), generator=generator(seed))
    return torch.randn(n, 3, 8, 8, generator=generator(seed + 1000)) + 0.3 * y[:, None, None, None], y


def sentences(seed):
    x = torch.randint(TOKENS, (8, 6), generator=generator(seed))
    return x, ((x + x.roll(1, 1)) % TOKENS).flatten()


def mlp(activation, bias=True):
    return nn.Sequential(
        nn.Linear(12, 16, bias=bias), activation(), nn.Linear(16, 10, bias=bias), activation(), nn.Linear(10, CLASSES)
    )


class ConvNet(nn.Module):
    def __init__(self, norm, bias):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=bias), norm(8)
        self.b, self.m = nn.Conv2d(8, 12, 3, padding=1), norm(12)
        self.head = nn.Linear(12 * 4, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.n(self.a(x))), 2)
        return self.head(F.avg_pool2d(F.relu(self.m(self.b(x))), 2).flatten(1))


class Residual(nn.Module):
    """Two blocks of the same shapes, both scale-invariant."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
            )
            for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(x + block(x))
        return self.head(x.mean((2, 3)))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = F.relu(self.b(F.leaky_relu(self.deep(F.relu(self.a(x))))))
        return self.head(x.mean((2, 3)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.c = nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x).unflatten(1, (8, 2, 2))))))


class Attention(nn.Module):
    """One block with separate weights, and a gated layer."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(TOKENS, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 14), nn.Linear(width, 14), nn.Linear(14, width)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x).flatten(0, 1)


class Transformer(nn.Module):
    """PyTorch's own block, with packed weights; the embedding may be the classifier too."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 12)
        self.block = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x)))).flatten(0, 1)


class Factors(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(9, 4), nn.Embedding(TOKENS, 4)

    def forward(self, x):
        return (self.users(x[:, 0] % 9) * self.items(x[:, 1])).sum(1)


def ratings(seed):
    x, _ = sentences(seed)
    return x, torch.sin(x[:, :2].sum(1).float())


def pictures(seed):
    x, _ = vectors(seed)
    return x, torch.tanh(x[:, :3, None, None] * torch.linspace(-1, 1, 64).view(8, 8))


def gradient(net, loss, batch):
    net.zero_grad(set_to_none=True)
    loss(net(batch[0]), batch[1]).backward()
    weights = dict(net.named_parameters())
    return weights, {name: w.grad for name, w in weights.items()}


def explore(net, loss, data, finder=None, points=(0, 1, 20, 40), rate=0.1, seed=0):
    """Train, and look at some gradients on the way."""
    finder = finder or SymmetryFinder()
    for step in range(points[-1] + 1):
        weights, gradients = gradient(net, loss, data(100 * seed + step))
        if step in points:
            finder.update(weights, gradients)
        with torch.no_grad():
            for name, w in weights.items():
                w -= rate * gradients[name]
    return finder


def side(units):
    bias = "+b" if units.bias else ""
    part = f"[{units.part}/{units.parts}]" if units.parts > 1 else ""
    return f"{units.weight.removesuffix('.weight').removesuffix('_weight')}{bias}@{units.axis}{part}"


def told(symmetries):
    return {f"{s.kind} {s.groups}: {' ~ '.join(side(units) for units in s.sides)}" for s in symmetries}


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


HEAD = {"shift 1: head@0", "shift 1: head.bias@0"}
LAST = {"shift 1: 4@0", "shift 1: 4.bias@0"}
RELU = {"rescale 16: 0+b@0 ~ 2@1", "rescale 10: 2+b@0 ~ 4@1"}
CHAIN = {"rescale 1: 0+b@0 ~ 2@1", "rescale 1: 2+b@0 ~ 4@1"}
NORM = {"rescale 8: n+b@0 ~ b@1", "rescale 12: m+b@0 ~ head@1"}
BLOCK = {
    "rescale 20: block.linear1+b@0 ~ block.linear2@1",
    "rescale 12: block.norm1+b@0 ~ block.self_attn.in_proj@1",
    "rescale 12: block.norm2+b@0 ~ block.linear1@1",
    "rescale 3: block.self_attn.in_proj+b@0[0/3] ~ block.self_attn.in_proj+b@0[1/3]",
    "rescale 3: block.self_attn.in_proj+b@0[2/3] ~ block.self_attn.out_proj@1",
}
NETWORKS = {
    "relu": (lambda: mlp(nn.ReLU), cross_entropy, vectors, RELU | LAST),
    "relu, mse": (lambda: mlp(nn.ReLU), mse, targets, RELU),
    "leaky relu, dropout": (
        lambda: mlp(lambda: nn.Sequential(nn.LeakyReLU(0.1), nn.Dropout(0.3))),
        cross_entropy,
        vectors,
        RELU | LAST,
    ),
    "linear": (lambda: mlp(nn.Identity), cross_entropy, vectors, CHAIN | LAST),
    "linear, no bias": (
        lambda: mlp(nn.Identity, bias=False),
        mse,
        targets,
        {chain.replace("+b", "") for chain in CHAIN},
    ),
    "conv": (
        lambda: ConvNet(nn.Identity, True),
        cross_entropy,
        images,
        HEAD | {"rescale 8: a+b@0 ~ b@1", "rescale 12: b+b@0 ~ head@1"},
    ),
    # the norm's own gain and bias, read by weights that are normalized in turn, are so together
    "batch norm": (
        lambda: ConvNet(nn.BatchNorm2d, True),
        cross_entropy,
        images,
        HEAD | NORM | {"scale 8: a@0", "scale 12: b@0", "scale 1: n+b@0"},
    ),
    "group norm": (
        lambda: ConvNet(lambda c: nn.GroupNorm(4, c), True),
        cross_entropy,
        images,
        HEAD | NORM | {"scale 4: a+b@0", "scale 4: b+b@0", "shift 1: a.bias@0", "shift 1: b.bias@0"},
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Identity(), nn.Linear(16, CLASSES)),
        cross_entropy,
        vectors,
        LAST | {"scale 1: 0+b@0", "shift 1: 0@0", "shift 1: 0.bias@0"},
    ),
    "layer norm without weights": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, CLASSES)),
        mse,
        targets,
        {"scale 1: 0+b@0", "shift 1: 0@0", "shift 1: 0.bias@0", "shift 1: 2@1"},
    ),
    "residual": (
        Residual,
        cross_entropy,
        images,
        HEAD
        | {f"rescale 8: blocks.{i}.1+b@0 ~ blocks.{i}.3@1" for i in range(2)}
        | {f"scale 1: blocks.{i}.1+b@0" for i in range(2)}
        | {f"scale 8: blocks.{i}.{j}@0" for i in range(2) for j in (0, 3)},
    ),
    "separable": (
        Separable,
        cross_entropy,
        images,
        HEAD | {"rescale 8: a+b@0 ~ deep@0", "rescale 8: deep+b@0 ~ b@1", "rescale 12: b+b@0 ~ head@1"},
    ),
    "decoder": (Decoder, mse, pictures, {"rescale 8: a+b@0 ~ b@0", "rescale 6: b+b@1 ~ c@0"}),
    "attention": (
        Attention,
        cross_entropy,
        sentences,
        HEAD | {"rescale 3: q+b@0 ~ k+b@0", "rescale 3: v+b@0 ~ o@1", "rescale 14: up+b@0 ~ down@1"},
    ),
    "transformer": (
        Transformer,
        cross_entropy,
        sentences,
        BLOCK
        | {"shift 1: embed@1", "shift 1: head@0", "rescale 12: norm+b@0 ~ head@1"}
        | {f"shift 1: block.{name}@0" for name in ("self_attn.out_proj", "self_attn.out_proj.bias")}
        | {f"shift 1: block.{name}@0" for name in ("linear2", "linear2.bias")},
    ),
    "tied": (
        lambda: Transformer(tied=True),
        cross_entropy,
        sentences,
        BLOCK
        | {f"shift 1: block.{name}@0" for name in ("self_attn.out_proj", "self_attn.out_proj.bias")}
        | {f"shift 1: block.{name}@0" for name in ("linear2", "linear2.bias")},
    ),
    "factors": (Factors, mse, ratings, {"rescale 1: users@1 ~ items@1"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_the_symmetries_of_a_network_are_found(name):
    build, loss, data, expected = NETWORKS[name]
    assert told(explore(seeded(build), loss, data).found()) == expected


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_found_where_nothing_is_conserved(activation, seed):
    finder = explore(seeded(lambda: mlp(activation), seed), mse, targets, points=(0, 1, 2, 5, 10), seed=seed)
    assert finder.found() == ()


def test_random_gradients_of_large_tensors_have_no_symmetry():
    """A single number, |Σ w·g| ≪ Σ|w·g| in high dimension."""
    draw = generator(0)
    for _ in range(5):
        weights = {"a.weight": torch.randn(400, 1000, generator=draw), "b.weight": torch.randn(50, 400, generator=draw)}
        finder = SymmetryFinder()
        for _ in range(3):
            finder.update(weights, {name: torch.randn(w.shape, generator=draw) for name, w in weights.items()})
        assert finder.found() == ()


def synthetic(left=0.0, size=4):
    """A weight whose gradient has Σ g = ``left`` times what chance gives."""
    g = torch.ones(size, dtype=F64)
    g[::2] = -1
    g[0] += left * size**0.5
    return {"w": torch.linspace(1, 2, size, dtype=F64)}, {"w": g}


def shifts(finder):
    return [s for s in finder.found() if s.kind == "shift"]


def test_enough_gradients_must_confirm():
    finder = SymmetryFinder(confirmations=3)
    for expected in (0, 0, 1, 1):
        finder.update(*synthetic())
        assert len(shifts(finder)) == expected


def test_a_refuted_identity_starts_again():
    finder = SymmetryFinder(confirmations=2)
    for left, expected in ((0, 0), (0, 1), (2e-4, 0), (0, 0), (0, 1)):
        finder.update(*synthetic(left))
        assert len(shifts(finder)) == expected


def test_a_residual_near_the_tolerance_decides_nothing():
    finder = SymmetryFinder(confirmations=2)
    for left, expected in ((0, 0), (5e-5, 0), (0, 1), (5e-5, 1), (0.9e-5, 1), (0, 1)):
        finder.update(*synthetic(left))
        assert len(shifts(finder)) == expected
    assert shifts(finder)[0].residual == pytest.approx(0.9e-5, rel=1e-4)


def test_the_residual_is_what_is_left_over_what_chance_would_leave():
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    g = torch.tensor([[2.0, -1.0], [4.0, -3.0 + 1e-6]], dtype=F64)
    finder = SymmetryFinder(confirmations=1)
    finder.update({"w": w}, {"w": g})
    (found,) = finder.found()
    assert found == Symmetry("scale", (Units("w", None, 0, 2),), 2)
    assert found.residual == pytest.approx(4e-6 / (math.sqrt(8) + math.sqrt(288)), rel=1e-6)

    bias = {"weight": w, "bias": torch.tensor([1.0, 2.0], dtype=F64)}
    finder.update(bias, {"weight": g + 1, "bias": torch.tensor([-3.0, -3.5], dtype=F64)})
    found = {s.kind: s for s in finder.found() if "bias" in s.parameters}["scale"]
    assert found == Symmetry("scale", (Units("weight", "bias", 0, 2),), 2)
    assert found.residual == pytest.approx(4e-6 / (math.sqrt(9 + 0 + 9) + math.sqrt(225 + 64 + 49)), rel=1e-6)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_two_sides_are_equal_where_their_products_are(signs):
    finder = SymmetryFinder(confirmations=1)
    weights = {"a": torch.tensor([[1.0], [2.0]], dtype=F64), "b": torch.tensor([[5.0, 7.0]], dtype=F64)}
    products = torch.tensor([3.0, 8.0], dtype=F64)
    other = products + 9.9e-5 * torch.tensor(signs)
    finder.update(weights, {"a": (products / weights["a"][:, 0])[:, None], "b": other / weights["b"]})
    (found,) = (s for s in finder.found() if s.kind == "rescale")
    assert told([found]) == {"rescale 2: a@0 ~ b@1"}
    assert found.residual == pytest.approx(2 * 9.9e-5 / float((products + other).sum()), rel=1e-6)


def equal_products(off_diagonal):
    """Two layers with GWᵀ - VHᵀ zero on the diagonal."""
    draw = generator(0)
    w, v, h = (torch.randn(2, 2, generator=draw, dtype=F64) for _ in range(3))
    g = (v @ h.mT + off_diagonal) @ torch.linalg.inv(w).mT
    return {"a": w, "b": v.mT}, {"a": g, "b": h.mT}


@pytest.mark.parametrize(("above", "below"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1e-6, 0.0)])
def test_units_mix_where_the_whole_matrix_agrees(above, below):
    finder = SymmetryFinder(confirmations=1)
    finder.update(*equal_products(torch.tensor([[0.0, above], [below, 0.0]], dtype=F64)))
    (found,) = (s for s in finder.found() if s.kind == "rescale")
    assert told([found]) == {"rescale 1: a@0 ~ b@1" if above + below < 1 else "rescale 2: a@0 ~ b@1"}


def test_identities_of_the_initialization_are_refuted():
    """A layer norm's gain is uniform at first, and what reads it has inputs of zero mean."""
    net = seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)))
    finder = SymmetryFinder()
    for seed in range(3):
        finder.update(*gradient(net, mse, targets(seed)))
    assert "shift 1: 2@1" in told(finder.found())
    assert told(explore(net, mse, targets, finder).found()) == {
        "scale 1: 0+b@0",
        "shift 1: 0@0",
        "shift 1: 0.bias@0",
        "rescale 16: 1+b@0 ~ 2@1",
    }


class Sum(nn.Module):
    """Two biases that start equal, and stay so."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)
        nn.init.zeros_(self.a.bias)
        nn.init.zeros_(self.b.bias)

    def forward(self, x):
        return self.a(x) + self.b(x.tanh())


def test_equal_biases_are_no_rescaling():
    assert explore(seeded(Sum), mse, targets).found() == ()


def test_a_linear_chain_that_bends_is_none_any_more():
    linear, relu = seeded(lambda: mlp(nn.Identity)), seeded(lambda: mlp(nn.ReLU))
    finder = explore(linear, mse, targets)
    assert told(finder.found()) == CHAIN
    finder.update(*gradient(relu, mse, targets(0)))
    assert told(finder.found()) == RELU
    for before in (linear, relu):
        finder = explore(before, mse, targets)
        assert finder.found() != ()
        finder.update(*gradient(seeded(lambda: mlp(nn.Tanh)), mse, targets(0)))
        assert finder.found() == ()


def test_a_bias_that_is_zero_yet_belongs_where_it_will():
    norm = seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, CLASSES)))
    nn.init.zeros_(norm[0].bias)
    block = seeded(Transformer)  # its attention has such biases
    for net, loss, data, expected in (
        (norm, mse, targets, {"scale 1: 0+b@0"}),
        (block, cross_entropy, sentences, {law for law in BLOCK if "attn" in law}),
    ):
        finder = SymmetryFinder()
        for seed in range(3):
            finder.update(*gradient(net, loss, data(seed)))
        kinds = ("scale", "rescale")
        found = told(s for s in finder.found() if s.kind in kinds and ("0.weight" in s.parameters or "attn" in str(s)))
        assert found == expected


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_a_bias_is_part_of_a_normalized_weight_where_it_is_normalized(size):
    """Also where it is so small that the ε of the norm leaves more."""

    class Normalized(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.normalize(self.weight), self.bias)

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16, eps=1e-4), nn.Tanh(), nn.Linear(16, CLASSES))
    batch = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16, eps=1e-4), nn.Tanh(), nn.Linear(16, CLASSES))
    weight = nn.Sequential(Normalized(12, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    expected = {"scale 1: 0+b@0"} if size > 1e-5 else {"scale 1: 0@0"}
    for net, law in ((layer, expected), (batch, {"scale 16: 0@0"}), (weight, {"scale 16: 0@0"})):
        nn.init.normal_(net[0].bias, std=size)
        finder = SymmetryFinder()
        for seed in range(3):
            finder.update(*gradient(net, mse, targets(seed)))
        assert told(s for s in finder.found() if s.kind == "scale") == law
        if net is layer:
            nn.init.normal_(net[0].bias)
            finder.update(*gradient(net, mse, targets(3)))
            assert told(s for s in finder.found() if s.kind == "scale") == {"scale 1: 0+b@0"}


def test_biases_that_make_no_difference_give_no_second_law():
    net = seeded(Attention)
    for layer in (net.q, net.k, net.v, net.o):
        nn.init.normal_(layer.bias, std=1e-12)
    finder = SymmetryFinder()
    for seed in range(3):
        finder.update(*gradient(net, cross_entropy, sentences(seed)))
    laws = told(s for s in finder.found() if s.is_linear)
    assert laws == {"rescale 3: q+b@0 ~ k+b@0", "rescale 3: v+b@0 ~ o@1"}


@pytest.mark.parametrize("name", ["conv", "linear", "attention", "decoder", "layer norm without weights"])
def test_slices_of_tensors_give_the_same(name, monkeypatch):
    build, loss, data, _ = NETWORKS[name]
    weights, gradients = gradient(seeded(build), loss, data(0))

    def evidence(size):
        monkeypatch.setattr(symmetries, "_SLICE", size)
        finder = SymmetryFinder(confirmations=1, tolerance=1e-2)
        finder.update(weights, gradients)
        return {str(row[:3]): row[-1] for row in finder.state_dict()["evidence"]}

    whole = evidence(1 << 17)
    assert len(whole) > 1
    for size in (50, 1):
        assert evidence(size) == pytest.approx(whole, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_tensors_leave_the_others_their_evidence(value):
    layers = [layer for _ in range(16) for layer in (nn.Linear(12, 12), nn.ReLU())]
    net = seeded(lambda: nn.Sequential(*layers, nn.Linear(12, CLASSES)))
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 2**0.5)
    finder = SymmetryFinder(confirmations=1)
    weights, gradients = gradient(net, mse, targets(0))
    bad = (2, 8, 10, 18, 24, 30)
    for i in bad:
        gradients[f"{i}.weight"][3:6, 2] = value
    finder.update(weights, gradients)
    good = (i for i in range(0, 32, 2) if not {i, i + 2} & set(bad))
    assert {f"rescale 12: {i}+b@0 ~ {i + 2}@1" for i in good} == told(s for s in finder.found() if s.kind == "rescale")


def test_a_common_factor_of_the_gradient_does_not_matter():
    net = seeded(lambda: mlp(nn.ReLU))
    for factor in (2.0**-60, 1.0, 2.0**60):
        finder = SymmetryFinder(confirmations=1)
        weights, gradients = gradient(net, cross_entropy, vectors(0))
        finder.update(weights, {name: factor * g for name, g in gradients.items()})
        assert told(finder.found()) == RELU | LAST


def test_a_long_chain_gives_each_pair_once():
    layers = [layer for _ in range(40) for layer in (nn.Linear(12, 12), nn.ReLU())]
    net = seeded(lambda: nn.Sequential(*layers, nn.Linear(12, CLASSES)))
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 2**0.5)
    found = explore(net, mse, targets, points=(0, 1, 2), rate=1e-3).found()
    assert told(found) == {f"rescale 12: {2 * i}+b@0 ~ {2 * i + 2}@1" for i in range(40)}


def test_what_other_symmetries_imply_is_left_out():
    """Three sides with equal products: two laws."""
    net = seeded(lambda: nn.Sequential(nn.Conv1d(12, 8, 1, bias=False), *(depthwise() for _ in range(2)), nn.Flatten()))
    found = explore(nn.Sequential(nn.Unflatten(1, (12, 1)), net, nn.Linear(8, CLASSES)), mse, targets).found()
    assert told(found) == {"rescale 8: 1.0@0 ~ 1.1@0", "rescale 8: 1.1@0 ~ 1.2@0", "rescale 8: 1.2@0 ~ 2@1"}


def depthwise():
    return nn.Conv1d(8, 8, 1, groups=8, bias=False)


class Rough(nn.Sequential):
    """Computes in bfloat16."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_low_precision_hides_what_a_larger_tolerance_shows():
    net = seeded(lambda: Rough(*mlp(nn.ReLU)))
    coarse = explore(copy.deepcopy(net), cross_entropy, vectors, SymmetryFinder(tolerance=1e-2)).found()
    assert explore(net, cross_entropy, vectors).found() == ()
    assert told(coarse) == RELU | LAST
    assert 1e-3 < max(s.residual for s in coarse) < 1e-2
    wrong = explore(seeded(lambda: Rough(*mlp(nn.Tanh))), mse, targets, SymmetryFinder(tolerance=1e-2))
    assert wrong.found() == ()


def test_gradients_that_say_nothing_leave_the_evidence_alone():
    net = seeded(lambda: mlp(nn.ReLU))
    finder = explore(net, cross_entropy, vectors)
    state = copy.deepcopy(finder.state_dict())
    weights, gradients = gradient(net, cross_entropy, vectors(0))
    finder.update(weights, {})
    finder.update(weights, dict.fromkeys(weights))
    finder.update(weights, {name: torch.zeros_like(g) for name, g in gradients.items()})
    for value in (math.nan, math.inf):
        finder.update(weights, {name: torch.full_like(g, value) for name, g in gradients.items()})
        broken = {name: g.clone() for name, g in gradients.items()}
        for g in broken.values():
            g.view(-1)[0] = value
        finder.update(weights, broken)
    assert finder.state_dict() == state


def test_odd_parameters_are_no_obstacle():
    draw = generator(0)
    weights = {
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "unused": torch.ones(3, dtype=torch.int64),
        "half.weight": torch.randn(4, 3, generator=draw).half(),
        "vector": torch.randn(5, generator=draw),
        "one": torch.randn(1, generator=draw),
        "frozen.weight": torch.randn(3, 4, generator=draw),
        "deep.weight": torch.randn(2, 3, 1, 2, 2, generator=draw),
    }
    gradients = {n: 1 + 0.1 * w for n, w in weights.items() if n not in ("frozen.weight", "unused")}
    finder = SymmetryFinder()
    for _ in range(3):
        finder.update(weights, gradients)
    assert finder.found() == ()


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"a\.weight has the shape \(2, 3\), and its gradient the shape \(3, 2\)"):
        SymmetryFinder().update({"a.weight": torch.ones(2, 3)}, {"a.weight": torch.ones(3, 2)})


def test_sparse_gradients_are_read():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(TOKENS, 6, sparse=True), nn.Linear(6, TOKENS)

        def forward(self, x):
            return self.head(F.relu(self.embed(x))).flatten(0, 1)

    net = seeded(Sparse)
    assert gradient(net, cross_entropy, sentences(0))[1]["embed.weight"].is_sparse
    found = explore(net, cross_entropy, sentences, points=(0, 1, 2), rate=0.0).found()
    assert told(found) == HEAD | {"rescale 6: embed@1 ~ head@1"}


def test_complex_weights_have_real_and_imaginary_coordinates():
    draw = generator(0)
    w, v = (torch.randn(*shape, dtype=torch.complex128, generator=draw).requires_grad_() for shape in ((6, 4), (3, 6)))
    finder = SymmetryFinder(confirmations=2)
    for _ in range(2):
        x = torch.randn(4, 20, dtype=torch.complex128, generator=draw)
        loss = (v @ (w @ x)).abs().pow(3).mean()
        grads = torch.autograd.grad(loss, (w, v))
        finder.update({"w": w, "v": v}, dict(zip("wv", grads, strict=True)))
    (found,) = finder.found()
    assert told([found]) == {"rescale 1: w@0 ~ v@1"}
    real, product = (torch.cat([m.real, m.imag], 1) for m in (w.detach(), v.detach().mT))
    assert torch.allclose(conserved(found, {"w": w, "v": v}), (real @ real.mT - product @ product.mT)[None])


def test_the_evidence_survives_a_checkpoint():
    net = seeded(lambda: ConvNet(nn.BatchNorm2d, True))
    whole, first, second = SymmetryFinder(), SymmetryFinder(), SymmetryFinder()
    for seed in range(4):
        point = gradient(net, cross_entropy, images(seed))
        whole.update(*point)
        if seed == 2:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
            second.load_state_dict(json.loads(json.dumps(second.state_dict())))
        (first if seed < 2 else second).update(*point)
    assert first.found() == ()
    assert second.found() == whole.found() != ()
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"tolerance": 0.2}, {"confirmations": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SymmetryFinder(**options)


def test_a_symmetry_names_its_parameters_and_layers():
    finder = explore(seeded(lambda: mlp(nn.Identity)), cross_entropy, vectors)
    chain, shift = (next(s for s in finder.found() if s.kind == kind) for kind in ("rescale", "shift"))
    assert chain.parameters == ("0.weight", "0.bias", "2.weight")
    assert chain.layers == ("0", "2")
    assert chain.is_linear
    assert not shift.is_linear
    assert shift.layers == ("4",)


@functools.cache
def exact(name):
    """A network in float64 whose norms have no ε, with what it conserves, weights and gradients."""
    build, loss, data, expected = NETWORKS[name]
    net = seeded(build).double()
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-200

    def doubled(seed):
        return tuple(t.double() if t.is_floating_point() else t for t in data(seed))

    found = explore(net, loss, doubled).found()
    assert told(found) == expected
    weights, gradients = gradient(net, loss, doubled(1000))
    return found, {name: w.detach() for name, w in weights.items()}, gradients


SMOOTH = ["relu", "linear", "conv", "batch norm", "group norm", "layer norm", "separable", "decoder", "attention"]


@pytest.mark.parametrize("name", [*SMOOTH, "transformer", "factors"])
def test_a_step_of_descent_breaks_each_charge_by_the_same_form_of_the_gradient(name):
    """(1 - ηλ)² Q(w) + η² Q(g) exactly, with coupled weight decay λ; for a shift, (1 - ηλ) Q(w)."""
    found, weights, gradients = exact(name)
    for rate, decay in ((0.1, 0.0), (0.05, 0.0), (0.1, 0.3)):
        shrink = 1 - rate * decay
        after = {name: shrink * w - rate * gradients[name] for name, w in weights.items()}
        for symmetry in found:
            charge, scale = conserved(symmetry, weights), charge_scale(symmetry, weights)
            form = conserved(symmetry, gradients)
            if symmetry.kind == "shift":
                expected = shrink * charge
            else:
                expected = shrink**2 * charge + rate**2 * form
                assert float(form.norm()) > 0
            assert breaking(conserved(symmetry, after), expected, scale) < 1e-12, (symmetry, rate, decay)


@pytest.mark.parametrize("name", ["relu", "batch norm", "linear"])
def test_half_the_learning_rate_breaks_charges_a_quarter_as_much_in_a_step_and_half_in_a_time(name):
    build, loss, data, _ = NETWORKS[name]
    found, _, _ = exact(name)
    found = [s for s in found if s.kind != "shift"]
    batch = tuple(t.double() if t.is_floating_point() else t for t in data(0))

    def broken(rate, steps):
        net = seeded(build).double()
        for module in net.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-200
        weights = {name: w.detach() for name, w in net.named_parameters()}
        start = [(conserved(s, weights), charge_scale(s, weights)) for s in found]
        for _ in range(steps):
            _, gradients = gradient(net, loss, batch)
            with torch.no_grad():
                for name, w in net.named_parameters():
                    w -= rate * gradients[name]
        return torch.tensor([breaking(conserved(s, weights), *before) for s, before in zip(found, start, strict=True)])

    assert torch.allclose(broken(1e-2, 1) / broken(5e-3, 1), torch.tensor(4.0), rtol=1e-4)
    assert torch.allclose(broken(2e-3, 20) / broken(1e-3, 40), torch.tensor(2.0), rtol=0.05)


def test_the_norm_of_scale_invariant_weights_grows_by_the_squared_step():
    found, weights, gradients = exact("batch norm")
    symmetry = next(s for s in found if s.sides[0].weight == "a.weight")
    after = {name: w - 0.1 * gradients[name] for name, w in weights.items()}
    norms = [w["a.weight"].flatten(1).square().sum(1) for w in (weights, gradients, after)]
    assert torch.allclose(conserved(symmetry, weights), norms[0])
    assert torch.allclose(norms[2], norms[0] + 0.01 * norms[1], rtol=1e-12)


def test_the_imbalance_of_layers_changes_by_the_squared_gradients():
    found, weights, gradients = exact("relu")
    symmetry = next(s for s in found if "0.weight" in s.parameters)
    rate = 0.1
    after = {name: w - rate * gradients[name] for name, w in weights.items()}
    squares = {name: float(g.square().sum()) for name, g in gradients.items()}
    change = rate**2 * (squares["2.weight"] - squares["0.weight"] - squares["0.bias"])
    assert imbalance(symmetry, after) - imbalance(symmetry, weights) == pytest.approx(change, rel=1e-9)
    assert imbalance(symmetry, weights) == pytest.approx(-float(conserved(symmetry, weights).sum()))
    shift = next(s for s in found if s.kind == "shift")
    with pytest.raises(ValueError, match="'shift'"):
        imbalance(shift, weights)


def test_charges_are_what_they_say():
    draw = generator(0)
    weights = {
        "a.weight": torch.randn(8, 3, generator=draw, dtype=F64),
        "a.bias": torch.randn(8, generator=draw, dtype=F64),
        "b.weight": torch.randn(5, 8, generator=draw, dtype=F64),
        "c.weight": torch.randn(4, 2, 3, generator=draw, dtype=F64),
        "p.weight": torch.randn(24, 6, generator=draw, dtype=F64),
        "f.weight": torch.randn(5, 16, generator=draw, dtype=F64),
    }
    w, b, v, c, p, f = weights.values()
    first, second = Units("a.weight", "a.bias", 0, 8), Units("b.weight", None, 1, 8)
    incoming, outgoing = w @ w.mT + torch.outer(b, b), v.mT @ v

    per_unit = conserved(Symmetry("rescale", (first, second), 8), weights)
    assert torch.allclose(per_unit, (incoming - outgoing).diagonal())
    chain = conserved(Symmetry("rescale", (first, second), 1), weights)
    assert torch.allclose(chain, (incoming - outgoing)[None])
    heads = conserved(Symmetry("rescale", (first, second), 2), weights)
    assert torch.allclose(heads, torch.stack([(incoming - outgoing)[i : i + 4, i : i + 4] for i in (0, 4)]))
    flat = conserved(Symmetry("rescale", (first, Units("f.weight", None, 1, 8)), 8), weights)
    assert torch.allclose(flat, incoming.diagonal() - f.view(5, 8, 2).square().sum((0, 2)))
    packed = conserved(Symmetry("rescale", (Units("p.weight", None, 0, 8, 2, 3), second), 8), weights)
    assert torch.allclose(packed, (p[16:] @ p[16:].mT - outgoing).diagonal())
    whole = conserved(Symmetry("scale", (first,), 1), weights)
    assert torch.allclose(whole, (w.square().sum() + b.square().sum())[None])
    groups = conserved(Symmetry("scale", (Units("c.weight", None, 0, 4),), 2), weights)
    assert torch.allclose(groups, torch.stack([c[:2].square().sum(), c[2:].square().sum()]))
    assert torch.allclose(
        conserved(Symmetry("shift", (Units("c.weight", None, 0, 4),), 1), weights), c.sum(0).flatten()
    )
    assert torch.allclose(
        conserved(Symmetry("shift", (Units("c.weight", None, 1, 2),), 1), weights), c.sum(1).flatten()
    )


def test_the_change_of_a_charge_is_relative_to_its_parts():
    weights = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[1.0, 4.0]]), "c": torch.tensor([[1.0], [-3.0]])}
    rescale = Symmetry("rescale", (Units("a", None, 0, 2), Units("b", None, 1, 2)), 2)
    assert conserved(rescale, weights).tolist() == [8, -16]
    assert charge_scale(rescale, weights) == pytest.approx(9 + math.hypot(1, 16))
    assert breaking(torch.tensor([11.0, -12.0]), conserved(rescale, weights), 8.0) == pytest.approx(5 / 8)
    shift = Symmetry("shift", (Units("c", None, 0, 2),), 1)
    assert conserved(shift, weights).tolist() == [-2]
    assert charge_scale(shift, weights) == 4
    assert math.isnan(breaking(torch.zeros(1), torch.zeros(1), 0.0))


def test_the_radial_share_is_the_cosine():
    assert radial_share(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.6)
    assert radial_share(torch.tensor([1j]), torch.tensor([1.0 + 1j])) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(radial_share(torch.zeros(2), torch.ones(2)))
    _, weights, gradients = exact("batch norm")
    assert abs(radial_share(weights["a.weight"], gradients["a.weight"])) < 1e-12
    assert abs(radial_share(weights["head.weight"], gradients["head.weight"])) > 1e-3


def test_weights_of_other_scale_move_alike_at_the_same_effective_learning_rate():
    found, weights, gradients = exact("batch norm")
    symmetry = next(s for s in found if s.sides[0].weight == "b.weight")
    w, g = weights["b.weight"].flatten(1), gradients["b.weight"].flatten(1)

    def turned(factor, step):
        after = factor * w - step
        return after / after.norm(dim=1, keepdim=True)

    a, rate = 3.0, 0.1
    larger = {**weights, "b.weight": a * weights["b.weight"]}
    same = effective_learning_rate(rate, conserved(symmetry, weights))
    assert torch.allclose(same, rate / w.square().sum(1))
    assert torch.allclose(effective_learning_rate(a**2 * rate, conserved(symmetry, larger)), same)
    assert torch.allclose(turned(1, rate * g), turned(a, a**2 * rate * g / a))  # the gradient is as much smaller
    adaptive = effective_learning_rate(rate, conserved(symmetry, weights), adaptive=True)
    assert torch.allclose(effective_learning_rate(a * rate, conserved(symmetry, larger), adaptive=True), adaptive)
    assert torch.allclose(turned(1, rate * g.sign()), turned(a, a * rate * g.sign()))
