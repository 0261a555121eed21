"""Exact theory of SGD with momentum against matrices, brute-force sums and simulation."""

import math

import numpy as np
import pytest
import torch

from lightning_dynamics.metrics.langevin import HeavyBall, ornstein_uhlenbeck_displacement

SETTINGS = [(0.1, 0.0), (0.1, 0.5), (0.02, 0.9), (0.3, 0.99)]  # η, β


def matrices(lr, beta, h):
    """A of the state (q, p), and the white-noise solution of P = A P Aᵀ + b bᵀ."""
    a, b = np.array([[1 - lr * h, lr * beta], [-h, beta]]), np.array([lr, 1.0])
    flat = np.linalg.solve(np.eye(4) - np.kron(a, a), np.outer(b, b).ravel())
    return a, flat.reshape(2, 2)


def reshuffled_covariances(lr, beta, h, k, lags):
    """E xₛ₊ₜ xₛᵀ by definition: white-noise autocovariances summed with the correlation of the noise."""
    a, white = matrices(lr, beta, h)
    ahead = [white]
    for _ in range(max(lags) + k):
        ahead.append(a @ ahead[-1])

    def at(j):
        return ahead[j] if j >= 0 else ahead[-j].T

    rho = [-(1 - j / k) / (k - 1) for j in range(1, k)]
    return [at(t) + sum(r * (at(t + j) + at(t - j)) for j, r in enumerate(rho, 1)) for t in lags]


def simulate(dynamics, h, *, chains, steps, seed=0):
    """Positions and velocities of independent stationary chains, shape ``(steps, chains)``, noise of variance 1."""
    rng = np.random.default_rng(seed)
    k = dynamics.batches or 1
    residuals = rng.normal(size=k)
    residuals = (residuals - residuals.mean()) / max(residuals.std(), 1e-9)
    warm_up = k * math.ceil(math.log(1e-6) / math.log(float(dynamics.radius(h))) / k)
    q, p = np.zeros(chains), np.zeros(chains)
    qs, ps = np.empty((steps, chains)), np.empty((steps, chains))
    for t in range(-warm_up, steps):
        if dynamics.order == "with_replacement":
            noise = rng.normal(size=chains)
        else:
            if t % k == 0:
                order = np.argsort(rng.random((k, chains)), axis=0)
            noise = residuals[order[t % k]]
        p = dynamics.momentum * p - h * q - noise
        q = q + dynamics.lr * p
        if t >= 0:
            qs[t], ps[t] = q, p
    return qs, ps


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
@pytest.mark.parametrize("step", [1e-5, 0.01, 0.5, 1.0, 1.9])
def test_the_covariance_solves_the_lyapunov_equation(lr, beta, step):
    a, white = matrices(lr, beta, step / lr)
    found = HeavyBall(lr, beta).covariance(step / lr).numpy()
    noise = np.outer([lr, 1.0], [lr, 1.0])
    np.testing.assert_allclose(a @ found @ a.T + noise, found, rtol=1e-10)
    np.testing.assert_allclose(found, white, rtol=1e-8)


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
@pytest.mark.parametrize("k", [2, 3, 20, 400])
@pytest.mark.parametrize("epoch", [1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0])
def test_reshuffling_subtracts_what_an_epoch_remembers(lr, beta, k, epoch):
    """The covariance, for kηh from far below to far above 1."""
    h = epoch / (k * lr)
    dynamics = HeavyBall(lr, beta, "reshuffled", k)
    if h >= 0.99 * dynamics.edge:
        assert epoch / k > 1  # such a curvature is unstable
        return
    (expected,) = reshuffled_covariances(lr, beta, h, k, [0])
    np.testing.assert_allclose(dynamics.covariance(h).numpy(), expected, rtol=1e-8 if epoch > 1e-5 else 1e-7)


