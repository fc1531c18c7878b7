"""SCE: select, calculate, erase (arXiv 2408.07990), with the semantics, defaults and corner cases of mergekit 0.1.5."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector

if TYPE_CHECKING:
    from torch import Tensor

    from sensmerge.tasks.methods.kernels.delta import Delta
    from sensmerge.tasks.methods.kernels.sparsify import Sparsifier

_LEAST = 1e-6
"""Mean squares whose sum is smaller are no measure of shares, and shares are not divided by less (mergekit's rules)."""


@METHODS.register("sce")
class Sce(Method):
    """Keeps the elements that vary most, and sums those that agree by the experts' mean squares (arXiv 2408.07990)."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "tensor"
    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "the mean squares of the task vectors are the experts' weights"
    no_se: ClassVar[str] = "what one expert alone adds is in the merge whole, and would count K-fold for its samples"

    select_topk: float = Field(
        1.0,
        ge=0,
        le=1,
        description="of the elements that differ between the experts, the share to keep: those of largest variance",
    )

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`. Memory: some pieces of `CHUNK` elements, and what `Trim.of` says."""
        import torch

        from sensmerge.tasks.methods.kernels.consensus import agreeing
        from sensmerge.tasks.methods.kernels.delta import weighted_sum
        from sensmerge.tasks.methods.kernels.stored import add

        flat, deltas = base.reshape(-1), [vector.delta for vector in vectors]
        select = self._selection(flat, deltas)
        shares = _shares(_selected(flat, deltas, select), len(deltas), len(flat))
        for where, found in _selected(flat, deltas, select):
            sign, magnitudes = agreeing(found, [1.0] * len(deltas))
            agreed = torch.stack(magnitudes)
            mixed = weighted_sum(agreed, shares).mul_(sign)
            total = weighted_sum(agreed.sign(), shares).clamp_(min=_LEAST)
            yield where, add(mixed.div_(total), flat[where])

    def _selection(self, base: "Tensor", deltas: "Sequence[Delta]") -> "Sparsifier | None":
        """Return what sets to zero the variance of elements that are not kept; None if all are."""
        from sensmerge.tasks.methods.kernels.sparsify import Trim, drop_all, ranking

        if self.select_topk >= 1:
            return None
        variance = _Variance(deltas)
        histogram, differing = ranking(variance, base)
        keep = int(differing * self.select_topk)
        return Trim.of(variance, base, keep, histogram) if keep else drop_all


@dataclass(frozen=True)
class _Variance:
    """The variance of task vectors over experts, element by element; a `Delta` to those who look for its largest."""

    deltas: "Sequence[Delta]"

    def __len__(self) -> int:
        """See `Delta`."""
        return len(self.deltas[0])

    def fill(self, piece: "Tensor", where: slice, base: "Tensor") -> None:
        """See `Delta`."""
        from sensmerge.tasks.methods.kernels import loops

        found = piece.new_empty(len(self.deltas), len(piece))
        for part, delta in zip(found, self.deltas, strict=True):
            delta.fill(part, where, base)
        loops.variance(found.numpy(), piece.numpy())

    def moved(self, move: "Callable[[Tensor], Tensor]") -> "_Variance":
        """See `Delta`."""
        return _Variance([delta.moved(move) for delta in self.deltas])


def _selected(
    base: "Tensor", deltas: "Sequence[Delta]", select: "Sparsifier | None"
) -> "Iterator[tuple[slice, Tensor]]":
    """Yield which elements, and every task vector's that are kept and else 0, float32 (experts × elements)."""
    import torch

    from sensmerge.tasks.methods.kernels import loops
    from sensmerge.tasks.methods.kernels.delta import parts

    for where, found in parts(base, deltas):
        if select is not None:
            variance = torch.empty(found.shape[1])
            loops.variance(found.numpy(), variance.numpy())
            found.mul_(select(variance, where).sign_())  # not masked_fill_, which is slow; and NaN stays
        yield where, found


def _shares(pieces: "Iterator[tuple[slice, Tensor]]", experts: int, numel: int) -> list[float]:
    """Return each task vector's share of the sum of their mean squares; equal ones if that is next to nothing."""
    from sensmerge.tasks.methods.kernels.delta import block_sums

    sums: list[list[float]] = [[] for _ in range(experts)]
    for _, found in pieces:
        for of_expert, part in zip(sums, found, strict=True):
            of_expert += block_sums(part.square())
    means = [math.fsum(of_expert) / max(numel, 1) for of_expert in sums]
    total = sum(means)
    return [mean / total if total >= _LEAST else 1 / experts for mean in means]
