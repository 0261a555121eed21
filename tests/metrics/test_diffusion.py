import math

import pytest
import torch
from helpers.operators import generator

from lightning_dynamics.metrics.diffusion import (
    TwoTime,
    UndefinedExponentError,
    _directions,
    aging_exponent,
    apparent_exponent,
    compare,
    drift_diffusion,
    effective_dimension,
    local_exponents,
    log_spaced,
    power_law,
    resample,
    two_time,
)

SIZE = 96  # steps of a simulated walk; the window is the last decade
LAGS = log_spaced(1, SIZE)
TIMES = torch.arange(SIZE + 1, dtype=torch.float64)


def root_of(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def fractional(c):
    return root_of((TIMES[:, None] ** c + TIMES**c - (TIMES[:, None] - TIMES).abs() ** c) / 2)


def bowl(rate):
    """Stationary Ornstein-Uhlenbeck, with E‖x(t) - x(0)‖² = 1 - exp(-rate t)."""
    return root_of(torch.exp(-rate * (TIMES[:, None] - TIMES).abs()) / 2)


def walk(root, spectrum, source, drift=0.0):
    """Positions from the reference on, shape (SIZE + 1, d), of unit total variance per unit of the kernel."""
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    x = root @ torch.randn(len(root), len(spectrum), generator=source, dtype=torch.float64)
    x = (x - x[0]) * (spectrum / spectrum.sum()).sqrt()
    direction = torch.randn(len(spectrum), generator=source, dtype=torch.float64)
    return x + drift * TIMES[:, None] * direction / direction.norm()


def displacement(positions):
    return (positions[LAGS] - positions[0]).square().sum(1)


def fitted(positions, start=SIZE / 10, stop=SIZE, **options):
    return power_law(LAGS, displacement(positions), start, stop, positions=positions, **options)


# points of a curve


def test_log_spaced_lags_are_integers_with_both_ends_and_equally_many_per_decade():
    lags = log_spaced(1, 100_000, 20)
    assert lags.dtype == torch.int64
    assert (int(lags[0]), int(lags[-1])) == (1, 100_000)
    assert bool((lags.diff() > 0).all())
    assert [int(((lags >= a) & (lags < 10 * a)).sum()) for a in (100, 1000, 10_000)] == [20, 20, 20]
    assert log_spaced(7, 7).tolist() == [7]


@pytest.mark.parametrize("arguments", [(0, 10, 20), (10, 9, 20), (1, 10, 0)])
def test_log_spaced_lags_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match="1 ≤ start ≤ stop"):
        log_spaced(*arguments)


def test_resampling_is_exact_for_powers_and_gives_nothing_outside():
    lags = torch.tensor([2, 3, 50, 1000])
    points = torch.tensor([1.0, 2.0, 2.5, 40.0, 999.0, 1000.0, 1001.0])
    found = resample(lags, 3 * lags**1.7, points)
    assert found[1:-1].tolist() == pytest.approx((3 * points[1:-1].double() ** 1.7).tolist(), rel=1e-6)
    assert bool(found[[0, -1]].isnan().all())


# the exponent


@pytest.mark.parametrize("c", [0.3, 1.0, 1.7, 2.0])
def test_a_power_law_has_exactly_its_exponent(c):
    lags = log_spaced(1, 10_000)
    law = power_law(lags, 5 * lags.double() ** c, 33.3, 7777)
    assert law.exponent == pytest.approx(c, abs=1e-12)
    assert law.prefactor == pytest.approx(5)
    assert law.r_squared == pytest.approx(1)
    assert law.residual < 1e-12
    assert law.curve(torch.tensor([100])).item() == pytest.approx(5 * 100**c)
    assert math.isnan(law.error)


