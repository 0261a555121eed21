import dataclasses
import itertools
import math

import pytest
import torch
from helpers.draws import Population, curvature, heterogeneous
from helpers.operators import generator
from scipy import stats

from lightning_dynamics.metrics import (
    DrawnCurvature,
    HeavyBall,
    UnresolvedGradientError,
    balance_ratio,
    batch_sharpness,
    batch_sharpness_ratio_of_means,
    gap_exponent,
    gni,
    gradient_curvature,
    gradient_sharpness,
    ias,
    minibatch_sharpness,
    plateaus,
    predicted_change,
    predicted_gni,
    sharpness_gap,
    squared_gradient_norm,
    update_edge,
)

REPEATS = 200


def subsets(n, b):
    return torch.tensor([*itertools.combinations(range(n), b)])


def covered(found, true, groups):
    """Share of the 95 % intervals that contain the true value."""
    t = float(stats.t.ppf(0.975, groups - 1))
    return sum(abs(each.value - true) <= t * each.error for each in found) / len(found)


def top(h):
    return torch.linalg.eigvalsh(h)[..., -1]


def own(g, h):
    return torch.einsum("...i,...ij,...j->...", g, h, g)


def truth(population, b, lr=0.1, momentum=0.9):
    """What the estimators are to find."""
    g, h, c = population.gradient, population.hessian, population.batch_covariance(b)
    along_full, norm, along = float(own(g, h) + (h @ c).trace()), float(g @ g), float(own(g, h))
    return {
        "squared_gradient_norm": norm,
        "gradient_curvature": along,
        "gradient_sharpness": along / norm,
        "gni": along_full / norm,
        "ias": along_full / (norm + float(c.trace())),
        "balance_ratio": along_full / (2 * (1 - momentum) / lr * norm + 2 * momentum / (1 + momentum) * along),
    }


ESTIMATORS = {
    "batch_sharpness": (batch_sharpness, 1),
    "batch_sharpness_ratio_of_means": (batch_sharpness_ratio_of_means, 1),
    "squared_gradient_norm": (squared_gradient_norm, 1),
    "gradient_curvature": (gradient_curvature, 2),
    "gradient_sharpness": (gradient_sharpness, 2),
    "gni": (gni, 2),
    "ias": (ias, 2),
    "balance_ratio": (lambda draws: balance_ratio([draws], 0.1, 0.9), 2),
}
"""Name: estimator, and how many draws are in a group."""


@pytest.fixture(scope="module")
def tables():
    """200 tables of 128 batches of 16 from 200 samples."""
    population = heterogeneous(push=0.7)
    g, h = population.of(population.draw(REPEATS, 128, b=16, seed=0))
    return [curvature(*each) for each in zip(g, h, strict=True)]


