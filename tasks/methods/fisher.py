"""Fisher merging: the mean of the experts, weighted element by element by how much each expert's loss depends on it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector

if TYPE_CHECKING:
    from torch import Tensor


@METHODS.register("fisher")
class FisherMean(Method):
    """Mean of task vectors, weighted element by element by each expert's Fisher information (arXiv 2111.09832)."""

    needs: ClassVar[Literal["elements", "matrix"]] = "elements"
    statistics: ClassVar[tuple[str, ...]] = ("fisher",)
    weights: ClassVar[tuple[float, ...]] = (0.6, 0.8, 1.0, 1.2, 1.5)

    floor: float = Field(
        1e-3,
        gt=0,
        description="added to each expert's Fisher information, as a share of its mean in the tensor; large values "
        "give the plain mean",
    )

    def scales_with_weight(self) -> bool:
        """See `Method`."""
        return True

    def check_weights(self, weights: Sequence[float]) -> None:
        """See `Method`."""
        if min(weights) < 0:
            raise ValueError(
                f"found the weight {min(weights):g}; {self.name} takes means, so expected weights of 0 or more"
            )

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`: base + λ · Σ wₖFₖδₖ / Σ wₖFₖ, λ the mean of the weights wₖ, Fₖ the mean over samples.

        An expert whose samples have no gradient there has Fₖ = 0. Memory: every expert's F, and some pieces of `CHUNK`
        elements.
        """
        import torch

        from sensmerge.tasks.methods.kernels.delta import parts
        from sensmerge.tasks.methods.kernels.stored import add

        flat = base.reshape(-1)
        totals = [vector.statistic("fisher") for vector in vectors]
        found = [
            torch.zeros(1).expand(len(flat)) if total is None else total.reshape(-1).div_(vector.samples("fisher"))
            for vector, total in zip(vectors, totals, strict=True)
        ]
        least = torch.finfo(torch.float32).tiny
        mean = sum(float(one.mean(dtype=torch.float64)) for one in found) / len(found) if len(flat) else 0.0
        unit = mean if mean > least else 1.0  # squares may have underflowed
        weights = torch.tensor([vector.weight for vector in vectors])[:, None]
        for where, deltas in parts(flat, [vector.delta for vector in vectors]):
            shares = torch.stack([one[where] for one in found]).div_(unit).add_(self.floor).mul_(weights)
            total = shares.sum(0).clamp_min(least)  # where no weight is above 0
            yield where, add(deltas.mul_(shares).sum(0).div_(total).mul_(weights.mean()), flat[where])