def test_every_decade_has_the_same_weight():
    """A kink in the middle of two decades, with ten times as many lags in the second one."""
    lags = torch.arange(1, 101)
    squares = torch.where(lags <= 10, lags, 10).double()
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    y = x.clamp(max=0.5)
    slope = float(((x - x.mean()) * y).sum() / ((x - x.mean()) * x).sum())
    assert power_law(lags, squares, 1, 100).exponent == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_straight_line_has_exponent_two_without_error(dtype):
    positions = (TIMES[:, None] * torch.randn(300, generator=generator(), dtype=torch.float64)).to(dtype)
    law = fitted(positions)
    assert law.exponent == pytest.approx(2, abs=1e-6)
    assert law.error < 1e-4
    assert law.interval[0] <= law.exponent <= law.interval[1]
    assert law.remarks == ()


def test_a_brownian_walk_has_exponent_one_within_its_error():
    law = fitted(walk(fractional(1.0), torch.ones(400), generator(0)))
    assert 0.03 < law.error < 0.07
    assert abs(law.exponent - 1) < 2 * law.error
    assert law.interval[0] < 1 < law.interval[1]
    assert law.r_squared > 0.98
    assert law.residual < law.residual_limit
    assert law.dimension == pytest.approx(400, rel=0.1)
    assert law.remarks == ()


def test_the_scale_of_the_weights_does_not_matter():
    positions = walk(fractional(1.3), torch.ones(50), generator(1))
    law, larger = fitted(positions), fitted(1e4 * positions)
    assert larger.exponent == pytest.approx(law.exponent, abs=1e-9)
    assert larger.error == pytest.approx(law.error, abs=1e-3)
    assert larger.prefactor == pytest.approx(1e8 * law.prefactor)


def test_the_unit_of_time_does_not_matter():
    positions = walk(fractional(1.3), torch.ones(50), generator(1))
    law = fitted(positions)
    slower = power_law(37 * LAGS, displacement(positions), 3.7 * SIZE, 37 * SIZE, positions=positions)
    assert slower.exponent == pytest.approx(law.exponent, abs=1e-9)
    assert slower.error == pytest.approx(law.error, abs=1e-3)
    assert slower.prefactor == pytest.approx(law.prefactor * 37**-law.exponent)


def test_the_error_depends_on_the_generator_alone():
    positions = walk(fractional(1.0), torch.ones(20), generator(2))
    first, second = (fitted(positions, generator=generator(3)) for _ in range(2))
    other = fitted(positions, generator=generator(4))
    assert first == second
    assert first.error != other.error
    assert first.error == pytest.approx(other.error, rel=0.2)


def test_in_one_dimension_a_trajectory_does_not_determine_the_exponent():
    law = fitted(walk(fractional(1.0), [1.0], generator(0)))
    assert law.dimension == pytest.approx(1)
    assert law.interval[1] - law.interval[0] > 1
    assert any("one trajectory says little" in remark for remark in law.remarks)


# its error

MOTIONS = {
    "brownian_2": (fractional(1.0), torch.ones(2), 0.0, lambda t: t),
    "brownian_10": (fractional(1.0), torch.ones(10), 0.0, lambda t: t),
    "brownian_1000": (fractional(1.0), torch.ones(1000), 0.0, lambda t: t),
    "decaying_spectrum": (fractional(1.0), 1 / torch.arange(1, 200), 0.0, lambda t: t),
    "persistent": (fractional(1.5), torch.ones(10), 0.0, lambda t: t**1.5),
    "antipersistent": (fractional(0.5), torch.ones(10), 0.0, lambda t: t**0.5),
    "drift": (fractional(1.0), torch.ones(30), 0.1, lambda t: t + 0.01 * t**2),
    "strong_drift": (fractional(1.0), torch.ones(100), 4.0, lambda t: t + 16 * t**2),
    "bowl": (bowl(3 / SIZE), torch.ones(20), 0.0, lambda t: 1 - torch.exp(-3 * t / SIZE)),
    "plateau": (bowl(1.0), torch.ones(50), 0.0, lambda t: 1 - torch.exp(-t)),
}


def measured(motion, count):
    """Deviations from the expected exponent and errors; how often the true curve, and the power law, are excluded."""
    root, spectrum, drift, curve = MOTIONS[motion]
    true = apparent_exponent(curve, SIZE / 10, SIZE)
    source = generator(len(motion))
    deviations, errors, nulls, laws = [], [], 0, 0
    for _ in range(count):
        positions = walk(root, spectrum, source, drift)
        law = fitted(positions)
        against = compare(law, curve, LAGS, displacement(positions))
        deviations.append(law.exponent - true)
        errors.append(law.error)
        nulls += against.null_is_excluded
        laws += against.power_law_is_excluded
    return torch.tensor(deviations), torch.tensor(errors), nulls, laws