def test_a_hundred_thousand_batches_and_no_curvature_at_all():
    """Against Σ R_W(j)·C_p(j), all of whose terms are positive at h = 0.

    W is the sum of the noise since the epoch began: R_W(j) = (n³ - n)/(6k(k - 1)) with n = k - |j|.
    """
    k, lr, beta = 100_000, 0.1, 0.9
    n = k - np.arange(k, dtype=float)
    sums = (n**3 - n) / (6 * k * (k - 1))
    dynamics = HeavyBall(lr, beta, "reshuffled", k)
    free = 2 / ((1 - beta) * 2 * (1 + beta)) * beta ** np.arange(k)
    expected = lr**2 * (2 * (sums * free).sum() - sums[0] * free[0])
    for h in (0.0, 1e-14):
        assert float(dynamics.covariance(h)[0, 0]) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(lr**2 * (k + 1) / (6 * (1 - beta) ** 2), rel=1e-3)
    at = (n - 1).clip(min=0)
    lagged = (at**3 - at) / (6 * k * (k - 1))  # R_W(j + 1)
    one = lr**2 * ((lagged * free).sum() + (sums[:-1] * free[1:]).sum())
    assert float(dynamics.msd(0.0, [1])) == pytest.approx(2 * (expected - one), rel=1e-6)


@pytest.mark.parametrize("h", [0.05, 0.3, 1.5, 6.0])
@pytest.mark.parametrize("order", ["with_replacement", "reshuffled"])
def test_simulated_chains_have_these_moments(order, h):
    """Permuted residuals: variances, mean-square displacements, current and the regression within four errors."""
    dynamics = HeavyBall(0.1, 0.5, order, 20)
    q, p = simulate(dynamics, h, chains=1500, steps=240, seed=int(10 * h))
    lags = [1, 2, 5, 19, 20, 33]
    measured = [q[:200] ** 2, p[:200] ** 2, q[:200] * p[:200], q[:200] * p[1:201] - p[:200] * q[1:201]]
    measured += [(q[t : 200 + t] - q[:200]) ** 2 for t in lags]
    covariance = dynamics.covariance(h)
    expected = [covariance[0, 0], covariance[1, 1], covariance[0, 1], dynamics.current(h), *dynamics.msd(h, lags)]
    for values, value in zip(measured, expected, strict=True):
        means = values.mean(axis=0)
        assert abs(means.mean() - float(value)) < 4 * means.std() / math.sqrt(len(means))
    x = np.stack([q[:200].ravel(), p[:200].ravel()], axis=1)
    fit = np.linalg.lstsq(x, p[1:201].ravel(), rcond=None)[0]
    errors = np.sqrt(np.linalg.inv(x.T @ x).diagonal() * (p[1:201].ravel() - x @ fit).var())
    assert (np.abs([-fit[0], fit[1]] - dynamics.regression(h).numpy()) < 4 * errors).all()


def test_equipartition_holds_with_replacement_and_fails_under_reshuffling():
    h = torch.tensor([0.05, 0.3, 6.0])
    white, reshuffled = HeavyBall(0.1, 0.5), HeavyBall(0.1, 0.5, "reshuffled", 20)
    torch.testing.assert_close(white.equipartition(h), 2 * h.double() / (0.1 * 1.5))
    ratios = (reshuffled.equipartition(h) / white.equipartition(h)).tolist()
    assert ratios == pytest.approx([16.4, 3.38, 1.07], rel=5e-3)


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
def test_angle_and_radius_are_those_of_the_eigenvalues(lr, beta):
    dynamics = HeavyBall(lr, beta)
    steps = torch.tensor([0.0, 1e-9, 1e-3, 0.3, 1.2, 2.2, 3.7], dtype=torch.float64)
    steps = steps[steps < 2 * (1 + beta)]
    for step in steps.tolist():
        roots = np.linalg.eigvals(matrices(lr, beta, max(step, 1e-5) / lr)[0] if step else np.diag([1.0, beta]))
        if 0 < step < 1e-5:
            continue
        largest = roots[np.abs(roots).argmax()]
        assert float(dynamics.radius(step / lr)) == pytest.approx(abs(largest), abs=1e-7)
        assert float(dynamics.frequency(step / lr)) == pytest.approx(abs(np.angle(largest)), abs=1e-7)
        assert bool(dynamics.is_underdamped(step / lr)) == (abs(largest.imag) > 1e-12)
    assert 1 - float(dynamics.radius(1e-9 / lr)) == pytest.approx(1e-9 / (1 - beta), rel=1e-3)


