import pytest
import torch
from helpers.operators import generator, random_symmetric

from lightning_dynamics.linalg import (
    BlockOperator,
    CongruentOperator,
    MatrixOperator,
    SymmetricOperator,
    diagonal_entries,
    eigenpairs,
)


def test_a_matrix_is_an_operator():
    matrix = random_symmetric([3.0, 1.0, -2.0])
    operator = MatrixOperator(matrix)
    assert isinstance(operator, SymmetricOperator)
    assert operator.size == 3
    vector = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(operator(vector), matrix @ vector)


@pytest.mark.parametrize("matrix", [torch.ones(2, 3), torch.tensor([[1.0, 2.0], [2.1, 1.0]])])
def test_a_matrix_that_is_no_symmetric_one_is_refused(matrix):
    with pytest.raises(ValueError, match=r"`matrix` must be (square|symmetric)"):
        MatrixOperator(matrix)


def test_congruence_has_the_eigenvalues_of_the_preconditioned_matrix():
    matrix = random_symmetric([4.0, 2.5, 1.0, -0.5, -3.0])
    scale = torch.tensor([0.3, 1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
    shift = torch.tensor([0.0, 0.2, 0.1, 5.0, 0.3], dtype=torch.float64)
    operator = CongruentOperator(MatrixOperator(matrix), scale, shift)
    dense = torch.diag(scale) @ (matrix + torch.diag(shift)) @ torch.diag(scale)
    found = eigenpairs(operator, top=3, bottom=2, tolerance=1e-9, bottom_tolerance=1e-9, generator=generator())
    expected = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(found.top.values, expected.flip(0)[:3], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.bottom.values, expected[:2], rtol=0, atol=1e-9)
    nonsymmetric = torch.linalg.eigvals(torch.diag(scale**2) @ (matrix + torch.diag(shift))).real.sort().values
    torch.testing.assert_close(expected, nonsymmetric, rtol=0, atol=1e-9)


def test_a_diagonal_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"`scale` must have the operator's size, \(3,\), got \(2,\)"):
        CongruentOperator(MatrixOperator(torch.eye(3)), torch.ones(2))


def test_a_block_is_the_rows_and_columns_of_a_range():
    matrix = random_symmetric(torch.arange(6.0, dtype=torch.float64))
    block = BlockOperator(MatrixOperator(matrix), 1, 4)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(torch.stack([block(row) for row in eye]), matrix[1:4, 1:4])
    assert block.size == 3


@pytest.mark.parametrize("window", [(-1, 2), (2, 2), (3, 7)])
def test_a_block_must_lie_within(window):
    with pytest.raises(ValueError, match="must lie within"):
        BlockOperator(MatrixOperator(torch.eye(6)), *window)


def test_diagonal_entries_are_exact():
    matrix = random_symmetric(torch.arange(6.0, dtype=torch.float64))
    entries = diagonal_entries(MatrixOperator(matrix), torch.tensor([4, 0, 4]))
    assert torch.equal(entries, matrix.diagonal()[[4, 0, 4]])
