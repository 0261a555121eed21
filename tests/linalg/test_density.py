import math

import pytest
import torch
from helpers.operators import DiagonalOperator, generator, network_like, random_symmetric

from lightning_dynamics.linalg import MatrixOperator, spectral_density

OUTLIERS = [9.0, 5.0, 3.0]


def network_operator():
    spectrum = network_like(OUTLIERS)
    return spectrum, DiagonalOperator(spectrum), torch.eye(len(spectrum), dtype=torch.float64)[: len(OUTLIERS)]


def test_with_all_steps_every_vector_sees_the_whole_spectrum():
    spectrum = torch.tensor([4.0, 2.0, 1.0, 0.5, -0.5, -3.0], dtype=torch.float64)
    density = spectral_density(MatrixOperator(random_symmetric(spectrum)), num_vectors=3, num_steps=50)
    for row in density.nodes:
        assert torch.allclose(row.sort().values, spectrum.sort().values, atol=1e-10)
    assert torch.allclose(density.weights.sum(1), torch.ones(3, dtype=torch.float64))
    nodes, weights = density.points()
    assert float(weights.sum()) == pytest.approx(1)
    assert torch.equal(nodes, nodes.sort().values)


def test_known_eigenpairs_enter_exactly():
    spectrum = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    density = spectral_density(DiagonalOperator(spectrum), known=spectrum, vectors=torch.eye(4, dtype=torch.float64))
    assert density.trace.value == 7.5
    assert density.trace.error == 0
    assert density.products == 0
    nodes, weights = density.points()
    assert nodes.tolist() == [0.5, 1.0, 2.0, 4.0]
    assert weights.tolist() == [0.25] * 4


def test_the_trace_is_unbiased_and_its_error_covers_as_it_says():
    """At 8 vectors Student's t with 7 degrees of freedom gives 95 % at 2.365 standard errors."""
    spectrum, operator, vectors = network_operator()
    exact, hits, values = float(spectrum.sum()), 0, []
    for seed in range(400):
        trace = spectral_density(
            operator, known=spectrum[:3], vectors=vectors, num_vectors=8, num_steps=1, generator=generator(seed)
        ).trace
        values.append(trace.value)
        hits += abs(trace.value - exact) <= 2.365 * trace.error
    mean, spread = float(torch.tensor(values).mean()), float(torch.tensor(values).std())
    assert abs(mean - exact) < 4 * spread / math.sqrt(400)
    assert 0.95 - 0.035 <= hits / 400 <= 0.95 + 0.035


def test_taking_the_outliers_out_pays():
    spectrum, operator, vectors = network_operator()
    options = {"num_vectors": 8, "num_steps": 10}
    without = spectral_density(operator, generator=generator(), **options).trace.error
    with_them = spectral_density(
        operator, known=spectrum[:3], vectors=vectors, generator=generator(), **options
    ).trace.error
    assert with_them < without / 3


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_effective_parameters(alpha):
    spectrum = network_like(OUTLIERS).clamp(min=0)
    vectors = torch.eye(len(spectrum), dtype=torch.float64)[:3]
    density = spectral_density(DiagonalOperator(spectrum), known=spectrum[:3], vectors=vectors, num_steps=30)
    estimate = density.sum(lambda values: values / (values + alpha))
    exact = float((spectrum / (spectrum + alpha)).sum())
    assert estimate.value == pytest.approx(exact, abs=4 * estimate.error)
    assert estimate.error < 0.1 * exact


def test_multiplicities_keep_their_weight():
    spectrum = torch.cat([torch.full((30,), 2.0), torch.full((70,), -1.0)]).double()
    density = spectral_density(DiagonalOperator(spectrum), num_vectors=200, num_steps=10)
    share = density.sum(lambda values: (values > 0).double())
    assert share.value == pytest.approx(30, abs=4 * share.error)
    assert share.error < 1
    # each vector's space ends after two steps: the rest of its row is padding
    assert int((density.weights > 1e-12).sum()) == 400
    assert density.products <= 600


def test_the_smoothed_density_integrates_to_one_and_peaks_where_the_spectrum_does():
    spectrum, operator, vectors = network_operator()
    density = spectral_density(operator, known=spectrum[:3], vectors=vectors)
    grid = torch.linspace(-3, 12, 3001)
    curve = density.smoothed(grid, 0.1)
    assert float(torch.trapezoid(curve, grid.double())) == pytest.approx(1, abs=1e-6)
    assert abs(float(grid[curve.argmax()])) < 0.2
    at_outlier = float(density.smoothed(torch.tensor([9.0]), 0.1))
    assert at_outlier == pytest.approx(1 / (len(spectrum) * 0.1 * math.sqrt(2 * math.pi)), rel=1e-3)


def test_the_same_generator_gives_the_same_numbers_and_none_is_reproducible():
    operator = network_operator()[1]
    first, second = (spectral_density(operator, generator=generator(3)) for _ in range(2))
    assert torch.equal(first.nodes, second.nodes)
    assert torch.equal(spectral_density(operator).nodes, spectral_density(operator).nodes)
    assert not torch.equal(first.nodes, spectral_density(operator).nodes)


def test_one_vector_has_no_error():
    assert math.isnan(spectral_density(network_operator()[1], num_vectors=1).trace.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": torch.ones(1)}, "both `known` eigenvalues and their `vectors`"),
        ({"known": torch.ones(2), "vectors": torch.ones(1, 403)}, "one row of length 403 for each of the 2"),
        ({"num_vectors": 0}, "`num_vectors` must be at least 1, got 0"),
        ({"num_steps": 0}, "`num_steps` must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(network_operator()[1], **options)


def test_a_width_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`width` must be positive"):
        spectral_density(network_operator()[1]).smoothed(torch.zeros(1), 0.0)