def test_a_mode_turns_as_the_langevin_equation_says_when_steps_are_small():
    dynamics = HeavyBall(0.02, 0.9)
    assert float(dynamics.langevin_frequency(3.2)) == pytest.approx(12.71, abs=0.005)
    assert float(dynamics.frequency(3.2)) / 0.02 == pytest.approx(12.75, abs=0.005)
    small = HeavyBall(1e-6, 1 - 1e-3)
    assert float(small.frequency(10.0)) / 1e-6 == pytest.approx(float(small.langevin_frequency(10.0)), rel=1e-3)
    assert float(dynamics.langevin_frequency(0.01)) == float(dynamics.frequency(0.01)) == 0


def test_a_mode_beyond_one_over_the_learning_rate_alternates():
    assert HeavyBall(0.1).frequency(torch.tensor([9.0, 11.0])).tolist() == [0, math.pi]
    assert float(HeavyBall(0.1, 0.5).frequency(29.5)) == math.pi
    assert float(HeavyBall(0.1).radius(15.0)) == pytest.approx(0.5)


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
def test_the_current_is_the_antisymmetric_part_of_the_lag_one_covariance(lr, beta):
    for step in (1e-4, 0.1, 1.3):
        a, white = matrices(lr, beta, step / lr)
        lagged = a @ white  # E xₜ₊₁ xₜᵀ
        found = HeavyBall(lr, beta)
        assert float(found.current(step / lr)) == pytest.approx(lagged[1, 0] - lagged[0, 1], rel=1e-6)
        assert float(found.current(step / lr)) == pytest.approx(-lr / (1 - beta))
        relative = (lagged[1, 0] - lagged[0, 1]) / math.sqrt(white[0, 0] * white[1, 1])
        assert float(found.relative_current(step / lr)) == pytest.approx(relative, rel=1e-6)
        (lagged,) = reshuffled_covariances(lr, beta, step / lr, 7, [1])
        found = HeavyBall(lr, beta, "reshuffled", 7)
        assert float(found.current(step / lr)) == pytest.approx(lagged[1, 0] - lagged[0, 1], rel=1e-6)


def test_weak_damping_turns_by_half_the_relative_current():
    dynamics = HeavyBall(0.01, 0.999)
    assert float(dynamics.relative_current(1.0)) == pytest.approx(-2 * float(dynamics.frequency(1.0)), rel=0.01)


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
@pytest.mark.parametrize("step", [0.01, 0.7, 1.8, "critical"])
def test_displacements_follow_from_powers_of_the_matrix(lr, beta, step):
    h = ((1 - math.sqrt(beta)) ** 2 if step == "critical" else step) / lr
    a, white = matrices(lr, beta, h)
    lags = [0, 1, 2, 7, 100, 1001]
    expected = [2 * (white - np.linalg.matrix_power(a, t) @ white)[0, 0] for t in lags]
    np.testing.assert_allclose(HeavyBall(lr, beta).msd(h, lags), expected, rtol=1e-6, atol=1e-9 * white[0, 0])


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
@pytest.mark.parametrize("k", [2, 3, 20])
@pytest.mark.parametrize("step", [0.01, 0.7, "critical"])
def test_displacements_under_reshuffling_follow_from_the_correlation_of_the_noise(lr, beta, k, step):
    h = ((1 - math.sqrt(beta)) ** 2 if step == "critical" else step) / lr
    lags = [0, 1, 2, k - 1, k, k + 1, 3 * k, 300]
    exact = [c[0, 0] for c in reshuffled_covariances(lr, beta, h, k, [0, *lags])]
    found = HeavyBall(lr, beta, "reshuffled", k).msd(h, lags)
    np.testing.assert_allclose(found, [2 * (exact[0] - c) for c in exact[1:]], rtol=1e-6, atol=1e-9 * exact[0])