def test_two_errors_cover_and_a_true_curve_is_seldom_excluded():
    """Least-squares errors cover 45 % here, a block bootstrap of the points 75 %."""
    covered, excluded = {}, {}
    for motion in MOTIONS:
        deviations, errors, nulls, _ = measured(motion, 6)
        covered[motion] = int((deviations.abs() <= 2 * errors).sum())
        excluded[motion] = nulls
    assert min(covered.values()) >= 4, covered
    assert sum(covered.values()) >= 53, covered
    assert max(excluded.values()) <= 2, excluded
    assert sum(excluded.values()) <= 6, excluded


@pytest.mark.slow
@pytest.mark.parametrize("motion", MOTIONS)
def test_two_errors_cover_every_motion(motion):
    deviations, errors, nulls, _ = measured(motion, 200)
    assert int((deviations.abs() <= 2 * errors).sum()) >= 182  # 4 standard deviations below 95 %
    assert nulls <= 25


def test_the_error_is_not_larger_than_the_spread():
    deviations, errors, _, laws = measured("brownian_10", 30)
    assert 0.75 < float(errors.median() / deviations.std()) < 1.35
    assert laws <= 3


def test_the_error_shrinks_with_the_root_of_the_dimension():
    few, many = (fitted(walk(fractional(1.0), torch.ones(d), generator(5))) for d in (25, 2500))
    assert few.error / many.error == pytest.approx(10, rel=0.35)


@pytest.mark.parametrize("dimension", [1.0, 1.3, 2.0, 5.7, 23.9, 24.0, 300.0])
def test_motions_of_few_dimensions_are_simulated_in_as_many(dimension):
    weights, shrink = _directions(dimension)
    assert float(weights.sum() ** 2 / weights.square().sum()) / shrink**2 == pytest.approx(dimension)
    assert len(weights) == min(24, math.ceil(dimension))


# the effective dimension


@pytest.mark.parametrize("c", [0.5, 1.0, 1.5])
def test_the_dimension_of_an_even_motion_is_that_of_its_space(c):
    root = fractional(c)
    found = [effective_dimension(walk(root, torch.ones(40), generator(seed))) for seed in range(10)]
    assert sum(found) / 10 == pytest.approx(40, rel=0.06)


def test_the_dimension_of_an_uneven_motion_comes_from_its_spectrum():
    spectrum = torch.tensor([4.0] * 10 + [1.0] * 200)
    expected = float(spectrum.sum() ** 2 / spectrum.square().sum())
    found = [effective_dimension(walk(fractional(1.0), spectrum, generator(seed))) for seed in range(10)]
    assert sum(found) / 10 == pytest.approx(expected, rel=0.1)


def test_drift_and_scale_do_not_change_the_dimension_and_speed_that_varies_hardly():
    positions = walk(fractional(1.0), torch.ones(60), generator(0))
    dimension = effective_dimension(positions)
    drifting = positions + 3 * TIMES[:, None] * torch.ones(60)
    assert effective_dimension(drifting) == pytest.approx(dimension, rel=1e-6)
    assert effective_dimension(1e-3 * positions) == pytest.approx(dimension)
    slowing = (positions.diff(dim=0) / (1 + TIMES[1:, None]).sqrt()).cumsum(0)
    assert effective_dimension(slowing) == pytest.approx(60, rel=0.2)


def test_motion_along_a_line_has_one_dimension_and_no_fluctuation_has_all():
    line = walk(fractional(1.0), [1.0], generator(0)) * torch.ones(7)
    assert effective_dimension(line) == pytest.approx(1)
    assert effective_dimension(TIMES[:, None] * torch.arange(3)) == math.inf


