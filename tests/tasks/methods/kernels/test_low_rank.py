"""Matrices of low rank against numpy's singular values, and against products in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sensmerge.tasks.methods.kernels.low_rank import distance, nearest, norm, rank_of_share, side_by_side
from sensmerge.tasks.methods.kernels.matrices import Factored, Matrix
from sensmerge.tasks.methods.kernels.singular import few_singular, singular


def matrix_of(seed: int, rows: int, columns: int) -> Tensor:
    """A matrix of full rank whose singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.7 ** torch.arange(columns, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale


def factored(seed: int, rows: int, columns: int, rank: int) -> Factored:
    return Factored(matrix_of(seed, rows, rank), matrix_of(seed + 1, rank, columns))


def whole(matrix: Matrix) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.left @ matrix.right


@given(st.integers(0, 99), st.sampled_from([(7, 12), (12, 7), (9, 9)]), st.integers(1, 12), st.booleans())
def test_no_other_matrix_of_the_rank_is_nearer(seed: int, shape: tuple[int, int], rank: int, in_factors: bool) -> None:
    matrix = factored(seed, *shape, 5) if in_factors else matrix_of(seed, *shape)
    values = np.linalg.svd(whole(matrix).numpy(), compute_uv=False)
    expected = math.sqrt(sum(values[rank:] ** 2))
    found = nearest(matrix, rank)
    assert found.rank <= rank
    scale = float(values[0])
    assert float(torch.linalg.matrix_norm(whole(matrix) - found.second.double() @ found.first.double())) == (
        pytest.approx(expected, abs=1e-6 * scale)
    )
    assert distance(matrix, found) == pytest.approx(expected, abs=1e-6 * scale)


@pytest.mark.parametrize("in_factors", [False, True])
def test_the_distance_is_that_of_the_stored_factors(in_factors: bool) -> None:
    matrix = factored(3, 8, 11, 4) if in_factors else matrix_of(3, 8, 11)
    found = nearest(matrix, 4 if in_factors else 8)  # nothing but rounding is left
    difference = whole(matrix) - found.second.double() @ found.first.double()
    assert 0 < distance(matrix, found) == pytest.approx(float(torch.linalg.matrix_norm(difference)), rel=1e-5)


def test_a_share_is_kept_by_the_least_rank() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # squares: 9, 4, 1, 1 of 15
    assert [rank_of_share(values, share) for share in (0.3, 0.6, 0.61, 13 / 15, 0.9, 0.99)] == [1, 1, 2, 2, 3, 4]
    matrix = matrix_of(1, 9, 6)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    found = nearest(matrix, 0.8)
    assert sum(squares[: found.rank]) >= 0.8 * sum(squares) > sum(squares[: found.rank - 1])


def test_nothing_is_of_rank_0() -> None:
    for zero in (
        torch.zeros(4, 5, dtype=torch.float64),
        Factored(torch.zeros(4, 0).double(), torch.zeros(0, 5).double()),
    ):
        for rank in (3, 0.5):
            found = nearest(zero, rank)
            assert (found.first.shape, found.second.shape) == ((0, 5), (4, 0))
            assert distance(zero, found) == norm(zero) == 0


def test_matrices_side_by_side_are_their_sum() -> None:
    parts = [
        (matrix_of(n, rank, 9).float(), matrix_of(n + 5, 7, rank).float(), 0.3 * n) for n, rank in ((1, 2), (2, 4))
    ]
    found = side_by_side(parts)
    expected = sum(factor * second.double() @ first.double() for first, second, factor in parts)
    assert found.rank == 6
    torch.testing.assert_close(found.second.double() @ found.first.double(), expected, rtol=1e-6, atol=1e-7)


def test_filled_factors_are_of_the_same_matrix() -> None:
    found = nearest(matrix_of(2, 6, 8), 3)
    filled = found.filled(5)
    assert (filled.first.shape, filled.second.shape) == ((5, 8), (6, 5))
    torch.testing.assert_close(filled.second @ filled.first, found.second @ found.first)


@given(st.integers(0, 99), st.sampled_from([(30, 17), (17, 30), (40, 40)]), st.integers(1, 4))
def test_a_few_singular_vectors_are_the_largest_of_all(seed: int, shape: tuple[int, int], count: int) -> None:
    matrix = matrix_of(seed, *shape)
    few, every = few_singular(matrix, count), singular(matrix, count)
    torch.testing.assert_close(few.values, every.values, rtol=1e-9, atol=0)
    found, expected = (one.left @ torch.diag(one.values) @ one.right.T for one in (few, every))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(every.values[0]))


def test_a_few_singular_vectors_of_less_rank() -> None:
    matrix = whole(factored(1, 40, 30, 2))
    found = few_singular(matrix, 5)
    assert len(found.values) == 2
    torch.testing.assert_close(found.left @ torch.diag(found.values) @ found.right.T, matrix, rtol=0, atol=1e-7)
