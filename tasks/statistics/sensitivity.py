"""Sensitivity: how much a layer matters to the loss, Σ |p · ∂L/∂p| over its parameters p (arXiv 2502.12420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic

if TYPE_CHECKING:
    from torch import Tensor

CPU_CHUNK = 2**15
"""Elements whose products exist at a time on the CPU: they stay in its cache, and are too few for torch to wake threads
for, which takes longer than the work where they are not idle."""
GPU_CHUNK = 2**26


@STATISTICS.register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Statistic):
    """Σ |p · ∂L/∂p| by layer."""

    hook = "gradients"
    by = "layer"
    takes_sparse = True

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return sum_of_products(parameter, seen)


def sum_of_products(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ |parameter · gradient|, a float64 scalar on their device.

    The products are float32, as one of two float16 numbers underflows; so is the (pairwise) sum of a chunk.

    Args:
        parameter: any shape and float dtype.
        gradient: of the parameter's shape and dtype; may be sparse in its rows.
    """
    import torch

    if gradient.is_sparse:
        gradient = gradient.coalesce()
        parameter, gradient = parameter[gradient.indices()[0]], gradient.values()
    chunk = CPU_CHUNK if parameter.device.type == "cpu" else GPU_CHUNK
    pairs = zip(torch.split(parameter.reshape(-1), chunk), torch.split(gradient.reshape(-1), chunk), strict=True)
    products = torch.empty(min(chunk, parameter.numel()), dtype=torch.float32, device=parameter.device)
    parts = [products[: len(p)].copy_(p).mul_(g).abs_().sum() for p, g in pairs]
    return torch.stack(parts).sum(dtype=torch.float64)