def test_a_coarser_stride_counts_where_it_shows_fewer_dimensions():
    """Fast motion in a bowl of 300 dimensions, and a slow walk in five."""
    source = generator(0)
    times = 257
    fast = torch.randn(times, 300, generator=source, dtype=torch.float64)
    slow = torch.randn(times, 5, generator=source, dtype=torch.float64).cumsum(0)
    assert effective_dimension(torch.cat([fast, 8 * slow], dim=1)) < 12
    assert effective_dimension(torch.cat([fast, 8 * slow], dim=1)[:32]) > 12


def test_a_projection_is_taken_into_account():
    positions = walk(fractional(1.0), torch.ones(4000), generator(0))
    signs = torch.randint(0, 2, (4000,), generator=generator(1)) * 2 - 1
    small = torch.nn.functional.pad(positions * signs, (0, 96)).view(len(positions), 4, 1024).sum(1)
    assert effective_dimension(small) == pytest.approx(1024, rel=0.1)
    assert effective_dimension(small, 4000) > 2500
    assert effective_dimension(small, 4000) <= 4000
    mixed = (
        walk(fractional(1.0), torch.ones(300), generator(0)) @ torch.randn(300, 1500, generator=generator(1)).double()
    )
    small = torch.nn.functional.pad(mixed * signs[:1500], (0, 548)).view(len(mixed), 2, 1024).sum(1)
    assert effective_dimension(small, 1500) == pytest.approx(effective_dimension(mixed), rel=0.06)
    few = walk(fractional(1.0), torch.ones(20), generator(0))
    mixed = few @ torch.randn(20, 256, generator=generator(1), dtype=torch.float64) / 16
    assert effective_dimension(mixed, 20) == pytest.approx(effective_dimension(few), rel=0.15)


def test_too_few_positions_have_no_dimension():
    with pytest.raises(ValueError, match="n ≥ 17"):
        effective_dimension(torch.zeros(16, 3))


# what should be known before an exponent is believed


def test_without_snapshots_there_is_no_error_and_it_is_said():
    law = power_law(LAGS, LAGS, 10, 90, positions=torch.zeros(5, 2))
    assert math.isnan(law.error)
    assert any("no error" in remark for remark in law.remarks)


def test_a_short_window_and_a_saturated_one_are_remarked():
    lags = log_spaced(1, 1000)
    curve = 1 - torch.exp(-lags / 20)
    short = power_law(lags, curve, 2, 10)
    assert any("0.70 decades" in remark for remark in short.remarks)
    assert not any("saturated" in remark for remark in short.remarks)
    flat = power_law(lags, curve, 30, 300)
    assert any("saturated" in remark for remark in flat.remarks)
    assert not any("decades" in remark for remark in flat.remarks)
    constant = power_law(lags, torch.full_like(lags, 3), 30, 300)
    assert constant.exponent == pytest.approx(0, abs=1e-12)
    assert math.isnan(constant.r_squared)


def test_a_curve_that_bends_is_no_power_law():
    law = fitted(walk(fractional(1.0), torch.ones(1000), generator(0), drift=0.2))
    assert law.residual > law.residual_limit
    assert any("not a power law" in remark for remark in law.remarks)


def test_steps_that_grow_have_no_error():
    walked = walk(fractional(1.0), torch.ones(200), generator(0))
    positions = torch.cat([walked[:1], (walked.diff(dim=0) * TIMES[1:, None] ** 0.8).cumsum(0)])
    law = fitted(positions)
    assert law.exponent > 2.3
    assert math.isnan(law.error)
    assert any("above 2" in remark for remark in law.remarks)


def test_a_way_back_is_as_uncertain_as_staying():
    source = generator(0)
    positions = torch.randn(SIZE + 1, 200, generator=source, dtype=torch.float64)
    positions[1:] *= (1 + 20 / TIMES[1:, None]) ** 0.5
    law = fitted(positions)
    assert law.exponent < -0.1
    assert law.interval[0] < law.exponent < law.interval[1] < 0.1
    assert law.error < 0.1


