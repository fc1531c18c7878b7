"""Task vectors as matrices, in float64: what comes from an adapter stays in its factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensmerge.tasks.methods.contract import TaskVector
from sensmerge.tasks.methods.kernels.delta import Unchanged


@dataclass(frozen=True)
class Factored:
    """A matrix in factors."""

    left: Tensor
    """float64 (rows, r)"""
    right: Tensor
    """float64 (r, columns)"""


Matrix = Tensor | Factored


def matrix_of(vector: TaskVector, base: Tensor, transposed: bool = False) -> Matrix:
    """Return the task vector of a tensor of two dimensions, float64; of one that is zero, factors of rank 0.

    Args:
        vector: the task vector.
        base: the base's tensor, in any float dtype.
        transposed: whether the transpose is wanted.
    """
    factors = vector.factors()
    if factors is None and not isinstance(vector.delta, Unchanged):
        whole = vector.whole(base)
        if bool(whole.any()):
            return (whole.T if transposed else whole).double()
    rows, columns = base.shape
    first, second, scaling = factors or (torch.empty(0, columns), torch.empty(rows, 0), 1.0)
    left, right = second.double() * scaling, first.double()
    return Factored(right.T, left.T) if transposed else Factored(left, right)


def product(left: Tensor, matrix: Matrix) -> Tensor:
    """Return left · matrix."""
    return left @ matrix if isinstance(matrix, Tensor) else (left @ matrix.left) @ matrix.right


def weighted_sum(vectors: Sequence[TaskVector], base: Tensor) -> Matrix:
    """Return the sum of task vectors times their weights, in factors if all are; one after the other is in memory."""
    dense: Tensor | None = None
    factored = list[Factored]()
    for vector in vectors:
        matrix = matrix_of(vector, base)
        if isinstance(matrix, Factored):
            factored.append(Factored(matrix.left * vector.weight, matrix.right))
        else:
            matrix.mul_(vector.weight)
            dense = matrix if dense is None else dense.add_(matrix)
    if dense is None:
        return Factored(torch.cat([one.left for one in factored], 1), torch.cat([one.right for one in factored]))
    for one in factored:
        dense.addmm_(one.left, one.right)
    return dense


def without(matrix: Matrix, directions: Tensor) -> Matrix:
    """Return a matrix whose columns have lost what lies along orthonormal directions, float64 (rows, count)."""
    if isinstance(matrix, Factored):
        return Factored(matrix.left - directions @ (directions.T @ matrix.left), matrix.right)
    return matrix - directions @ (directions.T @ matrix)


def rows_of(matrix: Matrix, which: Tensor) -> Tensor:
    """Return the rows where a boolean tensor is true."""
    return matrix[which] if isinstance(matrix, Tensor) else matrix.left[which] @ matrix.right
