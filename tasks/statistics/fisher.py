"""Fisher: the diagonal of the empirical Fisher information, Σ (∂L/∂p)² over samples (arXiv 2111.09832)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic

if TYPE_CHECKING:
    from torch import Tensor


@STATISTICS.register("fisher")
@dataclass(frozen=True)
class Fisher(Statistic):
    """Σ (∂L/∂p)² over samples for every element p of every tensor, float32; divide by the samples for the mean."""

    hook = "gradients"
    by = "tensor"
    takes_sparse = True

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`; in float32, for squares underflow in the dtypes of networks."""
        import torch

        if not seen.is_sparse:
            return seen.float().square()
        seen = seen.coalesce()  # a row that came several times is squared as the sum
        return torch.sparse_coo_tensor(
            seen.indices(), seen.values().float().square(), seen.shape, is_coalesced=True, check_invariants=False
        )