@pytest.mark.parametrize(
    ("start", "stop", "values", "said"),
    [
        (0.5, 50, 1.0, "reaches beyond the lags"),
        (10, 101, 1.0, "reaches beyond the lags"),
        (50, 55, 1.0, "three are needed"),
        (2, 50, 0.0, "no logarithm"),
        (2, 50, math.inf, "no logarithm"),
    ],
)
def test_an_exponent_that_the_data_do_not_determine_is_undefined(start, stop, values, said):
    lags = log_spaced(1, 100)
    squares = torch.where(lags > 20, values, lags.double())
    for fit in (power_law, drift_diffusion):
        with pytest.raises(UndefinedExponentError, match=said):
            fit(lags, squares, start, stop)


@pytest.mark.parametrize(
    ("lags", "squares", "start", "stop"),
    [
        ([1, 2, 3], [1.0, 2.0], 1, 3),
        ([1], [1.0], 1, 3),
        ([0, 1, 2], [1.0, 2.0, 3.0], 1, 2),
        ([1, 3, 2], [1.0, 2.0, 3.0], 1, 2),
        ([1, 2, 3], [1.0, 2.0, 3.0], 3, 1),
        ([1, 2, 3], [1.0, 2.0, 3.0], 1, math.nan),
    ],
)
def test_malformed_arguments_are_refused(lags, squares, start, stop):
    with pytest.raises(ValueError) as caught:
        power_law(torch.tensor(lags), torch.tensor(squares), start, stop)
    assert not isinstance(caught.value, UndefinedExponentError)


# local exponents


def test_local_exponents_of_a_power_are_that_power():
    lags = log_spaced(1, 5000)
    at, exponents = local_exponents(lags, 2 * lags.double() ** 0.8, width=0.5)
    assert exponents.tolist() == pytest.approx([0.8] * len(exponents))
    assert float(at[0]) == pytest.approx(10**0.25)
    assert float(at[-1]) == pytest.approx(5000 / 10**0.25, rel=0.13)


def test_motion_with_friction_in_a_bowl_crosses_over_from_two_through_one_to_nothing():
    slow, fast = 1e-5, 1e-1
    lags = log_spaced(1, 10**8)
    t = lags.double()
    squares = (fast * -torch.expm1(-slow * t) + slow * torch.expm1(-fast * t)) / (fast - slow)
    at, exponents = local_exponents(lags, squares)
    near = lambda t: float(exponents[int((at.log() - math.log(t)).abs().argmin())])  # noqa: E731
    assert near(1.8) == pytest.approx(2, abs=0.1)
    assert near(1e3) == pytest.approx(1, abs=0.03)
    assert near(1e7) == pytest.approx(0, abs=1e-6)


def test_local_exponents_need_some_displacement_and_a_width():
    lags = log_spaced(1, 1000)
    squares = torch.where(lags <= 10, 0.0, lags.double())
    at, exponents = local_exponents(lags, squares)
    assert bool(exponents[at < 10].isnan().all())
    assert exponents[at > 22].tolist() == pytest.approx([1] * int((at > 22).sum()))
    assert [len(part) for part in local_exponents(lags[:3], lags[:3])] == [0, 0]
    with pytest.raises(ValueError, match="positive"):
        local_exponents(lags, squares, width=0)


# nulls


@pytest.mark.parametrize(("diffusion", "drift"), [(2.0, 0.01), (0.3, 0.0), (0.0, 4.0), (1e-3, 10.0)])
def test_drift_and_diffusion_are_found_again(diffusion, drift):
    lags = log_spaced(1, 1000)
    t = lags.double()
    found = drift_diffusion(lags[:1].new_tensor(range(1, 1001)), found_curve(diffusion, drift), 10, 1000)
    assert found.diffusion == pytest.approx(diffusion, rel=1e-3, abs=1e-9)
    assert found.drift == pytest.approx(drift, rel=1e-3, abs=1e-9)
    assert found.r_squared == pytest.approx(1, abs=1e-6)
    assert found.curve(lags).tolist() == pytest.approx((diffusion * t + drift * t**2).tolist(), rel=1e-3)


def found_curve(diffusion, drift):
    t = torch.arange(1, 1001, dtype=torch.float64)
    return diffusion * t + drift * t**2


