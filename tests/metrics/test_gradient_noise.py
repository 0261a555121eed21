import itertools
import math

import pytest
import torch
from helpers.draws import gradients, heterogeneous, moments
from helpers.operators import generator
from scipy import stats

from lightning_dynamics.metrics import (
    DrawnGradients,
    SampleMoments,
    UnresolvedGradientError,
    autocorrelation,
    directional_variances,
    fisher_trace,
    mean_of_subset,
    modified_loss_terms,
    noise_scale,
    noise_share,
    noise_trace,
    reshuffling_autocorrelation,
    sample_noise_trace,
    signal_to_noise,
    squared_batch_norm,
    squared_gradient_norm,
    tail_index,
    trace_from_samples,
    trace_of_subset,
    weighted_noise_trace,
    weighted_trace,
)

REPEATS, DRAWS, LR, EPOCH = 200, 64, 0.1, 25


def covered(found, true, groups):
    """Share of the 95 % intervals that contain the true value."""
    t = float(stats.t.ppf(0.975, groups - 1))
    return sum(abs(each.value - true) <= t * each.error for each in found) / len(found)


def mean(values):
    return float(torch.tensor([*values], dtype=torch.float64).mean())


def outer(population):
    """The two top eigenpairs of the Hessian and the bottom one."""
    values, vectors = torch.linalg.eigh(population.hessian)
    return values[[-1, -2, 0]], vectors.mT[[-1, -2, 0]]


def truth(population, b):
    values, vectors = outer(population)
    norm, c = float(population.gradient.square().sum()), population.batch_covariance(b)
    trace, samples = float(c.trace()), float(population.covariance.trace())
    variances = [float(v @ c @ v) for v in vectors]
    return {
        "noise_trace": trace,
        "sample_noise_trace": samples,
        "squared_batch_norm": norm + trace,
        "signal_to_noise": norm / trace,
        "noise_scale": samples / norm,
        "variance_top": variances[0],
        "variance_bottom": variances[2],
        "noise_share": sum(variances) / trace,
        "weighted_noise_trace": weighted_trace(variances, values, trace - sum(variances), LR, EPOCH),
        "modified_loss_full": LR / 4 * norm,
        "modified_loss_batches": LR / 4 * (norm + trace),
        "fisher_trace": samples + norm,
        "trace_from_samples": samples,
    }


POPULATION = heterogeneous(push=0.7)
ESTIMATORS = {
    "noise_trace": lambda s: noise_trace(s.draws),
    "sample_noise_trace": lambda s: sample_noise_trace(s.draws),
    "squared_batch_norm": lambda s: squared_batch_norm(s.draws),
    "signal_to_noise": lambda s: signal_to_noise(s.draws),
    "noise_scale": lambda s: noise_scale(s.draws),
    "variance_top": lambda s: directional_variances(s.draws)[0],
    "variance_bottom": lambda s: directional_variances(s.draws)[2],
    "noise_share": lambda s: noise_share(s.draws),
    "weighted_noise_trace": lambda s: weighted_noise_trace(s.draws, outer(POPULATION)[0], LR, EPOCH),
    "modified_loss_full": lambda s: modified_loss_terms(s.draws, LR)[0],
    "modified_loss_batches": lambda s: modified_loss_terms(s.draws, LR)[1],
    "fisher_trace": fisher_trace,
    "trace_from_samples": trace_from_samples,
}
NO_RATIOS = [name for name in ESTIMATORS if name not in ("signal_to_noise", "noise_scale", "noise_share")]


@pytest.fixture(scope="module")
def tables():
    """200 tables of 64 batches of 16 from 200 samples."""
    subsets = POPULATION.draw(REPEATS, DRAWS, b=16, seed=2)
    return [moments(POPULATION, each, outer(POPULATION)[1]) for each in subsets]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_errors_cover_the_truth_as_often_as_they_say(name, tables):
    rate = covered([ESTIMATORS[name](table) for table in tables], truth(POPULATION, 16)[name], DRAWS)
    print(f"{name}: {rate:.3f}")
    assert 0.9 <= rate <= 0.99


