import math

import pytest
import torch
from helpers.operators import DiagonalOperator, generator

from lightning_dynamics.linalg import MatrixOperator, eigenpairs, spectral_density
from lightning_dynamics.metrics import (
    effective_parameters,
    median_ratio,
    negative_mass,
    overlap_error,
    principal_cosines,
    spectral_sparsity,
    subspace_overlap,
)


def exact(spectrum):
    """A density that knows its spectrum."""
    values = torch.tensor(spectrum, dtype=torch.float64)
    return spectral_density(DiagonalOperator(values), known=values, vectors=torch.eye(len(values)).double())


def random_rows(k, n, seed):
    rows = torch.randn(n, k, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(rows).Q.mT.contiguous()


def test_the_same_subspace_overlaps_wholly_whatever_its_basis():
    rows = random_rows(3, 20, 0)
    turned = random_rows(3, 3, 1) @ rows
    assert subspace_overlap(rows, turned) == pytest.approx(1)
    assert subspace_overlap(rows, -rows) == pytest.approx(1)


def test_orthogonal_subspaces_do_not_overlap():
    eye = torch.eye(6, dtype=torch.float64)
    assert subspace_overlap(eye[:2], eye[2:4]) == 0


def test_an_angle_gives_its_squared_cosine():
    eye = torch.eye(2, dtype=torch.float64)
    turned = torch.tensor([[math.cos(0.3), math.sin(0.3)]], dtype=torch.float64)
    assert subspace_overlap(eye[:1], turned) == pytest.approx(math.cos(0.3) ** 2)
    assert float(principal_cosines(eye[:1], turned)) == pytest.approx(math.cos(0.3))


def test_independent_subspaces_overlap_by_k_over_n():
    overlaps = [subspace_overlap(random_rows(3, 40, 2 * s), random_rows(3, 40, 2 * s + 1)) for s in range(400)]
    assert sum(overlaps) / 400 == pytest.approx(3 / 40, rel=0.05)


def test_subspaces_of_different_dimension_are_refused():
    with pytest.raises(ValueError, match="of the same dimension"):
        subspace_overlap(random_rows(2, 5, 0), random_rows(3, 5, 0))


@pytest.mark.parametrize("seed", range(20))
def test_the_subspace_is_as_good_as_its_error_says_and_so_is_the_overlap(seed):
    """True subspaces from a dense solver; the approximate ones from a loose tolerance."""
    turn = random_rows(60, 60, seed)
    spectrum = torch.cat([torch.tensor([9.0, 7.0, 6.0, 4.0]), torch.rand(56, generator=generator(seed)) * 3]).double()
    operator = MatrixOperator((turn.mT * spectrum) @ turn)
    found = eigenpairs(operator, 4, tolerance=3e-2, generator=generator(seed)).top
    error, true = found.subspace_error(3), turn[:3]
    sines = (1 - principal_cosines(found.vectors[:3], true).square()).clamp(min=0).sum().sqrt()
    assert float(sines) <= error + 1e-7
    other = random_rows(3, 60, 100 + seed)
    found_overlap, true_overlap = subspace_overlap(found.vectors[:3], other), subspace_overlap(true, other)
    assert abs(found_overlap - true_overlap) <= overlap_error(error, 0.0, 3) + 1e-7


def test_a_subspace_without_a_gap_is_not_certified():
    spectrum = torch.tensor([5.0, 3.0, 3.0, 1.0, *[0.1] * 20], dtype=torch.float64)
    found = eigenpairs(DiagonalOperator(spectrum), 3, generator=generator()).top
    assert found.subspace_error(2) > 1
    assert found.subspace_error(1) < 0.1
    assert found.subspace_error(3) < 0.1
    whole = eigenpairs(DiagonalOperator(torch.tensor([2.0, 1.0], dtype=torch.float64)), 2).top
    assert whole.subspace_error(2) == 0  # nothing lies below


def test_effective_parameters_at_the_limits():
    density = exact([4.0, 1.0, 0.5, 0.0, -2.0])
    assert effective_parameters(density, 1e-12).value == pytest.approx(3)
    assert effective_parameters(density, 1e12).value == pytest.approx(0, abs=1e-9)
    assert effective_parameters(exact([0.3] * 8), 0.3).value == pytest.approx(4)


def test_effective_parameters_do_not_change_with_the_scale():
    a, b = exact([4.0, 1.0, 0.5]), exact([40.0, 10.0, 5.0])
    assert effective_parameters(a, 0.04).value == pytest.approx(effective_parameters(b, 0.4).value)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_a_width_must_be_a_positive_number(alpha):
    with pytest.raises(ValueError, match="positive and finite"):
        effective_parameters(exact([1.0]), alpha)


def test_the_error_of_a_sum_covers_sampling_and_quadrature():
    """Σ λ/(λ + α) with α far below the spectrum's width: a hard function for a quadrature of few nodes."""
    spectrum = torch.cat([torch.tensor([9.0, 5.0]), torch.logspace(-3, 0, 198)]).double()
    alpha = 0.05
    true = float((spectrum / (spectrum + alpha)).sum())
    hits = 0
    for seed in range(200):
        density = spectral_density(DiagonalOperator(spectrum), num_vectors=8, num_steps=8, generator=generator(seed))
        found = effective_parameters(density, alpha)
        hits += abs(found.value - true) <= 2.365 * found.error
    assert hits / 200 >= 0.95


def test_negative_mass_and_sparsity():
    density = exact([6.0, 2.0, 0.01, -0.01, -2.0])
    assert negative_mass(density) == pytest.approx(2.01 / 10.02)
    assert spectral_sparsity(density, 0.1).value == pytest.approx(2 / 5)
    assert spectral_sparsity(density, 100.0).value == pytest.approx(1)
    assert negative_mass(exact([0.0, 0.0])) == 0


def test_the_ratio_to_the_median():
    assert median_ratio(torch.tensor([3.0, 3.0, 3.0])) == 1
    assert median_ratio(torch.tensor([-8.0, 1.0, 2.0])) == 4
    assert median_ratio(torch.tensor([-8.0, 1.0, 2.0]) * 7) == 4
    assert median_ratio(torch.tensor([5.0, 0.0, 0.0])) == math.inf
    # two entries that stand for a hundred coordinates outweigh three that stand for themselves
    weights = torch.tensor([1.0, 1.0, 1.0, 50.0, 50.0])
    assert median_ratio(torch.tensor([8.0, 8.0, 8.0, 2.0, 4.0]), weights) == 2
