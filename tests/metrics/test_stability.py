"""The edge against the spectral radius of what PyTorch's optimizers really do."""

import pytest
import torch
from helpers.operators import generator
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from lightning_dynamics.metrics import sam_oscillation, stability_rule

F64 = torch.float64


def parameters(*sizes):
    return {f"p{i}": nn.Parameter(torch.randn(n, generator=generator(i), dtype=F64)) for i, n in enumerate(sizes)}


def ratio(rule, hessian, shapes):
    scale, shift = rule.diagonals(shapes, torch.empty(0, dtype=F64))
    matrix = scale[:, None] * (hessian + torch.diag(shift)) * scale[None]
    return float(torch.linalg.eigvalsh(matrix)[-1]) / 2


def random_hessian(size, seed):
    half = torch.randn(size, size, generator=generator(seed), dtype=F64)
    return half @ half.mT


def choose(draw, options):
    return options[int(torch.randint(len(options), (), generator=draw))]


def uniform(draw, low, high):
    return low + (high - low) * float(torch.rand((), generator=draw))


def random_group(draw, parameter, kind):
    group = {"params": [parameter], "lr": uniform(draw, 0.01, 0.2), "weight_decay": choose(draw, [0.0, 0.3])}
    if kind is SGD:
        group["momentum"] = choose(draw, [0.0, 0.5, 0.9])
        group["nesterov"] = group["momentum"] > 0 and choose(draw, [True, False])
        group["dampening"] = 0.0 if group["nesterov"] else choose(draw, [0.0, 0.3])
    elif kind is RMSprop:
        group.update(momentum=choose(draw, [0.0, 0.8]), centered=choose(draw, [True, False]), alpha=FROZEN)
    else:
        group.update(betas=(choose(draw, [0.0, 0.5, 0.9]), FROZEN), amsgrad=choose(draw, [True, False]))
    return group


FROZEN = 1 - 1e-13  # second moments that one step does not change
LONG = 1e15  # steps after which their bias correction is 1


def give_state(optimizer, draw):
    for group in optimizer.param_groups:
        for p in group["params"]:
            second = torch.rand(p.shape, generator=draw, dtype=F64) + 0.3
            if isinstance(optimizer, RMSprop):
                state = {"step": torch.tensor(LONG), "square_avg": second}
                if group["momentum"] > 0:
                    state["momentum_buffer"] = torch.zeros_like(p)
                if group["centered"]:
                    state["grad_avg"] = 0.3 * torch.rand(p.shape, generator=draw, dtype=F64)
            elif isinstance(optimizer, (Adam, AdamW)):
                state = {"step": torch.tensor(LONG), "exp_avg": torch.zeros_like(p), "exp_avg_sq": second}
                if group["amsgrad"]:
                    state["max_exp_avg_sq"] = 2 * second
            else:
                state = {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}
            optimizer.state[p] = state


MEMORY = ("momentum_buffer", "exp_avg")


def update_matrix(optimizers, params, hessian):
    """One step of the real optimizers on θᵀHθ/2 as a linear map of (θ, their memory), column by column."""
    slots = [p.data for p in params.values()]
    for optimizer in optimizers:
        for p in params.values():
            slots += [optimizer.state[p][key] for key in MEMORY if key in optimizer.state.get(p, {})]
    frozen = [
        (optimizer.state[p], key, value.clone())
        for optimizer in optimizers
        for p in params.values()
        for key, value in optimizer.state.get(p, {}).items()
        if key not in MEMORY
    ]
    sizes = [slot.numel() for slot in slots]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=F64):
        for slot, part in zip(slots, unit.split(sizes), strict=True):
            slot.copy_(part)
        theta = torch.cat([p.detach() for p in params.values()])
        for p, part in zip(params.values(), (hessian @ theta).split([p.numel() for p in params.values()]), strict=True):
            p.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
        columns.append(torch.cat(slots).clone())
        for state, key, value in frozen:
            state[key].copy_(value)
    return torch.stack(columns, 1)


def spectral_radius(matrix):
    return float(torch.linalg.eigvals(matrix).abs().max())