@pytest.mark.parametrize("name", NO_RATIOS)
def test_estimates_that_are_no_ratios_are_unbiased_over_all_tuples_of_draws(name, monkeypatch):
    """Four draws from the ten pairs of five samples, in every order: one of each is enough, with its weight."""
    population = heterogeneous(5, 3, 3)
    monkeypatch.setitem(globals(), "POPULATION", population)
    pairs = torch.tensor([*itertools.combinations(range(5), 2)])
    total = 0.0
    for chosen in itertools.combinations_with_replacement(range(10), 4):
        weight = 24 / math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
        total += weight * ESTIMATORS[name](moments(population, pairs[[*chosen]], outer(population)[1])).value
    assert total / 10**4 == pytest.approx(truth(population, 2)[name])


def test_the_two_size_estimator_of_mccandlish_is_this_one():
    b, count = 4, 12
    g, _ = POPULATION.of(POPULATION.draw(count, b=b, seed=0))
    table = gradients(g, b)  # independent samples, as there
    small, large = mean(table.squared_norms), table.mean_squared_norm
    trace = (small - large) / (1 / b - 1 / (count * b))
    norm = (count * b * large - b * small) / (count * b - b)
    assert sample_noise_trace(table).value == pytest.approx(trace)
    assert squared_gradient_norm(table).value == pytest.approx(norm)
    g = g + 10 * g.mean(0)
    table = gradients(g, b)
    assert noise_scale(table).value == pytest.approx(
        sample_noise_trace(table).value / squared_gradient_norm(table).value
    )


def test_the_noise_of_batches_is_that_of_samples_with_the_factor_of_independent_subsets():
    table = gradients(POPULATION.of(POPULATION.draw(6, b=10, seed=0))[0], 10, 200)
    assert sample_noise_trace(table).value == pytest.approx(noise_trace(table).value * 10 * 199 / 190)
    infinite = gradients(POPULATION.of(POPULATION.draw(6, b=10, seed=0))[0], 10)
    assert sample_noise_trace(infinite).value == pytest.approx(noise_trace(table).value * 10)


def test_batches_of_the_whole_population_tell_nothing_of_noise_but_their_samples_do():
    population = heterogeneous(12, 3, 1)
    whole = moments(population, torch.arange(12).expand(4, 12))
    assert noise_trace(whole.draws).value == pytest.approx(0, abs=1e-20)
    for refused in (sample_noise_trace, noise_scale):
        with pytest.raises(UnresolvedGradientError, match="tells nothing"):
            refused(whole.draws)
    found = trace_from_samples(whole)
    assert found.value == pytest.approx(float(population.covariance.trace()))
    assert found.error == pytest.approx(0, abs=1e-12)
    same = gradients(torch.ones(4, 3, dtype=torch.float64), 2, None, torch.eye(3, dtype=torch.float64))
    for refused in (signal_to_noise, noise_share):
        with pytest.raises(UnresolvedGradientError, match="do not differ"):
            refused(same)


def test_sums_over_samples_can_do_without_deviations():
    table = moments(POPULATION, POPULATION.draw(8, b=5, seed=0))
    bare = SampleMoments(table.draws, table.squared_norms)
    assert trace_from_samples(bare).value == pytest.approx(trace_from_samples(table).value)
    assert trace_from_samples(bare).error == pytest.approx(trace_from_samples(table).error)
    single = moments(POPULATION, POPULATION.draw(8, b=1, seed=0))
    assert trace_from_samples(single).value == pytest.approx(noise_trace(single.draws).value)


def test_the_modified_loss_is_that_of_the_batches_of_random_epochs():
    """All partitions of six samples into three batches of two."""
    population = heterogeneous(6, 3, 1)
    epochs = [
        population.of(torch.tensor(order).view(3, 2))[0].square().sum(1).mean() * LR / 4
        for order in itertools.permutations(range(6))
    ]
    assert mean(epochs) == pytest.approx(truth(population, 2)["modified_loss_batches"])
    full, batches = (term.value for term in modified_loss_terms(gradients(population.gradients, 1, 6), LR))
    assert batches - full == pytest.approx(LR / 4 * noise_trace(gradients(population.gradients, 1, 6)).value)


