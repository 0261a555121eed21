import pytest
import torch
from helpers.operators import DiagonalOperator, generator, network_like, random_symmetric

from lightning_dynamics.linalg import MatrixOperator, eigenpairs

BULK = network_like([], bulk=300)

SPECTRA = {
    "outliers": network_like([3.0, 2.0, 1.0, 0.7]),
    "clusters": network_like([1.0, 0.99, 0.98, 0.6, 0.595, 0.59]),
    "double": network_like([1.0, 1.0, 0.6, 0.5]),
    "five copies": network_like([1.0] * 5 + [0.7]),
    "twelve copies": network_like([1.0] * 12),
    "copies of several": network_like([1.0] * 3 + [0.8] * 3 + [0.6] * 3),
    "nearly double": network_like([1.0, 1.0 - 1e-6, 0.5]),
    "decaying": 1.0 / torch.arange(1, 300, dtype=torch.float64),
    "semicircle": torch.randn(300, generator=generator(1), dtype=torch.float64).sort().values,
    "indefinite": torch.cat([torch.tensor([-5.0, -4.0, 1.0, 0.9], dtype=torch.float64), BULK]),
    "negative definite": -network_like([3.0, 2.0]) - 0.5,
    "rank three": torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(97)]).double(),
    "zero": torch.zeros(60, dtype=torch.float64),
    "identity": torch.ones(60, dtype=torch.float64),
}


def sorted_ends(spectrum, top, bottom):
    ascending = torch.as_tensor(spectrum, dtype=torch.float64).sort().values
    return ascending.flip(0)[:top], ascending[:bottom]


def assert_trustworthy(found, spectrum):
    """Inclusion, and completeness, and no value outside what its bound allows."""
    everything = torch.as_tensor(spectrum, dtype=torch.float64)
    true_top, true_bottom = sorted_ends(spectrum, len(found.top), len(found.bottom))
    for end, true in ((found.top, true_top), (found.bottom, true_bottom)):
        nearest = (end.values[:, None] - everything[None, :]).abs().amin(1) if len(end) else torch.zeros(0)
        assert (nearest <= end.residuals + found.product_error).all()
        assert ((end.values - true).abs() <= end.bounds).all()
    if found.top.limits is not None:
        assert (true_top <= found.top.limits).all()
        assert (true_bottom >= found.bottom.limits).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_bounds_and_limits_are_true(name, dtype):
    spectrum = SPECTRA[name].to(dtype).double()
    for seed in range(3):
        found = eigenpairs(DiagonalOperator(spectrum, dtype), top=4, bottom=1, generator=generator(seed))
        assert found.converged
        assert_trustworthy(found, spectrum)


@pytest.mark.parametrize("copies", [1, 2, 3, 6, 13])
def test_no_copy_of_a_multiple_eigenvalue_is_missed(copies):
    spectrum = network_like([1.0] * copies + [0.55, 0.5])
    for seed in range(5):
        found = eigenpairs(DiagonalOperator(spectrum), top=copies + 1, generator=generator(seed), tolerance=1e-5)
        expected = torch.tensor([1.0] * copies + [0.55], dtype=torch.float64)
        torch.testing.assert_close(found.top.values, expected, rtol=0, atol=2e-5)


def test_a_run_that_does_not_check_completeness_may_miss_copies():
    """The control: what the check is for."""
    spectrum = network_like([1.0, 1.0, 0.55, 0.5])
    found = eigenpairs(DiagonalOperator(spectrum), top=2, confidence=None)
    assert found.top.limits is None
    assert float(found.top.values[1]) == pytest.approx(0.55, abs=1e-3)


def test_eigenvectors_of_a_dense_matrix():
    matrix = random_symmetric(network_like([2.0, 1.5, -1.2], bulk=120), seed=2)
    found = eigenpairs(MatrixOperator(matrix), top=2, bottom=1, tolerance=1e-8, bottom_tolerance=1e-8)
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(found.top.values, values.flip(0)[:2], rtol=0, atol=1e-7)
    torch.testing.assert_close(found.bottom.values, values[:1], rtol=0, atol=1e-7)
    together = torch.cat([found.top.vectors, found.bottom.vectors])
    expected = vectors[:, [-1, -2, 0]].mT
    torch.testing.assert_close((together * expected).sum(1).abs(), torch.ones(3).double(), rtol=0, atol=1e-5)
    images = together @ matrix
    residuals = (images - torch.cat([found.top.values, found.bottom.values])[:, None] * together).norm(dim=1)
    torch.testing.assert_close(residuals, torch.cat([found.top.residuals, found.bottom.residuals]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "top", "bottom"), [(1, 1, 0), (1, 0, 1), (2, 1, 1), (4, 2, 2), (5, 5, 0), (7, 3, 4)])
def test_tiny_operators_are_solved_exactly(size, top, bottom):
    matrix = random_symmetric(torch.linspace(-1, 2, size) ** 3, seed=size)
    found = eigenpairs(MatrixOperator(matrix), top=top, bottom=bottom)
    expected = sorted_ends(torch.linalg.eigvalsh(matrix), top, bottom)
    torch.testing.assert_close(found.top.values, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.bottom.values, expected[1], rtol=0, atol=1e-12)
    assert found.products <= size


def test_the_gap_and_the_error_of_a_subspace():
    spectrum = network_like([3.0, 2.0, 1.0])
    found = eigenpairs(DiagonalOperator(spectrum), top=2, tolerance=1e-6)
    assert 0.9 < found.top.gap <= 1.0 + found.product_error  # less by the residual of the third
    for k in (1, 2):
        outside = found.top.vectors[:k, k:]  # the matrix is diagonal, with its largest entries first
        assert float(outside.norm()) <= found.top.subspace_error(k) < 0.1
    assert found.top.subspace_error(0) == found.top.subspace_error(3) == float("inf")


