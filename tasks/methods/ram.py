"""Reinforced Agent Merging (arXiv 2601.13572), with the semantics, defaults and corner cases of mergekit 0.1.5."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.methods.contract import METHODS, ElementsMethod, TaskVector

if TYPE_CHECKING:
    from torch import Tensor


@METHODS.register("ram")
class Ram(ElementsMethod):
    """Adds to each element the mean of the task vectors that change it (arXiv 2601.13572)."""

    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "all experts that change an element count equally there"
    no_se: ClassVar[str] = "what one expert alone adds is in the merge whole, and would count K-fold for its samples"

    epsilon: float = Field(1e-5, ge=0, description="task vectors' elements that are no larger count as unchanged")

    def merge_elements(self, base: "Tensor", parts: "Tensor", weights: Sequence[float]) -> "Tensor":
        """See `ElementsMethod`."""
        return self._added(base, parts, [1.0] * len(parts))

    def _added(self, base: "Tensor", parts: "Tensor", factors: Sequence[float]) -> "Tensor":
        """Return some elements merged; what one expert alone changes has its factor. `parts` may be changed."""
        from sensmerge.tasks.methods.kernels.delta import weighted_sum
        from sensmerge.tasks.methods.kernels.stored import add

        changed = self._changed(parts)
        count = changed.sum(0)
        kept = parts.masked_fill_(~changed, 0)
        alone, mean = weighted_sum(kept, factors), weighted_sum(kept, [1.0] * len(kept)).div_(count.clamp(min=1))
        return add(alone.where(count == 1, mean), base)

    def _changed(self, parts: "Tensor") -> "Tensor":
        """Return where task vectors change an element; NaN does."""
        return ~(parts.abs() <= self.epsilon)


@METHODS.register("ramplus_tl")
class RamPlus(Ram):
    """Does as ram, and scales up what one expert alone changes, the more it shares (tensor-local, arXiv 2601.13572)."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "tensor"

    r: float = Field(0.1, ge=0, description="how much is added to the factor for each part that is shared")
    alpha: float = Field(
        0.2, ge=0, description="bound of the ratio of elements that an expert shares to those that it alone changes"
    )

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`. The factor of expert k is 1 + r · min(shared elements / its own, alpha), in each tensor."""
        import torch

        flat = base.reshape(-1)
        shared, own = torch.zeros(len(vectors), dtype=torch.int64), torch.zeros(len(vectors), dtype=torch.int64)
        for _, parts in self.parts(flat, vectors):
            changed = self._changed(parts)
            alone = changed & (changed.sum(0) == 1)
            own += alone.sum(1)
            shared += changed.sum(1) - alone.sum(1)
        ratio = shared.double() / own.double().clamp(min=self.epsilon or 1e-12)
        factors = (1 + self.r * ratio.nan_to_num(0).clamp(max=self.alpha)).tolist()
        for where, parts in self.parts(flat, vectors):
            yield where, self._added(flat[where], parts, factors)
