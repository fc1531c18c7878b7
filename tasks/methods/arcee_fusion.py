"""Arcee Fusion: the most important changes of one expert, with the semantics of mergekit 0.1.5."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector

if TYPE_CHECKING:
    from torch import Tensor

    from sensmerge.tasks.methods.kernels.delta import Delta

_EPS = 1e-8
"""Is added to each probability (mergekit's rule)."""


@METHODS.register("arcee_fusion")
class ArceeFusion(Method):
    """Takes those elements of its one expert that stand out by change and divergence of their row, as mergekit does."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "tensor"
    least_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = 1
    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "it takes elements of its one expert whole or not at all"

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`.

        An element is taken if its importance is at least q₂ + 1.5 · (q₃ − q₁), the quartiles of all in the tensor. They
        are exact, where mergekit looks at a random million of elements if there are more. Divergences are float32, as
        there, though those of a fine-tune may be less than its rounding. Memory: some pieces of
        `CHUNK` elements or a row if it is longer, and what `Trim.of` says.
        """
        from sensmerge.tasks.methods.kernels.delta import pieces
        from sensmerge.tasks.methods.kernels.stored import add

        if not base.numel():
            return
        (vector,), flat = vectors, base.reshape(-1)
        width = base.shape[-1] if base.ndim else 1
        importance = _Importance(vector.delta, _divergences(flat, vector.delta, width), width)
        first, median, third = _quartiles(importance, flat)
        threshold = median + 1.5 * (third - first)
        for where, piece in pieces(vector.delta, flat):
            left = importance.of(piece, where) < threshold  # not what is NaN
            yield where, add(piece.masked_fill_(left, 0), flat[where])


def _divergences(base: "Tensor", delta: "Delta", width: int) -> "Tensor":
    """Return the Kullback-Leibler divergence of each row's softmax in the expert from that in the base.

    It is float32 (rows,), and rounding may leave it below 0.
    """
    import torch

    from sensmerge.tasks.methods.kernels.delta import expert_values
    from sensmerge.tasks.methods.kernels.products import row_groups

    found = []
    for where in row_groups(len(base), width):
        values = expert_values(delta, where, base[where]), base[where].float()
        expert, start = (one.view(-1, width).softmax(-1) + _EPS for one in values)
        found.append((expert * (expert / start).log()).sum(-1))
    return torch.cat(found)


def _quartiles(importance: "_Importance", base: "Tensor") -> "Tensor":
    """Return the importance at a quarter, half and three quarters of the ascending order, float32 (3,)."""
    import torch

    from sensmerge.tasks.methods.kernels.sparsify import Trim, ranking

    negative = replace(importance, sign=-1)
    histogram, (histogram_below, below) = ranking(importance, base)[0], ranking(negative, base)
    found = []
    for quarter in (1, 2, 3):
        place = quarter * (len(base) - 1) // 4
        if place < below:
            found.append(-_float(Trim.of(negative, base, place + 1, histogram_below).threshold))
        else:
            found.append(_float(Trim.of(importance, base, len(base) - place, histogram).threshold))
    return torch.stack(found)


def _float(bits: int) -> "Tensor":
    import torch

    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@dataclass(frozen=True)
class _Importance:
    """The importance of every element: its change times its row's divergence.

    A `Delta` to those who rank it, of that of one sign: the other's is 0 there.
    """

    delta: "Delta"
    divergences: "Tensor"
    """of the rows, float32"""
    width: int
    """of a row"""
    sign: int = 1
    """1 or −1"""

    def __len__(self) -> int:
        """See `Delta`."""
        return len(self.delta)

    def fill(self, piece: "Tensor", where: slice, base: "Tensor") -> None:
        """See `Delta`."""
        self.delta.fill(piece, where, base)
        piece.copy_(self.of(piece, where).mul_(self.sign).relu_())

    def of(self, piece: "Tensor", where: slice) -> "Tensor":
        """Return the importance of some elements of the task vector, float32."""
        first, last = where.start // self.width, -(-where.stop // self.width)
        factors = self.divergences[first:last, None].expand(-1, self.width).reshape(-1)
        return factors[where.start - first * self.width :][: len(piece)] * piece.abs()

    def moved(self, move: "Callable[[Tensor], Tensor]") -> "_Importance":
        """See `Delta`."""
        return replace(self, delta=self.delta.moved(move), divergences=move(self.divergences))
