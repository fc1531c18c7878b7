"""Matrices of low rank, as adapters hold them: the nearest one to a task vector, or several laid side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels.matrices import Factored, Matrix
from sensmerge.tasks.methods.kernels.singular import few_singular, singular


@dataclass(frozen=True)
class LowRankMatrix:
    """The matrix second · first."""

    first: Tensor
    """(rank, columns), float32 unless it was rounded"""
    second: Tensor
    """(rows, rank), of the same dtype"""

    @property
    def rank(self) -> int:
        """How many rows `first` has; the matrix may have a lower rank."""
        return len(self.first)

    def transposed(self) -> "LowRankMatrix":
        """Return the transpose, first.T · second.T."""
        return LowRankMatrix(self.second.T, self.first.T)

    def filled(self, rank: int) -> "LowRankMatrix":
        """Return the same matrix with zeros in its factors, up to a rank."""
        missing = rank - self.rank
        pad = torch.nn.functional.pad
        return LowRankMatrix(pad(self.first, (0, 0, 0, missing)), pad(self.second, (0, missing)))


def nearest(matrix: Matrix, rank: float) -> LowRankMatrix:
    """Return the matrix of low rank with the least squared difference (Eckart and Young 1936), by singular vectors.

    Both factors have the roots of the singular values, so neither is larger than the other.

    Args:
        matrix: float64 (rows, columns).
        rank: at most this one, a whole number; or, a number below 1, the least by which that share of the squared norm
            is kept.
    """
    found = few_singular(matrix, int(rank)) if rank >= 1 else singular(matrix)
    kept = len(found.values) if rank >= 1 else rank_of_share(found.values, rank)
    roots = found.values[:kept].sqrt()
    return LowRankMatrix((found.right[:, :kept] * roots).T.float().contiguous(), (found.left[:, :kept] * roots).float())


def rank_of_share(values: Tensor, share: float) -> int:
    """Return how many of the singular values, largest first, have at least a share of the sum of their squares."""
    sums = values.square().cumsum(0)
    return int((sums < share * sums[-1:]).sum()) + bool(len(values))


def side_by_side(factors: Sequence[tuple[Tensor, Tensor, float]]) -> LowRankMatrix:
    """Return the sum of matrices in factors, factor · second · first each, whose rank is the sum of theirs.

    Args:
        factors: of each: first (r, columns), second (rows, r), any float dtype, and its factor.
    """
    first = torch.cat([one.float() for one, _, _ in factors])
    return LowRankMatrix(first, torch.cat([(one.double() * factor).float() for _, one, factor in factors], 1))


def norm(matrix: Matrix) -> float:
    """Return the Frobenius norm of a matrix, float64."""
    if isinstance(matrix, Tensor):
        return float(torch.linalg.matrix_norm(matrix))
    inner, outer = torch.linalg.qr(matrix.left, "r").R, torch.linalg.qr(matrix.right.T, "r").R
    return float(torch.linalg.matrix_norm(inner @ outer.T))


def distance(matrix: Matrix, other: LowRankMatrix) -> float:
    """Return the Frobenius norm of what a matrix, float64, differs in from one of low rank as it is stored."""
    first, second = other.first.double(), other.second.double()
    if isinstance(matrix, Tensor):
        return norm(torch.addmm(matrix, second, first, alpha=-1))
    return norm(Factored(torch.cat([matrix.left, -second], 1), torch.cat([matrix.right, first])))