def test_drift_and_diffusion_imitate_an_anomalous_exponent():
    """Amendment A9: c = 1.14 with R² = .998 or more, and there is nothing anomalous."""
    lags = torch.arange(1, 1001)
    squares = found_curve(1.0, 0.00047)
    law, null = power_law(lags, squares, 100, 1000), drift_diffusion(lags, squares, 100, 1000)
    assert law.exponent == pytest.approx(1.14, abs=0.005)
    assert law.r_squared > 0.998
    assert null.exponent == pytest.approx(law.exponent, abs=1e-4)
    assert null.exponent == pytest.approx(apparent_exponent(null.curve, 100, 1000))
    assert null.r_squared > law.r_squared


def test_nothing_is_fitted_better_than_by_the_least_squares_of_drift_and_diffusion():
    lags = torch.arange(1, 1001)
    squares = lags.double() ** 1.4 * (1 + 0.2 * torch.sin(lags / 50))
    null = drift_diffusion(lags, squares, 30, 1000)
    points = torch.logspace(math.log10(30), 3, 31, dtype=torch.float64)
    y = resample(lags, squares, points).log()
    loss = lambda a, b: float((y - (a * points + b * points**2).log()).square().sum())  # noqa: E731
    best = loss(null.diffusion, null.drift)
    for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        assert loss(a * null.diffusion, b * null.drift) > best
    assert null.r_squared == pytest.approx(1 - best / float((y - y.mean()).square().sum()), abs=1e-3)


def test_a_pure_walk_has_no_drift_and_saturation_none_either():
    lags = torch.arange(1, 1001)
    for squares in (lags.double(), lags.double() ** 0.7):
        null = drift_diffusion(lags, squares, 10, 1000)
        assert null.drift == 0
        assert null.exponent == pytest.approx(1)
    assert null.r_squared == pytest.approx(1 - (0.3 / 0.7) ** 2)


def test_drift_and_diffusion_are_told_from_a_power_law_where_they_differ_enough():
    drifting = walk(fractional(1.0), torch.ones(2000), generator(0), drift=0.15)
    squares = displacement(drifting)
    law, null = fitted(drifting), drift_diffusion(LAGS, squares, SIZE / 10, SIZE)
    against = compare(law, null.curve, LAGS, squares)
    assert (against.null_is_excluded, against.power_law_is_excluded) == (False, True)
    assert against.residual < against.power_law_residual
    persistent = walk(fractional(1.5), torch.ones(2000), generator(1))
    squares = displacement(persistent)
    law, null = fitted(persistent), drift_diffusion(LAGS, squares, SIZE / 10, SIZE)
    against = compare(law, null.curve, LAGS, squares)
    assert (against.null_is_excluded, against.power_law_is_excluded) == (True, False)


def test_few_dimensions_cannot_tell_drift_from_a_power_law():
    drifting = walk(fractional(1.0), torch.ones(20), generator(0), drift=0.1)
    law, squares = fitted(drifting), displacement(drifting)
    against = compare(law, drift_diffusion(LAGS, squares, SIZE / 10, SIZE).curve, LAGS, squares)
    assert not against.null_is_excluded
    assert not against.power_law_is_excluded


def test_a_comparison_splits_into_amplitude_exponent_and_shape():
    positions = walk(fractional(1.0), torch.ones(300), generator(0))
    law, squares = fitted(positions), displacement(positions)
    own = compare(law, law.curve, LAGS, squares)
    assert own.amplitude == pytest.approx(1)
    assert own.deviation == pytest.approx(0, abs=1e-9)
    assert own.residual == pytest.approx(law.residual) == own.power_law_residual
    assert own.r_squared == pytest.approx(law.r_squared)
    other = compare(law, lambda t: 5 * law.curve(t) * t**-0.4, LAGS, squares)
    assert other.exponent == pytest.approx(law.exponent - 0.4)
    assert other.deviation == pytest.approx(0.4 / law.error)
    assert other.residual == pytest.approx(law.residual)
    assert other.r_squared < own.r_squared
    assert other.null_is_excluded
    scaled = compare(law, lambda t: law.curve(t) / 4, LAGS, squares)
    assert scaled.amplitude == pytest.approx(4)
    assert not scaled.null_is_excluded


