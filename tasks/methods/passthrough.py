"""Passthrough: one expert as it is, with the semantics of mergekit 0.1.5."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector

if TYPE_CHECKING:
    from torch import Tensor


@METHODS.register("passthrough")
class Passthrough(Method):
    """Takes its one expert as it is: an adapter becomes a checkpoint, and weights may be scaled, as mergekit does."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "elements"
    least_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = 1
    changes_untouched: ClassVar[bool] = True
    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "it has one expert, whose factor is scale"

    scale: float | None = Field(None, description="factor of all weights; left out: they stay as they are")

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`. What the expert stores whole is taken from there, so no bit of it changes."""
        from sensmerge.tasks.methods.kernels.delta import chunks, expert_values

        (vector,), flat = vectors, base.reshape(-1)
        for where in chunks(len(flat)):
            values = expert_values(vector.delta, where, flat[where])
            yield where, values if self.scale is None else values.mul_(self.scale)