def test_subsets_without_replacement_give_unbiased_means_and_traces():
    population = heterogeneous(8, 3, 1)
    squares = population.gradients.square().sum(1)
    means, traces = [], []
    for subset in itertools.combinations(range(8), 4):
        g = population.gradients[[*subset]]
        means.append(mean_of_subset(squares[[*subset]], 8).value)
        traces.append(trace_of_subset((g - g.mean(0)).square().sum(1), 8).value)
    assert mean(means) == pytest.approx(float(squares.mean()))
    assert mean(traces) == pytest.approx(float(population.covariance.trace()))
    away = (population.gradients - population.gradient).square().sum(1)
    assert trace_of_subset(away, 8).value == pytest.approx(float(population.covariance.trace()))
    assert trace_of_subset(away, 8).error == 0
    assert mean_of_subset(squares, 8).error == 0


def test_errors_from_a_subset_are_covered():
    """The inputs take the place of gradients."""
    x = POPULATION.inputs
    square, centre = float(x.square().sum(1).mean()), x.mean(0)
    means, traces = [], []
    for subset in POPULATION.draw(REPEATS, b=100, seed=0):
        means.append(mean_of_subset(x[subset].square().sum(1), 200))
        traces.append(trace_of_subset((x[subset] - x[subset].mean(0)).square().sum(1), 200))
    for name, found, true in (("mean", means, square), ("trace", traces, square - float(centre @ centre))):
        rate = covered(found, true, 100)
        print(f"{name} of a subset: {rate:.3f}")
        assert 0.9 <= rate <= 0.99


def test_the_tail_index_of_a_power_is_unbiased_and_covered():
    random = generator(0)
    found = [tail_index((1 - torch.rand(500, generator=random, dtype=torch.float64)) ** (-1 / 3)) for _ in range(400)]
    assert mean(f.value for f in found) == pytest.approx(3, rel=0.02)
    spread = torch.tensor([f.value for f in found]).std()
    assert mean(f.error for f in found) == pytest.approx(float(spread), rel=0.1)
    rate = sum(abs(f.value - 3) <= 1.96 * f.error for f in found) / len(found)
    print(f"tail_index: {rate:.3f}")
    assert 0.92 <= rate <= 0.98


def test_a_tail_that_is_no_power_grows_ever_steeper():
    random = generator(0)
    few, many = (tail_index(torch.randn(n, generator=random).abs()).value for n in (200, 200_000))
    steep = tail_index(torch.randn(200_000, generator=random).abs(), share=1e-3).value
    assert 3 < few < steep
    assert many < steep
    heavy = tail_index(torch.from_numpy(stats.t.rvs(2, size=100_000, random_state=0)).abs(), share=0.01)
    assert heavy.value == pytest.approx(2, rel=0.1)