def test_nothing_is_excluded_without_an_error_and_a_line_is_no_reason_to_exclude_a_drift():
    positions = TIMES[:, None] * torch.ones(3)
    squares = displacement(positions)
    law, null = fitted(positions), drift_diffusion(LAGS, squares, SIZE / 10, SIZE)
    assert (null.diffusion, null.drift) == (0, pytest.approx(3))
    against = compare(law, null.curve, LAGS, squares)
    assert (against.null_is_excluded, against.power_law_is_excluded) == (False, False)
    assert compare(law, lambda t: t, LAGS, squares).null_is_excluded
    unknown = compare(power_law(LAGS, squares, 10, 90), lambda t: t, LAGS, squares)
    assert math.isnan(unknown.deviation)
    assert (unknown.null_is_excluded, unknown.power_law_is_excluded) == (False, False)


def test_a_predicted_curve_may_be_given_by_its_values():
    positions = walk(fractional(1.0), torch.ones(300), generator(0))
    law, squares = fitted(positions), displacement(positions)
    assert compare(law, LAGS**1.2, LAGS, squares).exponent == pytest.approx(1.2)


def test_the_exponent_that_a_bowl_feigns():
    curve = lambda t: 1 - torch.exp(-t / 100)  # noqa: E731
    lags = torch.arange(1, 2001)
    feigned = apparent_exponent(curve, 30, 300)
    assert 0.3 < feigned < 0.9
    assert power_law(lags, curve(lags.double()), 30, 300).exponent == pytest.approx(feigned, abs=1e-3)
    assert apparent_exponent(curve, 2000, 20_000) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UndefinedExponentError):
        apparent_exponent(lambda t: t - 100, 30, 300)


# two times


def test_two_time_displacements_of_a_line_depend_on_the_lag_alone():
    times = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128, 256])
    found = two_time(times, times[:, None] * torch.tensor([3.0, 4.0]), torch.tensor([1, 8, 60]))
    assert found.waits.tolist() == [1, 8, 64]
    assert found.squares.shape == (3, len(found.lags))
    for row, wait in zip(found.squares, found.waits, strict=True):
        first = float(times[times > wait][0] - wait)
        known = (found.lags >= first) & (found.lags <= 256 - wait)
        assert row[known].tolist() == pytest.approx((25 * found.lags[known].double() ** 2).tolist())
        assert bool(row[~known].isnan().all())


def test_two_time_displacements_are_those_of_the_snapshots():
    positions = walk(fractional(1.0), torch.ones(5), generator(0))
    found = two_time(TIMES, positions, torch.tensor([3, 3.2, 50]))
    assert found.waits.tolist() == [3, 50]
    for row, wait in zip(found.squares, (3, 50), strict=True):
        for square, lag in zip(row.tolist(), found.lags.tolist(), strict=True):
            if wait + lag <= SIZE:
                assert square == pytest.approx(float((positions[wait + lag] - positions[wait]).square().sum()))
            else:
                assert math.isnan(square)


@pytest.mark.parametrize(
    ("times", "waits"), [([0, 1], [1]), ([0, 1, 1], [1]), ([0, 1, 2], [3]), ([0, 1, 2], []), ([1, 2, 3], [0])]
)
def test_waiting_times_without_snapshots_are_refused(times, waits):
    with pytest.raises(ValueError, match=r"needed|must lie"):
        two_time(torch.tensor(times), torch.zeros(len(times), 2), torch.tensor(waits))


def expected_curves(clock, c=1.0):
    waits, lags = torch.tensor([10.0, 40, 160, 640], dtype=torch.float64), log_spaced(1, 5000, 10)
    squares = (clock(waits[:, None] + lags) - clock(waits[:, None])).abs() ** c
    return TwoTime(waits, lags, torch.where(waits[:, None] + lags <= 6000, squares, math.nan))


@pytest.mark.parametrize("c", [0.6, 1.0, 1.5])
def test_a_stationary_motion_does_not_age(c):
    assert aging_exponent(expected_curves(lambda t: t, c)).exponent == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("c", [0.6, 1.0, 1.5])
