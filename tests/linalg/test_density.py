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


STUDENT = {4: 3.182, 8: 2.365, 16: 2.131}  # two-sided 95 % at one degree of freedom less
NUMBERS = [pytest.param(4, marks=pytest.mark.slow), 8, pytest.param(16, marks=pytest.mark.slow)]
REPEATS = 200


def covered(operator, function, exact, num_vectors, num_steps, estimate="sum", **known):
    """In how many of REPEATS the estimate lies within what its own error allows at 95 %."""
    hits = 0
    for seed in range(REPEATS):
        density = spectral_density(
            operator, num_vectors=num_vectors, num_steps=num_steps, generator=generator(seed + 5000), **known
        )
        found = getattr(density, estimate)(function)
        hits += abs(found.value - exact) <= STUDENT[num_vectors] * found.error
    return hits / REPEATS


BY_CHANCE = 3.1 * math.sqrt(0.95 * 0.05 / REPEATS)


@pytest.mark.parametrize("num_vectors", NUMBERS)
def test_the_error_of_the_trace_covers_at_its_rate(num_vectors):
    spectrum, operator, vectors = network_operator()
    known = {"known": spectrum[:3], "vectors": vectors}
    rate = covered(operator, lambda values: values, float(spectrum.sum()), num_vectors, 1, **known)
    assert abs(rate - 0.95) <= BY_CHANCE


@pytest.mark.parametrize("num_vectors", NUMBERS)
def test_the_error_of_a_count_covers_at_its_rate_where_the_quadrature_is_exact(num_vectors):
    """Five different values: five steps resolve them, so that only the draw of the vectors is uncertain."""
    spectrum = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0]).double().repeat_interleave(torch.tensor([20, 60, 90, 50, 30]))
    within = lambda values: ((values > -1) & (values < 2)).double()  # noqa: E731
    exact = float(within(spectrum).sum())
    rate = covered(DiagonalOperator(spectrum), within, exact, num_vectors, 5)
    assert abs(rate - 0.95) <= BY_CHANCE


@pytest.mark.slow
@pytest.mark.parametrize("num_vectors", [4, 8, 16])
@pytest.mark.parametrize("interval", [(0.05, 0.2), (-0.1, 0.0), (0.1, 20.0)])
def test_the_error_beyond_polynomials_covers_a_count_whose_edges_lie_in_the_bulk(num_vectors, interval):
    """The quadrature is not exact here, and its error is not random: covered more often than 95 %, never less."""
    spectrum, operator, vectors = network_operator()
    known = {"known": spectrum[:3], "vectors": vectors}
    within = lambda values: ((values > interval[0]) & (values < interval[1])).double()  # noqa: E731
    exact = float(within(spectrum).sum())
    rate = covered(operator, within, exact, num_vectors, 16, "sum_beyond_polynomials", **known)
    assert rate >= 0.95 - BY_CHANCE


@pytest.mark.parametrize("options", [{}, {"num_vectors": 1, "num_steps": 1}, {"num_vectors": 3, "num_steps": 40}])
@pytest.mark.parametrize("with_known", [False, True])
@pytest.mark.parametrize(
    "spectrum",
    [network_like(OUTLIERS, bulk=60), torch.zeros(30).double(), torch.linspace(-3, -1, 50).double(), torch.ones(4)],
    ids=["network", "zero", "negative", "identity"],
)
def test_the_density_integrates_to_one_and_its_first_moment_is_the_mean_eigenvalue(options, with_known, spectrum):
    known = {"known": spectrum[:3], "vectors": torch.eye(len(spectrum), dtype=torch.float64)[:3]} if with_known else {}
    density = spectral_density(DiagonalOperator(spectrum), generator=generator(3), **known, **options)
    nodes, weights = density.points()
    scale = max(1.0, float(spectrum.abs().max()))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float((nodes * weights).sum()) == pytest.approx(density.trace.value / len(spectrum), abs=1e-12 * scale)
    grid = torch.linspace(-5, 12, 4001, dtype=torch.float64)
    curve = density.smoothed(grid, 0.1)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-9)
    mean = float(torch.trapezoid(curve * grid, grid))
    assert mean == pytest.approx(density.trace.value / len(spectrum), abs=1e-9 * scale)
    assert density.sum(torch.ones_like).value == pytest.approx(len(spectrum), abs=1e-9)


def test_the_rough_density_is_that_of_half_as_many_steps():
    operator = network_operator()[1]
    density = spectral_density(operator, num_vectors=3, num_steps=9, generator=generator(2))
    assert density.rough is not None
    assert density.rough.rough is None
    assert density.rough.nodes.shape == (3, 5)
    # the same vectors with that many steps
    for row in range(3):
        source = generator(2)
        for _ in range(row):
            torch.randn(operator.size, generator=source)
        alone = spectral_density(operator, num_vectors=1, num_steps=5, generator=source)
        expected, order = alone.nodes[0].sort()
        found, place = density.rough.nodes[row].sort()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(density.rough.weights[row][place], alone.weights[0][order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("degree", [0, 1, 2, 5, 7])
def test_beyond_polynomials_adds_nothing_to_a_polynomial(degree):
    """Half of eight steps is exact to degree 7."""
    density = spectral_density(network_operator()[1], num_vectors=4, num_steps=8, generator=generator(1))
    power = lambda values: values**degree  # noqa: E731
    plain, beyond = density.sum(power), density.sum_beyond_polynomials(power)
    assert beyond.value == plain.value
    assert beyond.error == pytest.approx(plain.error, rel=1e-6, abs=1e-9 * max(1.0, abs(plain.value)))


def test_beyond_polynomials_tells_the_error_of_the_quadrature():
    """All vectors agree here, so that their spread says nothing of how wrong they are together."""
    spectrum = torch.linspace(-1, 1, 4000).double()
    count = lambda values: (values > 0.03).double()  # noqa: E731
    exact = float(count(spectrum).sum())
    density = spectral_density(DiagonalOperator(spectrum), num_vectors=16, num_steps=7, generator=generator(0))
    plain, beyond = density.sum(count), density.sum_beyond_polynomials(count)
    assert abs(plain.value - exact) > 4 * plain.error
    assert abs(beyond.value - exact) < 2 * beyond.error
    assert beyond.error == pytest.approx(
        math.hypot(plain.error, plain.value - density.rough.sum(count).value), rel=1e-12
    )
