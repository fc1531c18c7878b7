"""Singular vectors of task vectors, in float64, by way of the smaller of their Gram matrices.

That costs little where one side is much longer than the other, as of embeddings. In float64 the squares of all singular
values that mean anything in a float32 matrix are far above rounding.
"""

from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits
from torch import Tensor

from sensmerge.tasks.methods.kernels.matrices import Factored, Matrix

EPS = torch.finfo(torch.float32).eps
FEW = 4
"""Of a matrix with this many times as many columns as singular vectors are wanted, the others need not be found."""


@dataclass(frozen=True)
class Singular:
    """Singular vectors and values, largest first."""

    left: Tensor
    """float64 (rows, count)"""
    values: Tensor
    """float64 (count,), above 0"""
    right: Tensor
    """float64 (columns, count)"""


def singular(matrix: Matrix, count: int | None = None, scale: float = 0.0) -> Singular:
    """Return the largest singular vectors and values, without those that are 0 but for float32's rounding.

    Args:
        matrix: of rank r up to rounding.
        count: how many at most; None for all r.
        scale: the largest singular value of what the matrix was subtracted from, if it was: rounding is relative to it.
    """
    if isinstance(matrix, Factored):
        left, inner = torch.linalg.qr(matrix.left)
        right, outer = torch.linalg.qr(matrix.right.T)
        core = singular(inner @ outer.T, count, scale)
        return Singular(left @ core.left, core.values, right @ core.right)
    if matrix.shape[0] < matrix.shape[1]:
        found = _by_gram(matrix.T, count, scale)
        return Singular(found.right, found.values, found.left)
    return _by_gram(matrix, count, scale)


def few_singular(matrix: Matrix, count: int) -> Singular:
    """Return what `singular` does, up to rounding; several times as fast where few of many are wanted."""
    if isinstance(matrix, Factored) or FEW * count >= min(matrix.shape):
        return singular(matrix, count)
    if matrix.shape[0] < matrix.shape[1]:
        found = few_singular(matrix.T, count)
        return Singular(found.right, found.values, found.left)
    threadpool_limits(1)  # as `torch.set_num_threads(1)`, which scipy does not know of: sums are the same ones
    size = matrix.shape[1]
    squares, right = eigh((matrix.T @ matrix).numpy(), subset_by_index=[size - count, size - 1], overwrite_a=True)
    return _singular(matrix, torch.from_numpy(squares), torch.from_numpy(right), count, 0.0)


def _by_gram(matrix: Tensor, count: int | None, scale: float) -> Singular:
    """Return singular vectors and values of a matrix with no more columns than rows."""
    squares, right = torch.linalg.eigh(matrix.T @ matrix)
    return _singular(matrix, squares, right, count, scale)


def _singular(matrix: Tensor, squares: Tensor, right: Tensor, count: int | None, scale: float) -> Singular:
    """Return singular vectors and values by the largest eigenvalues of the Gram matrix, which ascend, and vectors."""
    values = squares.clamp_min(0).sqrt().flip(0)
    rank = int((values > values[:1].clamp_min(scale) * matrix.shape[1] * EPS).sum())
    kept = rank if count is None else min(rank, count)
    right = right.flip(1)[:, :kept]
    return Singular(matrix @ right / values[:kept], values[:kept], right)


def isometry(vectors: Tensor) -> Tensor:
    """Return the orthonormal vectors nearest to others, V (VᵀV)⁻¹ᐟ² (orthogonal Procrustes, Schönemann 1966).

    Directions that several vectors share are shared out: where V has not full rank, the result is the partial isometry
    of V's own range, and nothing arbitrary fills it up.

    Args:
        vectors: float64 (n, count), in columns, about of length 1.
    """
    squares, directions = torch.linalg.eigh(vectors.T @ vectors)
    kept = squares > EPS
    directions = directions[:, kept]
    whitening: Tensor = (directions / squares[kept].sqrt()) @ directions.T
    return vectors @ whitening