@pytest.mark.parametrize("kinds", [(SGD,), (RMSprop,), (Adam,), (AdamW,), (SGD, Adam), (SGD, RMSprop, AdamW)])
def test_random_mixtures_lose_stability_exactly_at_ratio_one(kinds):
    """134 random mixtures each, 804 in all; none is off."""
    for seed in range(134):
        draw = generator(1000 + seed)
        params = parameters(2, 1, 2)
        groups = {kind: [] for kind in kinds}
        for p in params.values():
            kind = choose(draw, kinds)
            groups[kind].append(random_group(draw, p, kind))
        optimizers = [kind(members, lr=0.1) for kind, members in groups.items() if members]
        for optimizer in optimizers:
            give_state(optimizer, draw)
        rule = stability_rule(optimizers, params)
        assert rule.unavailable is None
        hessian = random_hessian(5, seed)
        shapes = {name: p.shape for name, p in params.items()}
        _, shift = rule.diagonals(shapes, torch.empty(0, dtype=F64))
        # rescale H + W as a whole to put it just below and just above the edge
        total = hessian + torch.diag(shift)
        at_edge = total / ratio(rule, hessian, shapes)
        for factor, stable in ((0.999, True), (1.001, False)):
            candidate = factor * at_edge - torch.diag(shift)
            assert ratio(rule, candidate, shapes) == pytest.approx(factor, rel=1e-9)
            radius = spectral_radius(update_matrix(optimizers, params, candidate))
            assert (radius <= 1 + 1e-7) == stable, (seed, [o.param_groups for o in optimizers])


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (lambda p: SGD(p, lr=0.1), 20.0),
        (lambda p: SGD(p, lr=0.1, dampening=0.5), 20.0),  # without momentum dampening does nothing
        (lambda p: SGD(p, lr=0.1, momentum=0.9), 38.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5), 76.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 0.28),
        (lambda p: SGD(p, lr=0.1, weight_decay=0.5), 19.5),
        (lambda p: SGD(p, lr=torch.tensor(0.1)), 20.0),
    ],
)
def test_thresholds_that_are_one_number(optimizer, threshold):
    params = parameters(2, 3)
    rule = stability_rule([optimizer(params.values())], params)
    assert rule.threshold == pytest.approx(threshold, rel=1e-6)


def test_divergence_just_above_the_threshold_and_not_below():
    for factor, diverges in ((0.98, False), (1.02, True)):
        p = nn.Parameter(torch.tensor([1.0], dtype=F64))
        optimizer = SGD([p], lr=0.1, momentum=0.9)
        curvature = factor * stability_rule([optimizer], {"p": p}).threshold
        for _ in range(2000):
            optimizer.zero_grad()
            (curvature * p.square().sum() / 2).backward()
            optimizer.step()
        assert (abs(float(p.detach())) > 1) == diverges


def test_the_usual_adamw_setup_has_a_ratio_but_no_single_threshold():
    """Weight decay on matrices only, as everyone does it."""
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()
    decay = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() < 2]
    optimizer = AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2)
    net(torch.randn(4, 3, dtype=F64)).square().mean().backward()
    optimizer.step()
    rule = stability_rule([optimizer], dict(net.named_parameters()))
    assert rule.unavailable is None
    assert rule.threshold is None
    assert "AdamW(lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)" in rule.description


def test_adam_at_a_uniform_preconditioner_is_38_over_eta():
    p = nn.Parameter(torch.zeros(4, dtype=F64))
    optimizer = Adam([p], lr=0.01, eps=0.0)
    for _ in range(200):
        p.grad = torch.full((4,), 2.0, dtype=F64)
        optimizer.step()
    scale, _ = stability_rule([optimizer], {"p": p}).diagonals({"p": p.shape}, torch.empty(0, dtype=F64))
    bias = 1 - 0.9**200
    torch.testing.assert_close(2 / scale**2, torch.full((4,), 38 / 0.01 * 2.0 * bias, dtype=F64))


def test_early_adam_steps_carry_the_bias_correction():
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = Adam([p], lr=0.01, eps=0.0)
    p.grad = torch.full((1,), 3.0, dtype=F64)
    optimizer.step()
    scale, _ = stability_rule([optimizer], {"p": p}).diagonals({"p": p.shape}, torch.empty(0, dtype=F64))
    # P = (1 - 0.9)·3
    torch.testing.assert_close(scale**2, torch.tensor([0.01 * 0.1 / (0.1 * 3.0 * 1.9)], dtype=F64))


def test_parameters_in_no_optimizer_do_not_move():
    params = parameters(2, 2)
    rule = stability_rule([SGD([params["p0"]], lr=0.1)], params)
    assert rule.scales["p1"] == 0.0
    assert rule.threshold is None
    hessian = torch.diag(torch.tensor([1.0, 5.0, 100.0, 100.0], dtype=F64))
    assert ratio(rule, hessian, {n: p.shape for n, p in params.items()}) == pytest.approx(0.25)


def test_parameters_that_never_had_a_gradient_are_left_out():
    params = parameters(2, 2)
    optimizer = Adam(params.values(), lr=0.1)
    params["p0"].grad = torch.ones(2, dtype=F64)
    optimizer.step()
    rule = stability_rule([optimizer], params)
    assert rule.unavailable is None
    assert rule.scales["p1"] == 0.0


class MySGD(SGD):
    pass


