"""Ways to set elements of a task vector to zero, piece by piece, and the random numbers they need."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tasks.methods.delta import Delta, block_sums, chunks

BINS = 1 << 15
"""Of a magnitude histogram."""
_LARGEST = (1 << 31) - 1
"""Of torch's int32."""

Sparsifier = Callable[[Tensor, slice], Tensor]
"""Gets a piece of a task vector, which it may change, and which elements these are; returns it made sparse."""


def kept_elements(numel: int, density: float) -> int:
    """Return how many elements a density keeps: at least one of a non-empty tensor unless the density is 0."""
    if density <= 0 or numel == 0:
        return 0
    return numel if density >= 1 else max(1, int(density * numel))


def magnitude_histogram(piece: Tensor) -> Tensor:
    """Count float32 elements by the upper 15 bits of their magnitude (8 of exponent, 7 more), int64 (32768,).

    The order of the bins is that of the magnitudes, so the bin that holds a threshold is known without sorting.
    """
    return torch.bincount(_magnitude_bits(piece.flatten()).bitwise_right_shift_(16), minlength=BINS)


def histogram_of(delta: Delta, base: Tensor) -> Tensor:
    """Return the `magnitude_histogram` of a whole task vector; base flat, in any float dtype."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=base.device)
    for where in chunks(len(delta)):
        counts += magnitude_histogram(delta.piece(where, base[where].float()))
    return counts


@dataclass(frozen=True)
class Trim:
    """Keeps the elements of largest magnitude (TIES step 1, arXiv 2306.01708); of equal ones, the first.

    What a stable full sort would keep, without sorting: `of` finds the magnitude of the smallest element that is kept,
    and the place of the last one that is kept of those which equal it.
    """

    threshold: int
    """magnitude of the smallest element that is kept, as the bits of a float32"""
    last: int
    """index of the last element of that magnitude which is kept"""

    @classmethod
    def of(cls, delta: Delta, base: Tensor, density: float, histogram: Tensor) -> "Trim":
        """Find the threshold of a task vector, in one pass that looks closer at a single bin of the histogram.

        Memory: 12 bytes for each element in that bin, which spans a 128th of a power of two.

        Args:
            delta: the task vector.
            base: the base's tensor, flat, in any float dtype.
            density: share of elements to keep, above 0 and below 1.
            histogram: `magnitude_histogram` of the task vector.
        """
        keep = kept_elements(len(delta), density)
        from_top = histogram.flip(0).cumsum(0)
        rank = int(torch.searchsorted(from_top, keep))
        boundary = BINS - 1 - rank
        missing = keep - (int(from_top[rank - 1]) if rank else 0)
        places, magnitudes = [], []
        for where in chunks(len(delta)):
            bits = _magnitude_bits(delta.piece(where, base[where].float()))
            inside = _places((bits >> 16).eq_(boundary))
            places.append(inside + where.start)
            magnitudes.append(bits[inside])
        found, place = torch.cat(magnitudes), torch.cat(places)
        # Bits of magnitudes are in the order of the magnitudes.
        threshold = found.kthvalue(len(found) - missing + 1).values
        equal = place[found == threshold]
        last = equal[missing - int((found > threshold).count_nonzero()) - 1]
        return cls(int(threshold), int(last))

    def __call__(self, piece: Tensor, where: slice) -> Tensor:
        """See `Sparsifier`."""
        until = min(max(self.last + 1 - where.start, 0), len(piece))
        for part, least in ((piece[:until], self.threshold), (piece[until:], self.threshold + 1)):
            if len(part):
                _keep_from(part, least)
        return piece


def _places(mask: Tensor) -> Tensor:
    """Return the indices of the elements of an int32 mask that are 1, int64."""
    flags = mask.to(torch.int8).view(torch.bool)
    # NumPy is several times faster at this where few are set.
    return torch.from_numpy(np.flatnonzero(flags.numpy())) if flags.is_cpu else flags.nonzero().flatten()


def _magnitude_bits(piece: Tensor) -> Tensor:
    """Return the bits of float32 magnitudes, int32: their order is that of the magnitudes. A new tensor."""
    return piece.view(torch.int32) & 0x7FFFFFFF


def _keep_from(piece: Tensor, least: int) -> None:
    """Set float32 elements whose magnitude's bits are less than `least` to zero, in place."""
    _keep(piece, torch.rsub(_magnitude_bits(piece), least - 1).bitwise_right_shift_(31))


