import math

import pytest
import torch
from helpers.draws import gradients
from helpers.operators import generator
from scipy import optimize, stats

from lightning_dynamics.metrics import Estimate, UnresolvedGradientError, squared_gradient_norm
from lightning_dynamics.metrics.estimates import (
    check_resolved,
    jackknife,
    mean_estimate,
    norm_pseudovalues,
    over_partners,
    partner,
    ratio_estimate,
    resolved_ratio,
    student_quantile,
    variance_pseudovalues,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def without(values, m):
    return values[torch.arange(len(values)) != m]


def test_the_error_of_a_mean_is_its_standard_error():
    values = normal(17) * 3 + 1
    found = mean_estimate(values)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(float(values.std()) / 17**0.5)


def test_the_jackknife_leaves_out_one_group_in_turn():
    rows = normal(9, 2).exp()
    found = ratio_estimate(rows[:, 0], rows[:, 1])
    others = torch.stack([without(rows, m).mean(0) for m in range(9)])
    ratios = others[:, 0] / others[:, 1]
    assert found.value == pytest.approx(float(rows[:, 0].mean() / rows[:, 1].mean()))
    assert found.error == pytest.approx(math.sqrt(8 / 9 * float((ratios - ratios.mean()).square().sum())))


def test_one_group_has_no_error_and_none_is_refused():
    assert mean_estimate(torch.tensor([2.0])) == Estimate(2.0, None)
    assert Estimate(2.0, None).scaled(3) == Estimate(6.0, None)
    assert Estimate(2.0, 0.5).scaled(-2) == Estimate(-4.0, 1.0)
    assert resolved_ratio(torch.tensor([3.0]), torch.tensor([2.0]), "it") == Estimate(1.5, None)
    with pytest.raises(ValueError, match="At least one group"):
        jackknife(torch.zeros(0, 1), lambda means: means[..., 0])


def test_partners_are_neighbours():
    values = torch.arange(6.0)
    assert partner(values).tolist() == [1, 0, 3, 2, 5, 4]
    assert over_partners(values).tolist() == [0.5, 2.5, 4.5]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 15, 31, 1000])
def test_the_quantile_is_that_of_students_t(freedom):
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=5e-3)


def test_pseudo_values_are_those_of_leaving_draws_out():
    g, count = normal(7, 3) + 1, 7

    def squared_norm(g):
        table = gradients(g, 1)
        dots = g @ g.mT
        pairs = float(dots.sum() - dots.diagonal().sum()) / (len(g) * (len(g) - 1))
        assert squared_gradient_norm(table).value == pytest.approx(pairs)
        return pairs

    whole = squared_norm(g)
    expected = [count * whole - (count - 1) * squared_norm(without(g, m)) for m in range(count)]
    assert norm_pseudovalues(gradients(g, 1)).tolist() == pytest.approx(expected)
    x = g[:, 0]
    expected = [count * float(x.var()) - (count - 1) * float(without(x, m).var()) for m in range(count)]
    assert variance_pseudovalues((x - x.mean()).square()).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("level", [1.0, -1.0])
def test_a_ratio_over_a_noisy_denominator_has_the_width_of_fiellers_interval(level):
    above, below = level * (2 + normal(16)), level * (1 + 1.5 * normal(16, seed=1))
    found = resolved_ratio(above, below, "it")
    t = student_quantile(15)

    def margin(ratio):
        """Positive inside of the interval."""
        rest = mean_estimate(above - ratio * below)
        return t * rest.error - abs(rest.value)

    low = optimize.brentq(margin, found.value - 10, found.value)
    high = optimize.brentq(margin, found.value, found.value + 10)
    assert 2 * t * found.error == pytest.approx(high - low, rel=1e-6)
    assert found.error > 1.1 * ratio_estimate(above, below).error


def test_a_ratio_over_a_well_known_denominator_has_the_standard_error():
    above, below = 2 + normal(64), 50 + normal(64, seed=1)
    assert resolved_ratio(above, below, "it").error == pytest.approx(ratio_estimate(above, below).error, rel=2e-2)


def test_what_cannot_be_told_from_zero_is_no_denominator():
    with pytest.raises(UnresolvedGradientError, match=r"The slope is .* less than 3 errors from zero"):
        resolved_ratio(torch.ones(8), normal(8), "The slope")
    few = torch.tensor([1.0, 2.0])  # 3 errors, which two groups give often by chance
    with pytest.raises(UnresolvedGradientError, match=r"less than 12\.7 errors"):
        check_resolved(few, "It")
    with pytest.raises(UnresolvedGradientError):
        check_resolved(torch.zeros(8), "It")
    check_resolved(torch.ones(8), "It")
