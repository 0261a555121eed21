import pytest
import torch
from helpers.operators import DiagonalOperator, generator, random_symmetric

from lightning_dynamics.linalg import KrylovSpace, MatrixOperator
from lightning_dynamics.linalg.basis import Basis

SPECTRUM = torch.linspace(-1.0, 2.5, 40, dtype=torch.float64) ** 3


def grown(operator, *, random=1, expansions=9, locked=None, seed=0):
    space = KrylovSpace(operator, generator(seed), locked)
    for _ in range(random):
        space.append_random()
    for _ in range(expansions):
        space.expand()
    return space


def residual_rows(matrix, space, pairs):
    """A y - θ y for every Ritz pair, from the vectors themselves."""
    vectors = space.vectors(pairs.coefficients.mT)
    return vectors @ matrix - pairs.values[:, None] * vectors


@pytest.mark.parametrize("random", [1, 2, 3])
def test_coupling_gives_the_true_residuals(random):
    matrix = random_symmetric(SPECTRUM)
    space = grown(MatrixOperator(matrix), random=random)
    pairs = space.ritz()
    assert space.num_pending == random
    rows = residual_rows(matrix, space, pairs)
    torch.testing.assert_close(rows.norm(dim=1), pairs.residuals, rtol=0, atol=1e-11)
    torch.testing.assert_close(rows, pairs.coupling.mT @ space.pending(), rtol=0, atol=1e-11)


def test_one_random_vector_gives_a_tridiagonal_matrix():
    matrix = random_symmetric(SPECTRUM)
    space = grown(MatrixOperator(matrix))
    diagonal, below = space.tridiagonal()
    square = torch.diag(diagonal) + torch.diag(below[:-1], 1) + torch.diag(below[:-1], -1)
    torch.testing.assert_close(torch.linalg.eigvalsh(square).flip(0), space.ritz().values, rtol=0, atol=1e-12)
    assert float(below[-1]) == pytest.approx(float(residual_rows(matrix, space, space.ritz()).norm()), rel=1e-9)


def test_a_locked_space_is_the_compressed_operator():
    matrix = random_symmetric(SPECTRUM)
    _, vectors = torch.linalg.eigh(matrix)
    locked = vectors[:, [0, 5, 39]].mT.contiguous()
    space = grown(MatrixOperator(matrix), expansions=37, locked=locked)
    kept = [value for index, value in enumerate(SPECTRUM) if index not in (0, 5, 39)]
    torch.testing.assert_close(space.ritz().values, torch.stack(kept).flip(0), rtol=0, atol=1e-9)
    assert space.is_exhausted


@pytest.mark.parametrize("random", [1, 2])
def test_thick_restart_loses_nothing_of_what_it_keeps(random):
    matrix = random_symmetric(SPECTRUM)
    space = grown(MatrixOperator(matrix), random=random, expansions=20)
    before = space.ritz()
    keep = torch.tensor([0, 1, 2, 3, 18, 19])
    space.restart(before, keep)
    after = space.ritz()
    torch.testing.assert_close(after.values, before.values[keep], rtol=0, atol=1e-12)
    torch.testing.assert_close(after.residuals, before.residuals[keep], rtol=0, atol=1e-12)
    for _ in range(6):
        space.expand()
    pairs = space.ritz()
    torch.testing.assert_close(residual_rows(matrix, space, pairs).norm(dim=1), pairs.residuals, rtol=0, atol=1e-10)
    assert (pairs.values[:4] >= before.values[:4] - 1e-12).all()


def test_steering_multiplies_the_residual_that_was_asked_for():
    matrix = random_symmetric(SPECTRUM)
    space = grown(MatrixOperator(matrix), random=3, expansions=6)
    pairs = space.ritz()
    residual = residual_rows(matrix, space, pairs)[1]
    space.steer(pairs.coupling[:, 1])
    aligned = space.pending()[0].dot(residual) / residual.norm()
    assert abs(float(aligned)) == pytest.approx(1.0, abs=1e-10)
    torch.testing.assert_close(space.ritz().residuals, pairs.residuals, rtol=0, atol=1e-12)
    space.expand()
    after = space.ritz()
    torch.testing.assert_close(residual_rows(matrix, space, after).norm(dim=1), after.residuals, rtol=0, atol=1e-10)


def test_product_error_is_seen_from_the_projected_matrix():
    spectrum = SPECTRUM / SPECTRUM.max()
    exact = grown(DiagonalOperator(spectrum), expansions=12)
    noisy = grown(DiagonalOperator(spectrum, noise=1e-3), expansions=12)
    assert exact.product_error < 1e-13
    # the noise is spread over all 40 directions, twelve of which are seen
    assert 1e-4 < noisy.product_error < 3e-3


def test_dependent_and_null_directions_are_refused():
    space = grown(MatrixOperator(random_symmetric(SPECTRUM)), expansions=3)
    inside = space.vectors(torch.tensor([[1.0, -2.0, 0.5]]))[0]
    assert not space.append(inside)
    assert not space.append(torch.zeros(40, dtype=torch.float64))
    assert not space.append(torch.full((40,), float("nan"), dtype=torch.float64))


def test_an_infinite_product_is_an_error():
    space = KrylovSpace(DiagonalOperator([1.0, float("inf")]), generator())
    space.append_random()
    with pytest.raises(FloatingPointError, match="not finite"):
        space.expand()


def test_basis_operations_cross_block_borders():
    rows, size = 37, 60
    basis = Basis(size, torch.float64, torch.device("cpu"))
    reference, _ = torch.linalg.qr(torch.randn(size, rows, generator=generator(3), dtype=torch.float64))
    for row in reference.mT:
        basis.append(row)
    vector = torch.randn(size, generator=generator(4), dtype=torch.float64)
    torch.testing.assert_close(basis.dots(vector), reference.mT @ vector)
    work = vector.clone()
    coefficients, remainder = basis.orthogonalize(work)
    torch.testing.assert_close(work, vector - reference @ (reference.mT @ vector))
    torch.testing.assert_close(coefficients, reference.mT @ vector)
    assert remainder == pytest.approx(float(work.norm()))
    turn, _ = torch.linalg.qr(torch.randn(rows, 20, generator=generator(5), dtype=torch.float64))
    torch.testing.assert_close(basis.combine(turn.mT), turn.mT @ reference.mT)
    basis.replace(turn.mT)
    assert len(basis) == 20
    torch.testing.assert_close(basis.combine(torch.eye(20, dtype=torch.float64)), turn.mT @ reference.mT)
    with pytest.raises(IndexError):
        basis[20]


def test_replace_works_in_slices_of_the_vectors(monkeypatch):
    monkeypatch.setattr("lightning_dynamics.linalg.basis._SLICE", 64)
    basis = Basis(50, torch.float32, torch.device("cpu"))
    rows = torch.linalg.qr(torch.randn(50, 18, generator=generator(6)))[0].mT
    for row in rows:
        basis.append(row)
    turn = torch.linalg.qr(torch.randn(18, 17, generator=generator(7)))[0].mT
    basis.replace(turn.double())
    torch.testing.assert_close(basis.combine(torch.eye(17, dtype=torch.float64)), turn @ rows)