@pytest.mark.parametrize(
    ("optimizers", "reason"),
    [
        (lambda p: [NAdam(p.values())], "NAdam is not an optimizer whose edge is known"),
        (lambda p: [MySGD(p.values(), lr=0.1)], "MySGD is not an optimizer whose edge is known"),
        (lambda p: [SGD(p.values(), lr=0.1, maximize=True)], "maximizes"),
        (lambda p: [SGD(p.values(), lr=0.0)], "the learning rate is 0"),
        (lambda p: [Adam(p.values(), lr=0.0)], "the learning rate is 0"),
        (lambda p: [Adam(p.values(), lr=0.1)], "has not taken a step yet"),
        (lambda p: [RMSprop(p.values(), lr=0.1)], "has not taken a step yet"),
        (lambda p: [SGD(p.values(), lr=0.1), SGD([p["p0"]], lr=0.1)], "p0 belongs to two optimizers"),
        (lambda p: [], "no measured parameter belongs to an optimizer"),
        (lambda p: [AdamW(p.values(), lr=2.0, weight_decay=1.0)], "decoupled weight decay alone is unstable"),
    ],
)
def test_where_there_is_no_ratio_the_reason_is_given(optimizers, reason):
    params = parameters(2, 1)
    rule = stability_rule(optimizers(params), params)
    assert reason in rule.unavailable
    assert reason in rule.description
    assert rule.threshold is None
    assert rule.is_unknown == any(word in reason for word in ("known", "maximizes", "two optimizers"))


@pytest.mark.skipif("decoupled_weight_decay" not in Adam.__init__.__code__.co_varnames, reason="newer torch")
def test_adam_with_decoupled_decay_is_adamw():
    params = parameters(3)
    both = [Adam(params.values(), lr=0.1, weight_decay=0.4, decoupled_weight_decay=True)]
    same = [AdamW(params.values(), lr=0.1, weight_decay=0.4)]
    for optimizer in (both[0], same[0]):
        give_state(optimizer, generator(3))
    one, other = stability_rule(both, params), stability_rule(same, params)
    assert torch.equal(one.scales["p0"], other.scales["p0"])
    assert one.shifts == other.shifts


@pytest.mark.parametrize("kind", [Adam, RMSprop])
def test_complex_parameters_count_as_their_real_coordinates(kind):
    z = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    rules = []
    for parameter in (z, x):
        optimizer = kind([parameter], 0.1)
        pair = torch.view_as_real(parameter) if parameter.is_complex() else parameter
        (pair.square() * torch.arange(4.0).view(2, 2)).sum().backward()
        optimizer.step()
        rules.append(stability_rule([optimizer], {"p": parameter}))
    scales = [rule.diagonals({"p": torch.Size([2, 2])}, torch.empty(0))[0] for rule in rules]
    torch.testing.assert_close(*scales)


def sharpened_by_hand(curvatures, optimizer, reach_of, steps):
    """SAM on a quadratic with this diagonal Hessian: weights and the last gradient's norm."""
    diagonal = torch.tensor(curvatures, dtype=F64)
    weights = nn.Parameter(torch.tensor([0.03, -0.02, 0.01], dtype=F64)[: len(curvatures)])
    descent, norm = optimizer([weights]), 0.0
    for _ in range(steps):
        gradient = diagonal * weights.detach()
        norm = float(gradient.norm())
        weights.grad = diagonal * (weights.detach() + reach_of(norm) * gradient)
        descent.step()
    return weights.detach(), norm


@pytest.mark.parametrize("curvature", [5.0, 10.0, 15.0, 19.0])
@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_sam_ends_in_an_oscillation_at_any_stable_curvature(curvature, momentum):
    """The number is 1 there, and the edge of the base optimizer far away: no sign of instability."""
    threshold = 2 * (1 + momentum) / 0.1
    _, norm = sharpened_by_hand(
        [curvature, 0.6 * curvature, 0.1],
        lambda p: SGD(p, 0.1, momentum=momentum),
        lambda norm: 0.05 / norm,
        600,
    )
    value, error = sam_oscillation(curvature, threshold, 0.05 / norm)
    assert value == pytest.approx(1, abs=1e-6)
    assert error == 0
    if momentum == 0:
        assert norm == pytest.approx(curvature * 0.1 * curvature * 0.05 / (2 - 0.1 * curvature), rel=1e-6)


def test_unnormalized_sam_has_an_edge_of_its_own():
    """At the curvature (√(1 + 8ρ/η) - 1)/2ρ it loses stability, and there alone the number is 1."""
    rate, rho = 0.1, 0.05
    edge = ((1 + 8 * rho / rate) ** 0.5 - 1) / (2 * rho)
    assert edge < 2 / rate
    assert sam_oscillation(edge, 2 / rate, rho)[0] == pytest.approx(1, rel=1e-12)
    for factor, grows in ((1.01, True), (0.99, False)):
        weights, _ = sharpened_by_hand([factor * edge], lambda p: SGD(p, rate), lambda norm: rho, 500)
        assert (float(weights.abs()) > 0.03) is grows


def test_the_bound_of_an_oscillation_contains_what_the_curvatures_bound_allows():
    value, error = sam_oscillation(7.0, 20.0, 0.3, bound=0.5)
    ends = [sam_oscillation(7.0 + d, 20.0, 0.3)[0] for d in (-0.5, 0.5)]
    assert max(abs(end - value) for end in ends) == pytest.approx(error, rel=1e-12)
    assert sam_oscillation(7.0, 20.0, 0.0, bound=0.5) == (0.35, 0.025)