def _below(numbers: Tensor, limit: int) -> Tensor:
    """Return −1 (all bits set) where an int32 number of at least 0 is below a limit and 0 elsewhere, in place.

    By the sign of the difference, for comparisons that give booleans are many times slower on a CPU.
    """
    return numbers.sub_(limit).bitwise_right_shift_(31)


def _keep(piece: Tensor, mask: Tensor) -> Tensor:
    """Set float32 elements to zero where a mask is 0 and leave them where it is −1, in place."""
    piece.view(torch.int32).bitwise_and_(mask)
    return piece


@dataclass(frozen=True)
class Drop:
    """Keeps each element with probability `density`, independently (DARE, arXiv 2311.03099, without its rescaling).

    The choice depends on the key and the element's index alone.
    """

    key: str
    """names the stream of random numbers"""
    density: float
    remember: bool = False
    """whether masks are kept (a byte per element) for a second pass, as they take longer to make than to read"""
    _masks: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, piece: Tensor, where: slice) -> Tensor:
        """See `Sparsifier`."""
        known = self._masks.pop(where.start, None)
        if known is not None:
            return _keep(piece, known.to(torch.int32))
        mask = _below(random_bits(self.key, where, piece.device) & _LARGEST, round(self.density * (_LARGEST + 1)))
        if self.remember:
            self._masks[where.start] = mask.to(torch.int8)
        return _keep(piece, mask)


def drop_all(piece: Tensor, where: slice) -> Tensor:
    """Keep nothing: density 0. See `Sparsifier`."""
    return piece.zero_()


@dataclass(frozen=True)
class Rescaled:
    """Gives a sparse task vector the L1 norm that it had before."""

    sparsify: Sparsifier
    ratio: float

    @classmethod
    def of(cls, delta: Delta, base: Tensor, sparsify: Sparsifier) -> "Rescaled":
        """Measure the norms in one pass; base flat, in any float dtype."""
        before, after = [], []
        for where in chunks(len(delta)):
            piece = delta.piece(where, base[where].float())
            before += block_sums(piece.abs())
            after += block_sums(sparsify(piece, where).abs_())
        return cls(sparsify, norm_ratio(math.fsum(before), math.fsum(after)))

    def __call__(self, piece: Tensor, where: slice) -> Tensor:
        """See `Sparsifier`."""
        return self.sparsify(piece, where).mul_(self.ratio)


def norm_ratio(before: float, after: float) -> float:
    """Return what restores an L1 norm; 1 if either norm is below 1e-7 (mergekit's rule)."""
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


def random_bits(key: str, where: slice, device: torch.device) -> Tensor:
    """Return 32 random bits for each of some elements, int32: a hash of (key, index), the same on every device.

    Of splitmix64 (Steele, Lea, Flood 2014) of a counter, each output serves two elements, lower half first; the key's
    sha256 chooses the stream.

    Args:
        key: names the stream.
        where: which elements; starts at an even one.
        device: where they are made.
    """
    assert where.start % 2 == 0, where
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    first, last = where.start // 2 + 1, (where.stop + 1) // 2 + 1
    state = torch.arange(first, last, dtype=torch.int64, device=device)
    state.mul_(_signed(0x9E3779B97F4A7C15)).add_(start)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state.bitwise_xor_(_shift(state, bits)).mul_(_signed(factor))
    state.bitwise_xor_(_shift(state, 31))
    return state.view(torch.int32)[: where.stop - where.start]


def _signed(value: int) -> int:
    """Return a 64-bit constant as torch's signed integers hold it."""
    return value - (1 << 64) if value >> 63 else value


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros (torch fills with the sign)."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
