"""Weighted least squares on Gram matrices: the algebra of RegMean, in float64."""

import torch
from torch import Tensor

SINGULAR = torch.finfo(torch.float32).eps
"""Reciprocal condition of a matrix that float32, in which Gram matrices are kept, cannot tell from a singular one."""
NEARLY_ONE = 0.99
"""Off-diagonal factor in place of a larger one where a matrix is singular: it leaves eigenvalues far above rounding."""


def reduced(gram: Tensor, factor: float) -> Tensor:
    """Return a Gram matrix with its off-diagonal multiplied by a factor, float64; it is the caller's own."""
    wide = gram.to(torch.float64, copy=True)
    diagonal = wide.diagonal().clone()
    wide.mul_(factor).diagonal().copy_(diagonal)
    return wide


class Normal:
    """The normal equations A X = B of a least-squares problem, A symmetric and positive semi-definite.

    They are scaled to a unit diagonal, D⁻¹ᐟ² A D⁻¹ᐟ², which is nearly the best diagonal scaling there is (van der Sluis
    1969). An off-diagonal that was reduced by a factor c < 1 leaves its least eigenvalue at 1 − c or more, so that it
    can be solved whatever the data. Rows of A that are zero have no solution but 0.
    """

    def __init__(self, matrix: Tensor) -> None:
        """Factorise a matrix, float64 (n, n), which is used up."""
        diagonal = matrix.diagonal()
        self.empty = diagonal <= 0
        """which rows of A are zero"""
        self._scale = torch.where(self.empty, 0.0, diagonal.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
        scaled = matrix.mul_(self._scale[:, None]).mul_(self._scale)
        scaled.diagonal().fill_(1.0)
        self._norm = float(torch.linalg.matrix_norm(scaled, 1))
        self._factor, failed = torch.linalg.cholesky_ex(scaled)
        self.is_definite = not bool(failed)
        """whether there is a solution"""

    @property
    def is_singular(self) -> bool:
        """Whether the scaled matrix is, or is so close to singular that its solutions mean nothing."""
        return not self.is_definite or 1 / (self._norm * self._inverse_norm()) < SINGULAR

    def solve(self, right: Tensor) -> Tensor:
        """Return X, float64 (n, columns); `right` is B, float64, which is used up."""
        right.mul_(self._scale[:, None])
        return torch.cholesky_solve(right, self._factor).mul_(self._scale[:, None])

    def _inverse_norm(self) -> float:
        """Return an estimate of the 1-norm of the scaled matrix's inverse (Hager 1984), rarely off by more than 3."""
        size = len(self._scale)
        probe, estimate = torch.full((size, 1), 1 / size, dtype=torch.float64), 0.0
        for _ in range(5):
            solved = torch.cholesky_solve(probe, self._factor)
            estimate = max(estimate, float(solved.abs().sum()))
            gradient = torch.cholesky_solve(torch.where(solved >= 0, 1.0, -1.0).to(torch.float64), self._factor)
            steepest = int(gradient.abs().argmax())
            if float(gradient[steepest].abs()) <= float((gradient * probe).sum()):
                break
            probe = torch.zeros_like(probe)
            probe[steepest] = 1.0
        return estimate