def test_a_walk_in_the_logarithm_of_time_ages_fully(c):
    found = aging_exponent(expected_curves(torch.log, c))
    assert found.exponent == pytest.approx(1, abs=0.02)
    assert math.isnan(found.error)


@pytest.mark.parametrize("mu", [0.31, 0.5])
def test_subaging_lies_in_between(mu):
    """A power of t/t_w^μ that turns into another."""
    curves = expected_curves(torch.log)
    u = curves.lags / curves.waits[:, None] ** mu
    found = aging_exponent(TwoTime(curves.waits, curves.lags, 7 * u / (1 + u / 10) ** 0.5))
    assert found.exponent == pytest.approx(mu, abs=0.005)
    assert found.residual < 0.15


def test_the_units_of_length_and_time_do_not_change_aging():
    curves = expected_curves(torch.log)
    other = TwoTime(3 * curves.waits, 3 * curves.lags, 100 * curves.squares)
    assert aging_exponent(other).exponent == pytest.approx(aging_exponent(curves).exponent, abs=1e-6)


@pytest.mark.parametrize("mu", [0, 1])
@pytest.mark.parametrize("dimension", [3, 400])
def test_the_error_of_aging_covers(mu, dimension):
    """Brownian walks, in time and in its logarithm, from one trajectory each."""
    times = torch.arange(5, 801, 5, dtype=torch.float64)
    clock = times.log() if mu else times
    steps = clock.diff(prepend=clock[:1]).sqrt()[:, None] / dimension**0.5
    waits = torch.tensor([40, 80, 160, 320])
    source, hits, deviations, errors = generator(dimension + mu), 0, [], []
    for _ in range(15):
        positions = (steps * torch.randn(len(times), dimension, generator=source, dtype=torch.float64)).cumsum(0)
        found = aging_exponent(two_time(times, positions, waits), dimension)
        hits += abs(found.exponent - mu) <= 2 * found.error
        deviations.append(found.exponent - mu)
        errors.append(found.error)
    assert hits >= 12
    ratio = float(torch.tensor(errors).median() / torch.tensor(deviations).square().mean().sqrt())
    assert 0.5 < ratio < 2.2


def test_the_error_is_continuous_where_the_clock_becomes_logarithmic():
    waits, lags = torch.tensor([10.0, 40, 160, 640], dtype=torch.float64), log_spaced(1, 5000, 10)
    errors = []
    for mu in (0.99, 1.0):
        shifted = lags.log() - mu * waits.log()[:, None]
        found = aging_exponent(TwoTime(waits, lags, (shifted + 0.02 * shifted**2).exp()), 100)
        assert found.exponent == pytest.approx(mu, abs=5e-4)
        errors.append(found.error)
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_aging_of_a_saturated_motion_is_said_to_be_unknown():
    source = generator(0)
    times = torch.arange(1, 301)
    positions = torch.randn(300, 50, generator=source, dtype=torch.float64)
    found = aging_exponent(two_time(times, positions, torch.tensor([10, 30, 100])), 50)
    assert any("saturated" in remark for remark in found.remarks)
    assert found.error > 0.3


def test_aging_needs_two_waiting_times():
    curves = expected_curves(torch.log)
    with pytest.raises(UndefinedExponentError, match="two positive waiting times"):
        aging_exponent(TwoTime(curves.waits[:1], curves.lags, curves.squares[:1]))
    with pytest.raises(UndefinedExponentError):
        aging_exponent(TwoTime(0 * curves.waits, curves.lags, curves.squares))
    curves.squares[1:, 4:] = math.nan
    with pytest.raises(UndefinedExponentError, match="five values"):
        aging_exponent(curves)


def test_curves_that_no_shift_brings_together_are_remarked():
    """The displacement grows with the waiting time faster than with the lag."""
    curves = expected_curves(lambda t: t)
    found = aging_exponent(TwoTime(curves.waits, curves.lags, curves.squares * curves.waits[:, None] ** 3))
    assert found.exponent == -1
    assert any("no collapse" in remark for remark in found.remarks)
