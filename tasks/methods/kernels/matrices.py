"""Task vectors as matrices, in float64: what comes from an adapter stays in its factors."""

from dataclasses import dataclass

from torch import Tensor

from sensmerge.tasks.methods.contract import TaskVector


@dataclass(frozen=True)
class Factored:
    """A matrix in factors."""

    left: Tensor
    """float64 (rows, r)"""
    right: Tensor
    """float64 (r, columns)"""


Matrix = Tensor | Factored


def matrix_of(vector: TaskVector, base: Tensor, transposed: bool = False) -> Matrix:
    """Return the task vector of a tensor of two dimensions, float64; `base` is in any float dtype."""
    factors = vector.factors()
    if factors is None:
        whole = vector.whole(base)
        return (whole.T if transposed else whole).double()
    first, second, scaling = factors
    left, right = second.double() * scaling, first.double()
    return Factored(right.T, left.T) if transposed else Factored(left, right)


def product(left: Tensor, matrix: Matrix) -> Tensor:
    """Return left · matrix."""
    return left @ matrix if isinstance(matrix, Tensor) else (left @ matrix.left) @ matrix.right


def rows_of(matrix: Matrix, which: Tensor) -> Tensor:
    """Return the rows where a boolean tensor is true."""
    return matrix[which] if isinstance(matrix, Tensor) else matrix.left[which] @ matrix.right
