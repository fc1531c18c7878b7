"""NearSwap: elements of the expert where it is near the base, with the semantics of mergekit 0.1.5."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sensmerge.tasks.methods.contract import METHODS, ElementsMethod

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-6
"""Differences that are smaller count as this one (mergekit's rule)."""


@METHODS.register("nearswap")
class NearSwap(ElementsMethod):
    """Takes the one expert's elements that are near the base's, and goes some way to the others, as mergekit does."""

    least_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = 1
    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "t says how far its one expert is followed"

    t: float = Field(ge=0, description="how far an element moves from the base's at most")

    def merge_elements(self, base: "Tensor", parts: "Tensor", weights: Sequence[float]) -> "Tensor":
        """See `ElementsMethod`: base + δ · min(1, t / |δ|)."""
        from sensmerge.tasks.methods.kernels.stored import add

        (part,) = parts
        share = part.abs().clamp_(min=_LEAST).reciprocal_().mul_(self.t).clamp_(max=1)
        return add(part.mul_(share), base)
