"""Task vectors of one tensor, worked out piece by piece: what is not asked for is never in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels import loops
from sensmerge.tasks.methods.kernels.stored import add, can_sum, subtract, sum_differences

CHUNK = 1 << 17
"""Elements handled at a time: intermediate tensors then stay in the processor's cache."""
GPU_CHUNK = 1 << 23
"""The same on a GPU, which is slow to start and has no such cache."""
BLOCK = 1 << 16
"""Sums are taken over blocks of this many elements, and then over blocks: so they do not depend on the chunks."""


class Delta(Protocol):
    """The task vector of one tensor, expert − base, flat and in float32."""

    def __len__(self) -> int:
        """Return the number of elements."""

    def fill(self, piece: Tensor, where: slice, base: Tensor) -> None:
        """Write some of the elements.

        Args:
            piece: gets them; flat, float32.
            where: which, from start to stop.
            base: the base's elements there, in any float dtype; on the same device.
        """

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Delta":
        """Return the task vector with its tensors where `move` puts them."""


@dataclass(frozen=True)
class Difference:
    """A tensor that the expert stores whole."""

    expert: Tensor
    """flat, in any float dtype; it may lie in a file"""

    def __len__(self) -> int:
        """See `Delta`."""
        return len(self.expert)

    def fill(self, piece: Tensor, where: slice, base: Tensor) -> None:
        """See `Delta`."""
        subtract(self.expert[where], base, piece)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Delta:
        """See `Delta`."""
        return Difference(move(self.expert))


@dataclass(frozen=True)
class Whole:
    """A task vector that is there already."""

    values: Tensor
    """flat, float32"""

    def __len__(self) -> int:
        """See `Delta`."""
        return len(self.values)

    def fill(self, piece: Tensor, where: slice, base: Tensor) -> None:
        """See `Delta`."""
        piece.copy_(self.values[where])

    def moved(self, move: Callable[[Tensor], Tensor]) -> Delta:
        """See `Delta`."""
        return Whole(move(self.values))


@dataclass(frozen=True)
class Unchanged:
    """A tensor that the expert left alone."""

    numel: int

    def __len__(self) -> int:
        """See `Delta`."""
        return self.numel

    def fill(self, piece: Tensor, where: slice, base: Tensor) -> None:
        """See `Delta`."""
        piece.zero_()

    def moved(self, move: Callable[[Tensor], Tensor]) -> Delta:
        """See `Delta`."""
        return self


def chunks(numel: int, size: int | None = None) -> Iterator[slice]:
    """Yield the slices that make up `numel` elements, `size` (default `CHUNK`, a multiple of `BLOCK`) in each."""
    size = size or CHUNK
    assert size % BLOCK == 0, f"chunks of {size} elements would split blocks of {BLOCK}"
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def _chunks_of(base: Tensor) -> Iterator[slice]:
    """Yield the slices of a flat tensor that are worked on at a time where it lies; no result depends on them."""
    return chunks(len(base), CHUNK if base.is_cpu else GPU_CHUNK)


def pieces(delta: Delta, base: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, and the task vector's values there, flat and float32; the caller may change the tensor.

    Args:
        delta: the task vector.
        base: the base's tensor, flat, in any float dtype.
    """
    for where in _chunks_of(base):
        piece = torch.empty(where.stop - where.start, device=base.device)
        delta.fill(piece, where, base[where])
        yield where, piece


def expert_values(delta: Delta, where: slice, base: Tensor) -> Tensor:
    """Return some of the expert's own elements, float32; what it stores whole is not rounded on the way.

    Args:
        delta: its task vector.
        where: which elements.
        base: the base's elements there, in any float dtype.
    """
    if isinstance(delta, Difference):
        return delta.expert[where].to(torch.float32, copy=True)
    values = torch.empty(len(base), device=base.device)
    delta.fill(values, where, base)
    return add(values, base)


def block_sums(values: Tensor) -> list[float]:
    """Return sums of magnitudes, some for every `BLOCK` of a flat float32 tensor that starts with one.

    Every element is in one of them, added in an order that is the same on every device. So their exact sum is too.
    """
    if values.is_cpu:
        sums = torch.empty(-(-len(values) // BLOCK), loops.LANES)
        loops.block_sums(values.numpy(), BLOCK, sums.numpy())
    else:
        rows = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK // loops.ROW, loops.ROW)
        sums = torch.zeros(len(rows), loops.ROW, device=values.device)
        for row in rows.unbind(1):
            sums += row
        while sums.shape[1] > loops.LANES:
            first, second = sums.chunk(2, 1)
            sums = first + second
    return sums.flatten().tolist()


def parts(base: Tensor, deltas: Sequence[Delta]) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, and every task vector's (experts × elements), float32; the caller may change the tensor.

    Args:
        base: the base's tensor, flat, in any float dtype.
        deltas: the experts' task vectors of it.
    """
    for where in _chunks_of(base):
        origin = base[where]
        found = torch.empty(len(deltas), len(origin), device=base.device)
        for part, delta in zip(found, deltas, strict=True):
            delta.fill(part, where, origin)
        yield where, found


def weighted_sum(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of task vectors (experts × elements), flat; on a GPU they are changed."""
    if parts.is_cpu:
        mixed = torch.empty_like(parts[0])
        loops.weighted_sum(parts.numpy(), np.array(weights, np.float32), mixed.numpy())
        return mixed
    for part, weight in zip(parts, weights, strict=True):
        part.mul_(weight)
    return sum(parts[1:], start=parts[0])


def divide(values: Tensor, divisor: float) -> Tensor:
    """Divide float32 elements in place, and return them.

    By a tensor where they lie: for a number, torch's GPU kernel multiplies with its reciprocal, which rounds twice.
    """
    return values.div_(torch.full((), divisor, dtype=torch.float32, device=values.device))


def sums(base: Tensor, deltas: Sequence[Delta], weights: Sequence[float]) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, and Σ weight · task vector there, flat and float32; base flat, in any float dtype."""
    experts = [delta.expert for delta in deltas if isinstance(delta, Difference) and delta.expert.dtype == base.dtype]
    if len(experts) < len(deltas) or not can_sum(base, len(experts)):
        for where, found in parts(base, deltas):
            yield where, weighted_sum(found, weights)
        return
    for where in chunks(len(base)):
        yield where, sum_differences(base[where], [expert[where] for expert in experts], weights)


def summed(base: Tensor, deltas: Sequence[Delta], weights: Sequence[float]) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, and base + Σ weight · task vector there, float32; the base flat, in any float dtype."""
    for where, mixed in sums(base, deltas, weights):
        yield where, add(mixed, base[where])
