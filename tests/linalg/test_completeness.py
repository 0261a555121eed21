import math

import pytest
import torch
from helpers.operators import DiagonalOperator, generator, network_like, random_symmetric

from lightning_dynamics.linalg import MatrixOperator, bound_complement


def coordinates(count, size, dtype=torch.float64):
    return torch.eye(size, dtype=dtype)[:count]


def test_a_small_complement_is_bounded_exactly():
    spectrum = [5.0, 4.0, 1.5, 0.3, -0.2, -2.0]
    bounds = bound_complement(
        DiagonalOperator(spectrum), coordinates(2, 6), generator(), stop_above=3.0, stop_below=-3.0, max_products=50
    )
    # stops as soon as nothing beyond 3 in absolute value is possible
    assert 1.5 <= bounds.upper <= 3.0
    assert -3.0 <= bounds.lower <= -2.0
    assert bounds.products <= 4
    assert len(bounds.witnesses) == 0
    exact = bound_complement(
        DiagonalOperator(spectrum), coordinates(2, 6), generator(), stop_above=1.5, stop_below=-2.0, max_products=50
    )
    assert exact.upper == pytest.approx(1.5, abs=1e-12)
    assert exact.lower == pytest.approx(-2.0, abs=1e-12)


def test_nothing_is_left_of_the_whole_space():
    bounds = bound_complement(DiagonalOperator([1.0, 2.0]), coordinates(2, 2), generator())
    assert bounds.upper == -math.inf
    assert bounds.products == 0


def test_a_second_copy_of_a_known_eigenvalue_is_met():
    spectrum = network_like([1.0, 1.0, 0.8])
    bounds = bound_complement(
        DiagonalOperator(spectrum), coordinates(1, len(spectrum)), generator(), stop_above=0.95, max_products=40
    )
    assert len(bounds.witnesses) == 1
    assert bounds.seen_top > 0.95
    # most of it lies in the eigenspace that was not locked
    assert float(bounds.witnesses[0][1] ** 2) > 0.5


def test_a_side_that_is_not_asked_for_stays_open():
    bounds = bound_complement(
        MatrixOperator(random_symmetric(torch.linspace(-1, 1, 30))),
        torch.empty(0, 30, dtype=torch.float64),
        generator(),
        stop_above=1.5,
    )
    assert bounds.lower == -math.inf
    assert bounds.upper < math.inf


@pytest.mark.parametrize("outliers", [[1.0], [1.0, 0.99, 0.5], [1.0] * 5, [1.0, 0.3]])
@pytest.mark.parametrize("products", [3, 6, 10])
def test_the_bound_fails_no_more_often_than_stated(outliers, products):
    """With a low confidence failures are frequent enough to be counted."""
    confidence, trials = 0.6, 150
    operator = DiagonalOperator(network_like(outliers, bulk=250))
    empty = torch.empty(0, operator.size, dtype=torch.float64)
    failures = 0
    for seed in range(trials):
        bounds = bound_complement(
            operator, empty, generator(seed), confidence=confidence, stop_above=1.0 + 1e-9, max_products=products
        )
        failures += bounds.upper < 1.0 - 1e-12
    allowed = (1 - confidence) / 2  # the other half is spent on the lower side
    assert failures / trials <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / trials)


def test_the_bound_is_not_far_from_the_truth():
    """A bound that never fails because it is infinite would be of no use."""
    operator = DiagonalOperator(network_like([1.0, 0.9]))
    empty = torch.empty(0, operator.size, dtype=torch.float64)
    reached = [
        bound_complement(operator, empty, generator(0), stop_above=1e-9 + limit, max_products=30).products
        for limit in (1.5, 1.1, 1.01)
    ]
    assert reached == sorted(reached)
    assert reached[-1] <= 16