@pytest.fixture(scope="module")
def true():
    """Quantities of single batches from 60,000 of them: a twentieth of an error."""
    population = heterogeneous(push=0.7)
    g, h = population.of(population.draw(60_000, b=16, seed=1234))
    curved, squared = own(g, h), g.square().sum(1)
    return {
        **truth(population, 16),
        "batch_sharpness": float((curved / squared).mean()),
        "batch_sharpness_ratio_of_means": float(curved.mean() / squared.mean()),
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_errors_cover_the_truth_as_often_as_they_say(name, tables, true):
    estimator, size = ESTIMATORS[name]
    rate = covered([estimator(table) for table in tables], true[name], 128 // size)
    print(f"{name}: {rate:.3f}")
    assert 0.9 <= rate <= 0.99


@pytest.mark.parametrize("name", ["gni", "gradient_sharpness", "balance_ratio"])
def test_few_draws_of_a_weak_gradient_are_covered_where_they_resolve_it(name):
    """‖g‖² is 3.6 of its errors in the mean; three in five tables resolve it."""
    population = heterogeneous(push=0.7)
    g, h = population.of(population.draw(REPEATS, 16, b=16, seed=5))
    found = []
    for each in zip(g, h, strict=True):
        try:
            found.append(ESTIMATORS[name][0](curvature(*each)))
        except UnresolvedGradientError:
            continue
    rate = covered(found, truth(population, 16)[name], 8)
    print(f"{name}: {rate:.3f} of {len(found)}")
    assert 0.5 * REPEATS < len(found) < 0.95 * REPEATS
    assert 0.9 <= rate <= 0.99


@pytest.mark.parametrize(("n", "b"), [(3, 2), (4, 1)])
def test_estimates_that_are_no_ratios_are_unbiased_over_all_tuples_of_draws(n, b):
    """Four draws from all b-subsets."""
    population = heterogeneous(n, 2, 3)
    g, h = population.of(subsets(n, b))
    tables = [curvature(g[[*i]], h[[*i]]) for i in itertools.product(range(len(g)), repeat=4)]

    def mean(values):
        return float(torch.tensor([float(v) for v in values], dtype=torch.float64).mean())

    expected = truth(population, b)
    full = population.gradient @ population.hessian @ population.gradient
    noise = (population.hessian @ population.batch_covariance(b)).trace()
    assert mean(squared_gradient_norm(t).value for t in tables) == pytest.approx(expected["squared_gradient_norm"])
    assert mean(gradient_curvature(t).value for t in tables) == pytest.approx(expected["gradient_curvature"])
    assert mean(t.along_partner.mean() for t in tables) == pytest.approx(float(full + noise))
    ratios = own(g, h) / g.square().sum(1)
    assert mean(batch_sharpness(t).value for t in tables) == pytest.approx(float(ratios.mean()))
    tops, v = top(h), g[0]
    assert mean(
        minibatch_sharpness(tops[[*i]]).value for i in itertools.product(range(len(g)), repeat=2)
    ) == pytest.approx(float(tops.mean()))
    slopes, bends = g @ v, own(v, h)
    changes = [predicted_change(slopes[[*i]], bends[[*i]]).value for i in itertools.product(range(len(g)), repeat=2)]
    expected_change = population.gradient @ v + v @ population.hessian @ v / 2
    assert mean(changes) == pytest.approx(float(expected_change))


def test_the_pair_of_partners_finds_what_every_pair_would():
    """Numerators of GNI, IAS and gᵀHg from brute force over all draws of one table."""
    population = heterogeneous(30, 4, 1)
    g, h = population.of(population.draw(8, b=3, seed=0))
    table = curvature(g, h)
    triples = [g[i] @ h[m] @ g[j] for i, m, j in itertools.permutations(range(8), 3)]
    pairs = torch.einsum("ni,mij,nj->mn", g, h, g)
    off = pairs.sum() - pairs.diagonal().sum()
    by_partners = 7 * table.along_partner.sum()
    exact = torch.stack(triples).mean() + (off - by_partners) / (8 * 7 * 6)
    assert gradient_curvature(table).value == pytest.approx(float(exact))


def test_single_samples_of_linear_regression_have_closed_forms():
    population = heterogeneous(20, 4, 1)
    g, h = population.of(torch.arange(20)[:, None])
    table, lengths = curvature(g, h), population.inputs.square().sum(1)
    trace = float(population.hessian.trace())
    assert batch_sharpness(table).value == pytest.approx(trace)
    weights = g.square().sum(1)
    expected = float((weights * lengths).sum() / weights.sum())
    assert batch_sharpness_ratio_of_means(table).value == pytest.approx(expected)
    assert expected != pytest.approx(trace, rel=0.05)
    tops = top(h)
    assert minibatch_sharpness(tops).value == pytest.approx(trace)
    values, vectors = torch.linalg.eigh(population.hessian)
    gap = sharpness_gap(tops, own(vectors[:, -1], h))
    assert gap.value == pytest.approx(trace - float(values[-1]))


def test_smaller_batches_are_sharper_over_all_subsets():
    population = heterogeneous(8, 3, 2)
    found = []
    for b in range(1, 9):
        g, h = population.of(subsets(8, b))
        found.append(minibatch_sharpness(top(h)).value)
        away = g - population.gradient
        assert torch.allclose(away.mT @ away / len(g), population.batch_covariance(b), rtol=1e-10, atol=1e-12)
        vector = torch.linalg.eigh(population.hessian).eigenvectors[:, -1]
        gap = sharpness_gap(top(h), own(vector, h))
        assert gap.value == pytest.approx(found[-1] - float(top(population.hessian)), abs=1e-12)
        assert bool((top(h) - own(vector, h) > -1e-12).all())
        if b < 8:
            assert float((own(g, h) / g.square().sum(1)).mean()) <= found[-1]
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[-1] == pytest.approx(float(top(population.hessian)))


def test_with_the_whole_population_all_agree_and_stay_below_the_sharpness():
    population = heterogeneous(8, 3, 2)
    g, h = population.of(torch.arange(8).expand(6, 8))
    table = curvature(g, h)
    along = population.gradient @ population.hessian @ population.gradient / population.gradient.square().sum()
    for estimator in (batch_sharpness, batch_sharpness_ratio_of_means, gni, ias, gradient_sharpness):
        found = estimator(table)
        assert found.value == pytest.approx(float(along))
        assert found.error == pytest.approx(0, abs=1e-7)
    assert float(along) < 0.99 * float(top(population.hessian))


def test_a_gradient_that_is_not_resolved_divides_nothing():
    population = heterogeneous(push=0.0)
    population = Population(population.inputs, population.gradients - population.gradient)
    table = curvature(*population.of(population.draw(16, b=8, seed=0)))
    for estimator in (gni, gradient_sharpness, lambda t: balance_ratio([t], 0.1)):
        with pytest.raises(UnresolvedGradientError, match="errors from zero"):
            estimator(table)
    assert ias(table).value > 0
    assert batch_sharpness(table).value > 0


def test_batches_without_a_gradient_are_named():
    population = heterogeneous(20, 4, 1)
    g, h = population.of(population.draw(6, b=2, seed=0))
    g[2] = 0
    table = curvature(g, h)
    with pytest.raises(UnresolvedGradientError, match="1 of 6 batches have no gradient"):
        batch_sharpness(table)
    assert batch_sharpness_ratio_of_means(table).value > 0
    nothing = curvature(g * 0, h)
    for estimator in (batch_sharpness_ratio_of_means, ias, gni):
        with pytest.raises(UnresolvedGradientError):
            estimator(nothing)


@pytest.mark.parametrize(("momentum", "lr"), [(0.0, 0.1), (0.5, 0.05), (0.9, 0.3)])
def test_sgd_on_a_quadratic_with_white_noise_is_in_balance(momentum, lr):
    """2,000 runs in step; the states at five times, estimated from their own draws."""
    n, b, steps, runs = 60, 10, 400, 2_000
    random = generator(3)
    h = torch.tensor([4.0, 2.0, 0.7], dtype=torch.float64)
    shifts = torch.randn(n, 3, generator=random, dtype=torch.float64)
    shifts = shifts - shifts.mean(0)
    noise_covariance = shifts.mT @ shifts / n * (n - b) / (b * (n - 1))
    noise = torch.linalg.cholesky(noise_covariance)
    theta = torch.zeros(runs, 3, dtype=torch.float64)
    buffer = torch.zeros_like(theta)
    above, norm, along, states = 0.0, 0.0, 0.0, []
    for step in range(steps):
        white = torch.randn(runs, 3, generator=random, dtype=torch.float64) @ noise.mT
        if step >= steps // 2:
            g = theta * h
            above += float((g.square() * h).sum(1).mean()) + float(h @ noise_covariance.diagonal())
            norm += float(g.square().sum(1).mean())
            along += float((g.square() * h).sum(1).mean())
            if step % 40 == 0:
                states.append(theta[0].clone())
        buffer = momentum * buffer + theta * h + white
        theta = theta - lr * buffer
    prediction = predicted_gni(lr, momentum, along / norm)
    assert above / norm == pytest.approx(prediction, rel=0.01)
    assert abs(prediction - 2 / lr) > 0.1 * prediction or momentum == 0

    def table(state, draws):
        g = state * h + shifts[draws].mean(1)
        return curvature(g, h.diag().expand(len(draws), 3, 3))

    picked = [torch.rand(256, n, generator=random).argsort(1)[:, :b] for _ in states]
    found = balance_ratio([table(s, d) for s, d in zip(states, picked, strict=True)], lr, momentum)
    g = torch.stack(states) * h
    exact = (g.square() * h).sum() + len(states) * h @ noise_covariance.diagonal()
    exact = exact / (
        2 * (1 - momentum) / lr * g.square().sum() + 2 * momentum / (1 + momentum) * (g.square() * h).sum()
    )
    assert abs(found.value - float(exact)) < 3 * found.error
    assert found.error < 0.3 * found.value


@pytest.mark.parametrize("shared", [True, False])
def test_the_balance_over_several_points_is_covered_with_shared_and_with_own_draws(shared):
    points, rates = [heterogeneous(push=push) for push in (0.7, 0.9, 1.1)], [0.1, 0.2, 0.05]
    norm = [float(p.gradient.square().sum()) for p in points]
    along = [float(own(p.gradient, p.hessian)) for p in points]
    above = sum(a + float((p.hessian @ p.batch_covariance(16)).trace()) for a, p in zip(along, points, strict=True))
    below = sum(2 * 0.5 / r * n + 2 * 0.5 / 1.5 * a for r, n, a in zip(rates, norm, along, strict=True))
    draws = [points[0].draw(REPEATS, 64, b=16, seed=0 if shared else i) for i in range(3)]
    found = []
    for r in range(REPEATS):
        tables = [curvature(*p.of(d[r])) for p, d in zip(points, draws, strict=True)]
        found.append(balance_ratio(tables, rates, 0.5))
    rate = covered(found, above / below, 32)
    print(f"balance of three points, shared draws {shared}: {rate:.3f}")
    assert 0.9 <= rate <= 0.99


def test_a_balance_needs_points_that_fit():
    table = curvature(*heterogeneous(20, 4, 1).of(heterogeneous(20, 4, 1).draw(8, b=10, seed=0)))
    short = curvature(*heterogeneous(20, 4, 1).of(heterogeneous(20, 4, 1).draw(6, b=10, seed=0)))
    bare = dataclasses.replace(table, dots_image=None)
    with pytest.raises(ValueError, match="One learning rate for each point"):
        balance_ratio([table, table], [0.1])
    with pytest.raises(ValueError, match="One learning rate for each point"):
        balance_ratio([], 0.1)
    with pytest.raises(ValueError, match="as many draws"):
        balance_ratio([table, short], 0.1)
    with pytest.raises(ValueError, match="were not measured"):
        balance_ratio([bare], 0.1, 0.9)
    without_momentum = balance_ratio([bare], 0.1)
    assert without_momentum.value == pytest.approx(gni(table).value / 20)
    with pytest.raises(ValueError, match="were not measured"):
        gradient_sharpness(bare)


def test_minibatch_sharpness_and_its_gap_are_covered():
    population, m = heterogeneous(push=0.7), 32
    _, h = population.of(population.draw(1_000, m, b=16, seed=7))
    tops = top(h)
    values, vectors = torch.linalg.eigh(h.mean(1))
    along = torch.einsum("ri,rmij,rj->rm", vectors[..., -1], h, vectors[..., -1])
    assert torch.allclose(along.mean(1), values[:, -1])
    gaps = (tops - along).mean(1)
    rate = covered([minibatch_sharpness(t) for t in tops[:REPEATS]], float(tops.mean()), m)
    pooled = covered(
        [sharpness_gap(*each) for each in zip(tops[:REPEATS], along[:REPEATS], strict=True)], float(gaps.mean()), m
    )
    print(f"minibatch_sharpness: {rate:.3f}, sharpness_gap: {pooled:.3f}")
    assert 0.9 <= rate <= 0.99
    assert 0.9 <= pooled <= 0.99
    whole = float(tops.mean() - top(population.hessian))
    excess = float(values[:, -1].mean() - top(population.hessian))
    assert whole == pytest.approx(float(gaps.mean()) + excess)
    assert 0 < excess < 0.1 * whole
    with pytest.raises(ValueError, match="entries for 32 draws"):
        sharpness_gap(tops[0], along[0, 1:])


def test_gradient_descent_has_half_of_the_step_size_times_its_curvature():
    population, lr = heterogeneous(20, 4, 1), 0.1
    g, h = population.gradient, population.hessian
    update = -lr * g
    found = update_edge((g @ update)[None], (update @ h @ update)[None])
    assert found.value == pytest.approx(lr / 2 * float(g @ h @ g / (g @ g)))
    assert found.error is None


def test_a_step_of_ratio_one_gains_nothing_whatever_made_it():
    population = heterogeneous(20, 4, 1)
    g, h = population.gradient, population.hessian
    direction = -(g + 0.3 * torch.randn(4, generator=generator(1), dtype=torch.float64))
    for length, ratio in ((1.0, 1.0), (0.5, 0.5), (2.0, 2.0)):
        update = direction * length * -2 * (g @ direction) / own(direction, h)
        slope, bend = (g @ update)[None], own(update, h)[None]
        change = float(g @ update + update @ h @ update / 2)
        assert update_edge(slope, bend).value == pytest.approx(ratio)
        assert predicted_change(slope, bend).value == pytest.approx(change, abs=1e-12)
        assert math.copysign(1, change + 1e-12 * (ratio - 1)) == math.copysign(1, ratio - 1 + 1e-15)


def test_errors_of_the_update_edge_and_of_the_predicted_change_are_covered():
    population = heterogeneous(push=0.7)
    update = -0.3 * (population.gradient + 0.2)
    g, h = population.of(population.draw(REPEATS, 32, b=16, seed=0))
    slopes, bends = g @ update, own(update, h)
    slope, bend = float(population.gradient @ update), float(own(update, population.hessian))
    rate = covered([update_edge(*each) for each in zip(slopes, bends, strict=True)], -bend / 2 / slope, 32)
    changes = [predicted_change(*each) for each in zip(slopes, bends, strict=True)]
    again = covered(changes, slope + bend / 2, 32)
    print(f"update_edge: {rate:.3f}, predicted_change: {again:.3f}")
    assert 0.9 <= rate <= 0.99
    assert 0.9 <= again <= 0.99


def test_an_update_across_the_gradient_has_no_edge():
    slopes = torch.randn(16, generator=generator(0), dtype=torch.float64)
    with pytest.raises(UnresolvedGradientError, match="The slope of the loss along the update"):
        update_edge(slopes, slopes.square())
    with pytest.raises(ValueError, match="15 entries for 16 draws"):
        update_edge(slopes, slopes[1:])


def test_plateaus_are_those_of_the_optimizer():
    assert plateaus(0.1) == pytest.approx((20, 20))
    assert plateaus(0.1, 0.9) == pytest.approx((2, HeavyBall(0.1, 0.9).edge))
    assert plateaus(0.1, 0.9, nesterov=True) == pytest.approx((2, 3.8 / 0.28))
    assert predicted_gni(0.1, 0.0, 5.0) == pytest.approx(20)
    # on the upper edge itself both agree
    assert predicted_gni(0.1, 0.9, 38.0) == pytest.approx(38)
    for bad in ((0.0, 0.0), (math.inf, 0.0), (0.1, 1.0), (0.1, -0.1)):
        with pytest.raises(ValueError):
            plateaus(*bad)


def test_the_exponent_of_a_power_is_found_and_covered():
    sizes = [2, 4, 8, 16, 32]
    exact = gap_exponent(sizes, [3 / b for b in sizes], [0.1 / b for b in sizes])
    assert exact.value == pytest.approx(-1)
    random, found = generator(0), []
    for _ in range(400):
        errors = torch.tensor([0.1 * b**-0.5 * (1 + b / 16) for b in sizes], dtype=torch.float64)
        gaps = torch.tensor([b**-0.5 for b in sizes], dtype=torch.float64)
        gaps = gaps + errors * torch.randn(5, generator=random, dtype=torch.float64)
        if bool((gaps > 0).all()):
            found.append(gap_exponent(sizes, gaps.tolist(), errors.tolist()))
    hits = sum(abs(each.value + 0.5) <= 1.96 * each.error for each in found) / len(found)
    print(f"gap_exponent: {hits:.3f}")
    assert 0.93 <= hits <= 0.99


def test_points_off_the_line_widen_the_error_of_the_exponent():
    sizes, errors = [1, 4, 16, 64], [1e-3] * 4
    assert (
        gap_exponent(sizes, [1.0, 0.6, 0.2, 0.1], errors).error
        > 20 * gap_exponent(sizes, [b**-0.5 for b in sizes], errors).error
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1.0, 0.5], [0.1, 0.1]), "three different"),
        (([1, 2, 2], [1.0, 0.5, 0.5], [0.1] * 3), "three different"),
        (([1, 2, 4], [1.0, 0.5, -0.1], [0.1] * 3), "All gaps must be positive"),
        (([1, 2, 4], [1.0, 0.5, 0.1], [0.1, 0.1, 0.0]), "All errors must be positive"),
        (([1, 2, 4], [1.0, 0.5], [0.1] * 3), "As many sizes"),
    ],
)
def test_an_exponent_needs_three_positive_gaps(arguments, message):
    with pytest.raises(ValueError, match=message):
        gap_exponent(*arguments)


def test_a_table_must_be_whole():
    def table(**changes):
        column = torch.ones(6)
        columns = dict.fromkeys(["squared_norms", "along_own", "along_partner", "dots_mean"], column)
        return DrawnCurvature(**{**columns, "mean_squared_norm": 1.0, **changes})

    assert table().squared_norms.dtype == torch.float64
    assert len(table()) == 6
    with pytest.raises(ValueError, match="even number of draws"):
        table(squared_norms=torch.ones(5))
    with pytest.raises(ValueError, match="at least 4; got 2"):
        table(squared_norms=torch.ones(2))
    with pytest.raises(ValueError, match="`along_own` has 4 entries for 6 draws"):
        table(along_own=torch.ones(4))
    with pytest.raises(ValueError, match="`dots_image` has entries that are not finite"):
        table(dots_image=torch.full((6,), math.nan))
    with pytest.raises(ValueError, match="`along_partner` must have shape"):
        table(along_partner=torch.ones(6, 1))
    with pytest.raises(ValueError, match="`mean_squared_norm`"):
        table(mean_squared_norm=math.inf)
