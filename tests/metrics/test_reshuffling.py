import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch
from helpers.operators import generator, random_symmetric

from lightning_dynamics.metrics import drift_weight, epoch_drift, weighted_trace


def quadratics(k, p, spread, seed=0, saddle=False):
    """Losses ½θᵀH_aθ + c_aᵀθ of k batches: H_a ``(k, p, p)`` and c_a ``(k, p)``; Σc_a = 0 and μ < 0 at a saddle."""
    g = generator(seed)
    noise = torch.randn(k, p, p, generator=g, dtype=torch.float64)
    tilt = torch.randn(k, p, generator=g, dtype=torch.float64)
    h = random_symmetric([9.0, 1.5, -1.0][:p] if p <= 3 else torch.linspace(-1, 9, p), seed)
    c = torch.zeros(p, dtype=torch.float64) if saddle else torch.randn(p, generator=g, dtype=torch.float64)
    noise = (noise + noise.mT) / 2
    return h + spread * (noise - noise.mean(0)), c + spread * (tilt - tilt.mean(0))


def end(h, c, start, lr, order):
    theta = start
    for a in order:
        theta = theta - lr * (h[a] @ theta + c[a])
    return theta


def gradient_descent(h, c, start, lr, steps):
    return end(h.mean(0)[None], c.mean(0)[None], start, lr, [0] * steps)


def mean_end(h, c, start, lr, orders):
    return torch.stack([end(h, c, start, lr, order) for order in orders]).mean(0)


def relative_error(spread, k, lr, seed, start):
    h, c = quadratics(k, 3, spread, seed)
    true = mean_end(h, c, start, lr, itertools.permutations(range(k))) - gradient_descent(h, c, start, lr, k)
    found = epoch_drift(h, h @ start + c, lr)
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize(
    "x", [0.0, 1e-9, -1e-9, 1e-3, -1e-3, 0.5, -0.5, 0.999, 1.0, 1.001, -1.0, 7.0, -7.0, 1e3, -600.0]
)
def test_the_weight_is_exact_to_rounding(x):
    getcontext().prec = 60
    y = Decimal(x)
    expected = 0.5 if x == 0 else float(((-y).exp() - 1 + y) / y**2)
    assert float(drift_weight(x)) == pytest.approx(expected, rel=1e-14)


def test_the_weight_has_its_limits_and_falls():
    assert float(drift_weight(1e8)) == pytest.approx(1e-8, rel=1e-7)
    assert float(drift_weight(-1000.0)) == math.inf
    x = torch.linspace(-30, 30, 601)
    weights = drift_weight(x)
    assert weights.shape == x.shape
    assert weights.dtype == torch.float64
    assert bool((weights.diff() < 0).all())


def test_flat_and_negative_directions_count_most():
    found = weighted_trace([1.0, 2.0, 3.0], [5.0, 0.0, -4.0], 0.5, 0.1, 10)
    expected = float(drift_weight(5.0)) + 2 * 0.5 + 3 * float(drift_weight(-4.0)) + 0.25
    assert found == pytest.approx(expected)
    assert weighted_trace([], [], 3.0, 0.1, 10) == 1.5
    with pytest.raises(ValueError, match="One eigenvalue per variance"):
        weighted_trace([1.0], [1.0, 2.0], 0.0, 0.1, 10)


@pytest.mark.parametrize("k", [3, 4, 6])
@pytest.mark.parametrize("lr", [0.1, 0.02])
def test_the_mean_over_all_permutations_approaches_the_drift(k, lr):
    """The relative error falls in proportion to the noise."""
    start = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    large, small = (relative_error(s, k, lr, 3, start) for s in (1e-2, 1e-3))
    assert small < 5e-3
    assert small < 0.15 * large


def test_the_drift_of_two_batches_is_exact():
    start = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    assert relative_error(0.5, 2, 0.1, 3, start) < 1e-12


def test_with_replacement_there_is_no_drift():
    h, c = quadratics(4, 3, 0.5, 1)
    start = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    found = mean_end(h, c, start, 0.1, itertools.product(range(4), repeat=4))
    assert torch.allclose(found, gradient_descent(h, c, start, 0.1, 4), rtol=0, atol=1e-14)


def test_reshuffling_leaves_a_saddle_where_others_stay():
    k, lr, zero = 5, 0.1, torch.zeros(3, dtype=torch.float64)
    errors = []
    for spread in (0.1, 0.01):
        h, c = quadratics(k, 3, spread, 2, saddle=True)
        assert float(torch.linalg.eigvalsh(h.mean(0))[0]) < 0
        assert float(gradient_descent(h, c, zero, lr, k).norm()) < 1e-15
        true = mean_end(h, c, zero, lr, itertools.permutations(range(k)))
        drift = epoch_drift(h, c, lr)
        assert float(true.norm()) > 1e-7
        errors.append(float((drift - true).norm() / true.norm()))
        sequences = itertools.product(range(k), repeat=k)
        assert float(mean_end(h, c, zero, lr, sequences).norm()) < 1e-14
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0]


def test_small_steps_follow_the_gradient_of_the_noise():
    """-(η²k/4)·∇ tr Cov_a(g_a)."""
    k, lr = 6, 1e-6
    h, c = quadratics(k, 3, 0.3, 4)
    start = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, requires_grad=True)
    g = h @ start + c
    (slope,) = torch.autograd.grad((g - g.mean(0)).square().sum() / k, start)
    expected = -(lr**2) * k / 4 * slope
    assert torch.allclose(epoch_drift(h, g, lr), expected, rtol=1e-3, atol=0)


def test_equal_batches_have_no_drift_and_shapes_are_checked():
    h, c = quadratics(4, 3, 0.0)
    assert float(epoch_drift(h, c, 0.1).abs().max()) < 1e-16
    for bad in ((h, c[:3]), (h[:, :2], c), (h[:1], c[:1]), (h[0], c)):
        with pytest.raises(ValueError, match="Shapes"):
            epoch_drift(*bad, 0.1)
    with pytest.raises(ValueError, match="`lr`"):
        epoch_drift(h, c, math.nan)
