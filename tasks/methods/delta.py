"""Task vectors of one tensor, worked out piece by piece: what is not asked for is never in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tasks.methods import kernels

CHUNK = 1 << 17
"""Elements handled at a time: intermediate tensors then stay in the processor's cache."""
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
            base: the base's elements there, in any float dtype.
        """


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
        expert = self.expert[where]
        if is_plain_bfloat16(expert) and is_plain_bfloat16(base):
            kernels.subtract_bfloat16(bits_of(expert), bits_of(base), piece.numpy())
        else:
            piece.copy_(expert).sub_(base.float())


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


def chunks(numel: int, size: int | None = None) -> Iterator[slice]:
    """Yield the slices that make up `numel` elements, `size` (default `CHUNK`, a multiple of `BLOCK`) in each."""
    size = size or CHUNK
    assert size % BLOCK == 0, f"chunks of {size} elements would split blocks of {BLOCK}"
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def pieces(delta: Delta, base: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, and the task vector's values there, flat and float32; the caller may change the tensor.

    Args:
        delta: the task vector.
        base: the base's tensor, flat, in any float dtype.
    """
    for where in chunks(len(delta)):
        piece = torch.empty(where.stop - where.start, device=base.device)
        delta.fill(piece, where, base[where])
        yield where, piece


def block_sums(values: Tensor) -> list[float]:
    """Return the sum of every `BLOCK` elements of a flat tensor that starts with a block; of few, of those."""
    return [float(block.sum()) for block in torch.split(values, BLOCK)]


def added(values: Tensor, base: Tensor) -> Tensor:
    """Add the base's elements, in any float dtype, to float32 values, in place."""
    if is_plain_bfloat16(base):
        kernels.add_bfloat16(values.numpy(), bits_of(base))
        return values
    return values.add_(base.float())


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return flat values in another dtype, and whether all are finite in it; NaN and Inf may become others."""
    if values.is_cpu and values.dtype == torch.float32 and dtype == torch.bfloat16:
        narrow = torch.empty(len(values), dtype=dtype)
        return narrow, bool(kernels.round_bfloat16(values.numpy(), bits_of(narrow)))
    # Rounding keeps the order, so the extremes tell of all; NaN is an extreme.
    extremes = torch.stack(values.aminmax())
    return values.to(dtype), bool(extremes.to(dtype).isfinite().all())


def is_plain_bfloat16(values: Tensor) -> bool:
    """Return whether the compiled loops for bfloat16 can read a tensor."""
    return values.is_cpu and values.dtype == torch.bfloat16


def bits_of(values: Tensor) -> kernels.UInt16:
    """Return the bits of bfloat16 values, in the same memory."""
    bits: kernels.UInt16 = values.view(torch.uint16).numpy()
    return bits
