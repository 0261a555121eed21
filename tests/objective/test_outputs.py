"""Gauss-Newton and Fisher matrices against dense ones, computed by other means."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from lightning_dynamics.objective import Objective, curvature_matrix, hessian, symmetry_defect


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(sizes=(5, 2)):
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, generator=draw, dtype=torch.float64),
            torch.randint(0, 3, (n,), generator=draw),
        )
        for n in sizes
    ]


def cross_entropy(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def squares(net, batch):
    return (net(batch[0]) - 1).square().sum(1).mean() / 2


def function_of_flat(net, compute):
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def at(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return compute(lambda x: functional_call(net, values, (x,)))

    return at, torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def jacobian(net, x):
    at, flat = function_of_flat(net, lambda forward: forward(x))
    return jacrev(at)(flat)


def dense(objective, kind):
    with curvature_matrix(objective, kind) as matrix:
        eye = torch.eye(matrix.size, dtype=matrix.dtype)
        return torch.stack([matrix(row) for row in eye])


def gauss_newton_of_cross_entropy(net):
    """Σ_n Jᵀ (diag p - ppᵀ) J / N, which is the Fisher information too."""
    total = 0
    for x, _ in batches():
        J, p = jacobian(net, x), net(x).softmax(1).detach()
        total = total + torch.einsum("nci,ncd,ndj->ij", J, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], J)
    return total / 7


OUTPUTS = {
    "by name": "2",
    "scalar loss": lambda net, batch: (net(batch[0]), lambda z: F.cross_entropy(z, batch[1])),
    "loss of each sample": lambda net, batch: (
        net(batch[0]),
        lambda z: F.cross_entropy(z, batch[1], reduction="none"),
    ),
}


@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_gauss_newton(net, outputs, engine):
    found = dense(Objective(net, cross_entropy, batches(), output_fn=outputs, engine=engine), "gauss_newton")
    assert torch.allclose(found, gauss_newton_of_cross_entropy(net), atol=1e-12)


def test_the_hessian_is_gauss_newton_and_a_residual(net):
    objective = Objective(net, cross_entropy, batches(), output_fn="2")
    whole = sum(dense(objective, kind) for kind in ("gauss_newton", "residual"))
    assert torch.allclose(whole, dense(objective, "hessian"), atol=1e-12)

    def loss(forward):
        return sum(len(x) * F.cross_entropy(forward(x), y) for x, y in batches()) / 7

    at, flat = function_of_flat(net, loss)
    assert torch.allclose(whole, jacrev(jacrev(at))(flat), atol=1e-10)


def test_the_residual_of_a_linear_network_vanishes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3)).double()
    assert float(dense(Objective(net, cross_entropy, batches(), output_fn="0"), "residual").abs().max()) < 1e-14


def test_fisher_of_a_categorical_is_gauss_newton_of_cross_entropy(net):
    objective = Objective(
        net, cross_entropy, batches(), output_fn=lambda net, b: (net(b[0]), lambda z: Categorical(logits=z))
    )
    assert torch.allclose(dense(objective, "fisher"), gauss_newton_of_cross_entropy(net), atol=1e-12)


def test_fisher_of_a_normal_with_fixed_width(net):
    """Jᵀ J / σ² averaged over samples; over samples and outputs where these are observations of their own."""
    JTJ = sum(torch.einsum("nci,ncj->ij", J, J) for J in (jacobian(net, x) for x, _ in batches())) / 4.0
    for make, count in ((lambda z: Independent(Normal(z, 2.0), 1), 7), (lambda z: Normal(z, 2.0), 21)):
        objective = Objective(net, squares, batches(), output_fn=lambda net, b, make=make: (net(b[0]), make))
        assert torch.allclose(dense(objective, "fisher"), JTJ / count, atol=1e-12)


def test_empirical_fisher(net):
    outer = 0
    for x, y in batches():
        for i in range(len(x)):
            net.zero_grad()
            F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
            g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
            outer = outer + torch.outer(g, g)
    net.zero_grad(set_to_none=True)
    objective = Objective(net, cross_entropy, batches(), output_fn=OUTPUTS["loss of each sample"])
    assert torch.allclose(dense(objective, "empirical_fisher"), outer / 7, atol=1e-12)


def test_empirical_and_true_fisher_differ(net):
    each = Objective(net, cross_entropy, batches(), output_fn=OUTPUTS["loss of each sample"])
    assert not torch.allclose(dense(each, "empirical_fisher"), gauss_newton_of_cross_entropy(net), rtol=0.1)


def test_a_loss_with_kinks_has_no_curvature_of_its_own(net):
    objective = Objective(net, lambda net, b: net(b[0]).abs().mean(), batches(), output_fn="2")
    assert float(dense(objective, "gauss_newton").abs().max()) == 0


def test_halves_and_blocks(net):
    objective = Objective(net, cross_entropy, batches((4, 4)), output_fn="2")
    with hessian(objective) as H:
        v = torch.randn(H.size, dtype=H.dtype)
        for kind in ("hessian", "gauss_newton"):
            halves = (H.operator(kind, "even")(v) + H.operator(kind, "odd")(v)) / 2
            assert torch.allclose(halves, H.operator(kind)(v), atol=1e-12)
            assert symmetry_defect(H.operator(kind), torch.Generator().manual_seed(0)) < 1e-12
        assert H.layout.blocks() == {"0": (0, 16), "2": (16, 31)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(2, 2), nn.Linear(2, 2), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.b(self.a(x))


def test_blocks_are_those_of_the_owning_modules():
    objective = Objective(Tied(), lambda net, x: net(x).square().mean(), [torch.randn(4, 2)])
    with hessian(objective) as H:
        assert H.layout.blocks() == {"scale": (0, 1), "a": (1, 7), "b": (7, 13)}


WRONG = {
    "no outputs": (None, "gauss_newton", "needs `output_fn=`"),
    "no such module": ("head", "gauss_newton", "names no submodule; there are: 0, 1, 2"),
    "a name for the Fisher": ("2", "fisher", "needs a function"),
    "not two things": (lambda net, b: net(b[0]), "gauss_newton", "must return two things"),
    "a loss for the Fisher": (lambda net, b: (net(b[0]), lambda z: z.sum()), "fisher", "needs a likelihood"),
    "a likelihood for Gauss-Newton": (
        lambda net, b: (net(b[0]), lambda z: Categorical(logits=z)),
        "gauss_newton",
        "needs losses",
    ),
    "a mean for the empirical Fisher": (OUTPUTS["scalar loss"], "empirical_fisher", "reduction='none'"),
    "another loss": (
        lambda net, b: (net(b[0]), lambda z: z.square().mean()),
        "gauss_newton",
        "that of another function",
    ),
    "two dimensions": (lambda net, b: (net(b[0]), lambda z: z), "gauss_newton", "scalar loss or one loss per sample"),
}


@pytest.mark.parametrize(("outputs", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_said(net, outputs, kind, message):
    with pytest.raises(ValueError, match=message):
        dense(Objective(net, cross_entropy, batches(), output_fn=outputs), kind)


@pytest.mark.parametrize("outputs", ["2", OUTPUTS["scalar loss"]], ids=["by name", "function"])
def test_batches_that_are_skipped_do_not_count(outputs):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(3, 3)).double()

    def skips(net, batch):
        return cross_entropy(net, batch) if len(batch[0]) == 5 else None

    objective = Objective(linear, skips, batches(), output_fn=outputs)
    # of a linear network the Gauss-Newton matrix is the Hessian
    assert torch.allclose(dense(objective, "gauss_newton"), dense(objective, "hessian"), atol=1e-12)


def test_outputs_before_the_last_parameters_are_refused(net):
    with pytest.raises(ValueError, match="act on the loss and not on the outputs"):
        dense(Objective(net, cross_entropy, batches(), output_fn="0"), "gauss_newton")


def test_what_the_step_writes_into_the_outputs_changes_nothing(net):
    def in_place(net, batch):
        return net(batch[0]).pow_(2).mean()

    def apart(net, batch):
        return net(batch[0]).pow(2).mean()

    written, plain = (
        dense(Objective(net, loss, batches(), output_fn="2"), "gauss_newton") for loss in (in_place, apart)
    )
    assert torch.equal(written, plain)


def test_a_module_that_runs_twice_is_not_the_output():
    layer = nn.Linear(3, 3).double()
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    with pytest.raises(ValueError, match="ran 2 times in one step"):
        dense(Objective(twice, cross_entropy, batches(), output_fn="0"), "gauss_newton")


def test_hooks_do_not_stay(net):
    with curvature_matrix(Objective(net, cross_entropy, batches(), output_fn="2"), "gauss_newton") as G:
        G(torch.ones(G.size, dtype=G.dtype))
    assert not net[2]._forward_hooks