def test_a_tail_needs_values():
    for values, share, message in (
        (torch.ones(100), 0.0, "share"),
        (torch.tensor([1.0, -1.0] * 50), 0.1, "positive and finite"),
        (torch.rand(20), 0.1, "tail has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            tail_index(values, share)
    with pytest.raises(UnresolvedGradientError, match="all equal"):
        tail_index(torch.ones(100))


def autoregressive(phi, n, runs, seed):
    random = generator(seed)
    x = torch.randn(runs, generator=random, dtype=torch.float64) / (1 - phi**2) ** 0.5
    series = []
    for _ in range(n):
        series.append(x)
        x = phi * x + torch.randn(runs, generator=random, dtype=torch.float64)
    return torch.stack(series, dim=1)


@pytest.mark.parametrize(("phi", "n"), [(0.0, 50), (0.0, 400), (0.5, 400), (0.8, 400), (-0.6, 400)])
def test_autocorrelations_are_covered_in_white_and_in_coloured_noise(phi, n):
    lags, level = [1, 2, 5, 10], 5.0
    found = [autocorrelation(series + level, lags) for series in autoregressive(phi, n, REPEATS, 1)]
    for i, lag in enumerate(lags):
        each = [f[i] for f in found]
        hits = sum(abs(f.value - phi**lag) <= 1.96 * f.error for f in each) / REPEATS
        print(f"φ = {phi}, n = {n}, lag {lag}: {hits:.3f}")
        assert 0.9 <= hits <= 0.99


def test_autocorrelations_of_a_short_series_are_not_biased_by_its_mean():
    """Without the correction they would be -1/n = -0.025 in white noise."""
    found = [autocorrelation(series, [1, 3])[1].value for series in autoregressive(0.0, 40, 2_000, 1)]
    print(f"mean at lag 3: {mean(found):.4f}")
    assert abs(mean(found)) < 0.0125


def test_autocorrelation_at_lag_zero_and_of_an_alternation():
    zero, one, two = autocorrelation(torch.tensor([1.0, -1.0] * 200), [0, 1, 2])
    assert (zero.value, zero.error) == (1, 0)
    assert one.value == pytest.approx(-1, abs=0.02)
    assert two.value == pytest.approx(1, abs=0.02)
    for series, lags, message in (
        (torch.ones(20), [1], "constant"),
        (torch.rand(5), [1], "At least 8"),
        (torch.rand(20), [11], "between 0 and half"),
        (torch.rand(20), [-1], "between 0 and half"),
        (torch.full((20,), math.nan), [1], "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            autocorrelation(series, lags)


def test_reshuffling_correlates_noise_at_frozen_weights_as_its_identity_says():
    """All lags over 20,000 epochs of random batches: exact in the mean over permutations."""
    k = 5
    g, _ = POPULATION.of(torch.arange(10).view(k, 2))
    noise = (g - g.mean(0))[:, 0]
    orders = torch.rand(20_000, k, generator=generator(0)).argsort(1)
    series = noise[orders].flatten()
    lags = [0, 1, 2, 3, 4, 5, 8]
    measured = [float((series[: len(series) - h] * series[h:]).mean() / noise.square().mean()) for h in lags]
    expected = reshuffling_autocorrelation(k, lags)
    assert measured == pytest.approx(expected.tolist(), abs=4 / len(series) ** 0.5)
    assert expected[1:5].tolist() == pytest.approx([-0.2, -0.15, -0.1, -0.05])
    for k in (2, 7, 100):
        assert float(1 + 2 * reshuffling_autocorrelation(k, range(1, 2 * k)).sum()) == pytest.approx(0, abs=1e-12)
    found = autocorrelation(series[:2_000], [1])[0]
    assert abs(found.value - float(expected[1])) < 3 * found.error
    with pytest.raises(ValueError, match="At least two batches"):
        reshuffling_autocorrelation(1, [1])
    with pytest.raises(ValueError, match="must not be negative"):
        reshuffling_autocorrelation(5, [-1])


def test_a_table_must_be_whole():
    def table(**changes):
        columns = dict.fromkeys(["squared_norms", "squared_deviations", "dots_mean"], torch.ones(6))
        return DrawnGradients(**{**columns, "mean_squared_norm": 1.0, "batch_size": 4, **changes})

    assert table().dots_mean.dtype == torch.float64
    assert table(population=4).samples_per_batch == math.inf
    for changes, message in (
        ({"squared_norms": torch.ones(2)}, "At least 3 draws"),
        ({"dots_mean": torch.ones(5)}, "`dots_mean` has 5 entries for 6 draws"),
        ({"population": 3}, "1 ≤ batch size ≤ population"),
        ({"batch_size": 0}, "1 ≤ batch size ≤ population"),
        ({"along": torch.ones(5, 2)}, "`along` must be"),
        ({"along": torch.full((6, 2), math.nan)}, "`along` must be"),
        ({"mean_squared_norm": math.nan}, "`mean_squared_norm`"),
    ):
        with pytest.raises(ValueError, match=message):
            table(**changes)
    with pytest.raises(ValueError, match="`along` is needed"):
        directional_variances(table())
    with pytest.raises(ValueError, match="3 eigenvalues for 2 vectors"):
        weighted_noise_trace(table(along=torch.rand(6, 2)), torch.ones(3), 0.1, 10)
    with pytest.raises(ValueError, match="`squared_norms` has 5 entries for 6 draws"):
        SampleMoments(table(), torch.ones(5))