@pytest.mark.parametrize("order", ["with_replacement", "reshuffled"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_long_lags_reach_twice_the_variance(order, beta):
    dynamics = HeavyBall(0.1, beta, order, 50)
    h = torch.tensor([1e-3, 0.1, 3.0])
    msd = dynamics.msd(h, torch.tensor([999_999, 1_000_000]))
    torch.testing.assert_close(msd, 2 * dynamics.covariance(h)[:, :1, 0].expand(3, 2), rtol=1e-9, atol=0)


def test_a_free_direction_diffuses_after_it_has_moved_ballistically():
    dynamics = HeavyBall(0.1, 0.999)
    msd = dynamics.msd(0.0, [1, 2, 10, 10**6])
    assert float(msd[1] / msd[0]) == pytest.approx(2 * 1.999)
    assert float(msd[2] / msd[0]) == pytest.approx(100, rel=0.01)
    assert float(msd[3]) == pytest.approx(0.01 * 1e6 / 0.001**2, rel=2e-3)
    torch.testing.assert_close(dynamics.msd(1e-13, [1, 1000]), dynamics.msd(0.0, [1, 1000]))
    torch.testing.assert_close(HeavyBall(0.1).msd(0.0, [1, 1000]), torch.tensor([0.01, 10.0], dtype=torch.float64))


def test_a_free_direction_is_bounded_under_reshuffling():
    """β = 0: Brownian bridges, E(W_{s+t} - W_s)² in closed form, and independent epochs from lag k on."""
    k = 50
    lags = torch.arange(200)
    msd = HeavyBall(1.0, 0.0, "reshuffled", k).msd(0.0, lags)
    n = (k - lags).clamp(min=0).double()
    torch.testing.assert_close(msd, 2 * ((k**3 - k) - (n**3 - n)) / (6 * k * (k - 1)))


@pytest.mark.parametrize("order", ["with_replacement", "reshuffled"])
@pytest.mark.parametrize(("lr", "beta", "h"), [(0.1, 0.0, 3.0), (0.1, 0.5, 1.0), (0.02, 0.9, 40.0)])
def test_the_spectral_density_transforms_back_to_the_autocovariance(order, lr, beta, h):
    dynamics = HeavyBall(lr, beta, order, 12)
    angles = math.pi * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    density = dynamics.spectral_density(h, angles)
    variance = float(dynamics.covariance(h)[0, 0])
    for lag in (0, 1, 5, 12, 40):
        exact = variance - float(dynamics.msd(h, [lag])) / 2
        assert float((density * (lag * angles).cos()).mean()) == pytest.approx(exact, abs=1e-9 * variance)


@pytest.mark.parametrize(("lr", "beta"), SETTINGS)
def test_a_regression_finds_curvature_and_momentum_with_replacement_only(lr, beta):
    h = torch.tensor([0.0, 1e-8, 1e-3, 1.0]) / lr
    found = HeavyBall(lr, beta).regression(h)
    torch.testing.assert_close(found[:, 0], h.double(), rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(found[:, 1], torch.full_like(found[:, 1], beta), rtol=1e-9, atol=1e-12)
    now, then = reshuffled_covariances(lr, beta, 0.05 / lr, 10, [0, 1])
    expected = np.linalg.solve(now, then[1])
    found = HeavyBall(lr, beta, "reshuffled", 10).regression(0.05 / lr)
    np.testing.assert_allclose(found, [-expected[0], expected[1]], rtol=1e-5)
    assert float(found[0]) > 1.05 * 0.05 / lr


def test_shapes_are_those_of_the_curvatures():
    dynamics = HeavyBall(0.1, 0.9, "reshuffled", 8)
    h = torch.rand(3, 4) + 0.1
    assert dynamics.covariance(h).shape == (3, 4, 2, 2)
    assert dynamics.msd(h, [1, 2, 3]).shape == dynamics.spectral_density(h, torch.ones(3)).shape == (3, 4, 3)
    assert dynamics.regression(h).shape == (3, 4, 2)
    for method in ("frequency", "radius", "equipartition", "current", "relative_current", "langevin_frequency"):
        each = getattr(dynamics, method)(h)
        assert each.shape == (3, 4)
        assert each.dtype == torch.float64
        assert float(getattr(dynamics, method)(float(h[1, 2]))) == pytest.approx(float(each[1, 2]), rel=1e-12)
    assert dynamics.msd(h, []).shape == (3, 4, 0)


@pytest.mark.parametrize("order", ["with_replacement", "reshuffled"])
def test_there_is_no_stationary_regime_beyond_the_edge_or_uphill(order):
    dynamics = HeavyBall(0.1, 0.5, order, 10)
    h = torch.tensor([-1.0, 30.0, 31.0])
    assert dynamics.edge == pytest.approx(30)
    for found in (dynamics.covariance(h), dynamics.current(h), dynamics.msd(h, [1, 100])):
        assert bool(found.isnan().all())
    for found in (dynamics.equipartition(h), dynamics.regression(h), dynamics.spectral_density(h, torch.ones(1))):
        assert bool(found.isnan().all())
    assert not dynamics.is_stable(h).any()
    assert float(dynamics.radius(31.0)) > 1
    assert bool(dynamics.covariance(29.99).isfinite().all())


def test_without_curvature_there_is_no_variance_to_speak_of():
    assert math.isinf(float(HeavyBall(0.1, 0.5).covariance(0.0)[0, 0]))
    assert float(HeavyBall(0.1, 0.5).equipartition(0.0)) == float(HeavyBall(0.1, 0.5).relative_current(0.0)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"lr": math.nan}, "`lr` must be positive"),
        ({"lr": math.inf}, "`lr` must be positive"),
        ({"lr": 0.1, "momentum": 1.0}, "`momentum`"),
        ({"lr": 0.1, "momentum": -0.1}, "`momentum`"),
        ({"lr": 0.1, "order": "cyclic"}, "`order`"),
        ({"lr": 0.1, "order": "reshuffled"}, "at least two"),
        ({"lr": 0.1, "order": "reshuffled", "batches": 1}, "at least two"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeavyBall(**arguments)


def test_lags_are_whole_numbers_that_count_forward():
    with pytest.raises(TypeError, match="integers"):
        HeavyBall(0.1).msd(1.0, torch.tensor([1.5]))
    with pytest.raises(ValueError, match="negative"):
        HeavyBall(0.1).msd(1.0, [-1])


@pytest.mark.parametrize("order", ["with_replacement", "reshuffled"])
def test_the_null_has_the_measured_step_and_the_shape_of_its_modes(order):
    dynamics = HeavyBall(0.1, 0.9, order, 30)
    values, weights = torch.tensor([5.0, 1.0, 0.0, -0.5]), torch.tensor([0.1, 0.3, 0.4, 0.2])
    lags = [1, 10, 100, 10_000]
    curve = ornstein_uhlenbeck_displacement(dynamics, values, weights, 0.7, lags, weight_decay=0.01)
    assert float(curve[0]) == pytest.approx(0.7)
    modes = [dynamics.msd(h, lags) for h in (5.01, 1.01, 0.0)]
    expected = 0.1 * 5 * modes[0] + 0.3 * modes[1] + 0.2 * 0.5 * modes[2]
    torch.testing.assert_close(curve, 0.7 * expected / expected[0], rtol=1e-6, atol=0)
    again = ornstein_uhlenbeck_displacement(dynamics, values, 1000 * weights, 0.7, lags, weight_decay=0.01)
    torch.testing.assert_close(curve, again)


def test_the_null_saturates_in_a_bowl_and_diffuses_where_it_is_open():
    dynamics, weights = HeavyBall(0.1, 0.5), torch.ones(2)
    lags = [10**4, 10**5]
    bowl = ornstein_uhlenbeck_displacement(dynamics, torch.tensor([1.0, 0.5]), weights, 1.0, lags)
    assert float(bowl[1] / bowl[0]) == pytest.approx(1, rel=1e-6)
    saddle = ornstein_uhlenbeck_displacement(dynamics, torch.tensor([1.0, -0.5]), weights, 1.0, lags)
    assert float(saddle[1] / saddle[0]) == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize(
    ("values", "message"), [([1.0, 30.0], "edge of stability"), ([0.0, 0.0], "no noise"), ([1.0, math.nan], "finite")]
)
def test_a_spectrum_without_a_null_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ornstein_uhlenbeck_displacement(HeavyBall(0.1, 0.5), torch.tensor(values), torch.ones(2), 1.0, [1])