def test_where_there_is_no_gap_a_subspace_has_no_error():
    identity = eigenpairs(DiagonalOperator(torch.ones(60)), top=2)
    assert identity.top.subspace_error(1) == float("inf")


def test_the_whole_space_is_certain():
    whole = eigenpairs(DiagonalOperator([1.0, 2.0, 3.0]), top=3)
    assert whole.top.gap == float("inf")
    assert whole.top.subspace_error(3) == 0.0


def test_thick_restart_reaches_the_same_values():
    spectrum = SPECTRA["decaying"]
    wide = eigenpairs(DiagonalOperator(spectrum), top=3, tolerance=1e-6, confidence=None)
    narrow = eigenpairs(DiagonalOperator(spectrum), top=3, tolerance=1e-6, confidence=None, max_rows=16)
    torch.testing.assert_close(narrow.top.values, wide.top.values, rtol=0, atol=1e-6)
    assert narrow.converged


def test_giving_up_is_said():
    found = eigenpairs(DiagonalOperator(SPECTRA["semicircle"]), top=3, tolerance=1e-8, max_products=12, confidence=None)
    assert not found.converged
    assert found.products == 12
    assert_trustworthy_inclusion(found, SPECTRA["semicircle"])


def assert_trustworthy_inclusion(found, spectrum):
    nearest = (found.top.values[:, None] - spectrum[None, :]).abs().amin(1)
    assert (nearest <= found.top.residuals + found.product_error).all()


def test_the_error_of_a_product_is_part_of_the_bound():
    spectrum = SPECTRA["outliers"]
    found = eigenpairs(DiagonalOperator(spectrum, noise=1e-2), top=3, confidence=None)
    assert found.product_error > 1e-3
    assert not found.converged  # 1e-3 cannot be certified with products that are wrong by more
    assert_trustworthy_inclusion(found, spectrum)


def test_a_nearby_operator_costs_few_products():
    spectrum = network_like(torch.linspace(1.0, 0.85, 9))
    matrix = random_symmetric(spectrum, seed=1)
    change = random_symmetric(torch.randn(len(spectrum), generator=generator(9)), seed=2)
    cold = eigenpairs(MatrixOperator(matrix), top=3, bottom=1, confidence=None)
    near = MatrixOperator(matrix + 1e-3 * change)
    warm = eigenpairs(near, top=3, bottom=1, start=cold.subspace, confidence=None)
    again = eigenpairs(near, top=3, bottom=1, confidence=None)
    assert warm.products <= 8
    assert warm.products <= again.products / 1.5
    expected = sorted_ends(torch.linalg.eigvalsh(near.matrix), 3, 1)
    assert ((warm.top.values - expected[0]).abs() <= warm.top.bounds).all()
    assert ((warm.bottom.values - expected[1]).abs() <= warm.bottom.bounds).all()
    one = eigenpairs(MatrixOperator(matrix), top=1, confidence=None)
    assert eigenpairs(near, top=1, start=one.subspace, confidence=None).products <= 5


def test_an_unrelated_start_costs_one_product():
    first = random_symmetric(network_like([3.0, 2.0, 1.0], bulk=400), seed=1)
    second = MatrixOperator(random_symmetric(network_like([3.0, 2.0, 1.0], bulk=400), seed=5))
    start = eigenpairs(MatrixOperator(first), top=3, confidence=None).subspace
    cold = eigenpairs(second, top=3, confidence=None)
    warm = eigenpairs(second, top=3, start=start, confidence=None)
    assert warm.products <= 1.1 * cold.products + 1
    torch.testing.assert_close(warm.top.values, cold.top.values, rtol=0, atol=1e-3)


def test_an_eigenvalue_that_rises_from_the_bulk_is_noticed():
    """Nothing couples it to the old eigenvectors: only a direction outside of their span can meet it."""
    outliers = [1.0, 0.8, 0.7, 0.5]
    missed, start = 0, None
    for step in range(60):
        spectrum = network_like(outliers)
        spectrum[-1] = 0.3 + 0.02 * step
        found = eigenpairs(DiagonalOperator(spectrum), top=3, start=start, confidence=None, generator=generator(step))
        start = found.subspace
        true, _ = sorted_ends(spectrum, 3, 0)
        missed += bool(((found.top.values - true).abs() > 2e-3).any())
    assert missed <= 8


def test_runs_repeat_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    operator = DiagonalOperator(SPECTRA["clusters"])
    first, second = (eigenpairs(operator, top=3, generator=generator(4)) for _ in range(2))
    assert torch.equal(first.top.values, second.top.values)
    assert torch.equal(first.top.vectors, second.top.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": 0}, "together between 1 and the operator's size"),
        ({"top": 4}, r"\(3\); got top=4, bottom=0"),
        ({"top": -1, "bottom": 2}, "must not be negative"),
        ({"tolerance": 0.0}, "`tolerance` must lie between 0 and 1, got 0.0"),
        ({"bottom_tolerance": 2.0}, "`bottom_tolerance` must lie"),
        ({"confidence": 1.0}, "`confidence` must lie between 0 and 1"),
        ({"start": torch.ones(1, 4)}, r"`start` must have shape \(r, 3\), got \(1, 4\)"),
    ],
)
def test_bad_input_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        eigenpairs(DiagonalOperator([1.0, 2.0, 3.0]), **arguments)


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError):
        eigenpairs(DiagonalOperator([1.0, float("nan"), 3.0]), top=1)
