"""Ways to set elements of a task vector to zero, piece by piece, and the random numbers they need."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels import loops, masks
from sensmerge.tasks.methods.kernels.delta import Delta, block_sums, pieces

BINS = 1 << 15
"""Of a magnitude histogram."""
_LARGEST = (1 << 31) - 1
"""Of torch's int32."""
_STEP = 0x9E3779B97F4A7C15
"""Of splitmix64's counter."""

Sparsifier = Callable[[Tensor, slice], Tensor]
"""Gets a piece of a task vector, which it may change, and which elements these are; returns it made sparse. Which it
keeps depends on their magnitudes and places alone."""


def kept_elements(numel: int, density: float) -> int:
    """Return how many elements a density keeps: at least one of a non-empty tensor unless the density is 0."""
    if density <= 0 or numel == 0:
        return 0
    return numel if density >= 1 else max(1, int(density * numel))


def add_to_histogram(piece: Tensor, histogram: Tensor) -> None:
    """Count float32 elements by the upper 15 bits of their magnitude (8 of exponent, 7 more).

    The order of the bins is that of the magnitudes, so the bin that holds a threshold is known without sorting.

    Args:
        piece: the elements, flat.
        histogram: gets the counts, int64 (32768,).
    """
    if piece.is_cpu:
        loops.count_bins(piece.numpy(), histogram.numpy())
    else:
        histogram += torch.bincount(_magnitude_bits(piece) >> 16, minlength=BINS)


def histogram_of(delta: Delta, base: Tensor) -> Tensor:
    """Return the magnitude histogram of a whole task vector, int64 (32768,); base flat, in any float dtype."""
    histogram = torch.zeros(BINS, dtype=torch.int64, device=base.device)
    for _, piece in pieces(delta, base):
        add_to_histogram(piece, histogram)
    return histogram


def ranking(delta: Delta, base: Tensor) -> tuple[Tensor, int]:
    """Return the magnitude histogram of a whole task vector, and how many elements are not zero; base flat."""
    histogram, count = torch.zeros(BINS, dtype=torch.int64, device=base.device), 0
    for _, piece in pieces(delta, base):
        add_to_histogram(piece, histogram)
        count += int(piece.count_nonzero())
    return histogram, count


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
    def of(cls, delta: Delta, base: Tensor, keep: int, histogram: Tensor) -> "Trim":
        """Find the threshold of a task vector, in one pass that looks closer at a single bin of the histogram.

        Memory: 12 bytes for each element in that bin, which spans a 128th of a power of two.

        Args:
            delta: the task vector.
            base: the base's tensor, flat, in any float dtype.
            keep: how many elements to keep: 1 to all.
            histogram: magnitude histogram of the task vector.
        """
        from_top = histogram.flip(0).cumsum(0)
        rank = int(torch.searchsorted(from_top, keep))
        boundary = BINS - 1 - rank
        missing = keep - (int(from_top[rank - 1]) if rank else 0)
        places, magnitudes = [], []
        for where, piece in pieces(delta, base):
            if where.start == 0:  # no other is longer
                room = np.empty(len(piece), np.int64), np.empty(len(piece), np.int32)
            inside, bits = _in_bin(piece, boundary, *room)
            places.append(inside + where.start)
            magnitudes.append(bits)
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
            if part.is_cpu:
                masks.trim(part.numpy(), least)
            else:
                part.masked_fill_(_magnitude_bits(part) < least, 0)
        return piece


@dataclass(frozen=True)
class Band:
    """Keeps elements of middling magnitude (Breadcrumbs, arXiv 2312.06795); of equal ones, the first are larger."""

    large: Trim
    """keeps these, and outliers"""
    outliers: Trim | None
    """would keep the outliers, which are set to zero; None: there are none"""

    @classmethod
    def of(cls, delta: Delta, base: Tensor, outliers: int, keep: int, histogram: Tensor) -> "Band":
        """Find the thresholds: one pass each. Memory and other arguments as of `Trim.of`.

        Args:
            delta: the task vector.
            base: the base's tensor.
            outliers: how many of the largest elements are set to zero.
            keep: how many of the next are kept, 1 or more.
            histogram: of the task vector.
        """
        highest = Trim.of(delta, base, outliers, histogram) if outliers else None
        return cls(Trim.of(delta, base, outliers + keep, histogram), highest)

    def __call__(self, piece: Tensor, where: slice) -> Tensor:
        """See `Sparsifier`."""
        self.large(piece, where)
        if self.outliers is None:
            return piece
        until = min(max(self.outliers.last + 1 - where.start, 0), len(piece))
        for part, most in ((piece[:until], self.outliers.threshold - 1), (piece[until:], self.outliers.threshold)):
            if part.is_cpu:
                masks.cap(part.numpy(), most)
            else:
                part.masked_fill_(_magnitude_bits(part) > most, 0)
        return piece


def _in_bin(piece: Tensor, wanted: int, places: loops.Int64, magnitudes: loops.Int32) -> tuple[Tensor, Tensor]:
    """Return the places of the elements in one bin of the magnitude histogram, int64, and their magnitudes' bits.

    `places` and `magnitudes`, as long as the piece at least, are overwritten.
    """
    if not piece.is_cpu:
        bits = _magnitude_bits(piece)
        inside = ((bits >> 16) == wanted).nonzero().flatten()
        return inside, bits[inside]
    found = loops.find_bin(piece.numpy(), wanted, places, magnitudes)
    return torch.from_numpy(places[:found].copy()), torch.from_numpy(magnitudes[:found].copy())


def _magnitude_bits(piece: Tensor) -> Tensor:
    """Return the bits of float32 magnitudes, int32: their order is that of the magnitudes. A new tensor."""
    return piece.view(torch.int32) & 0x7FFFFFFF


@dataclass(frozen=True)
class Drop:
    """Keeps each element with probability `density`, independently (DARE, arXiv 2311.03099, without its rescaling).

    The choice depends on the key and the element's index alone.
    """

    key: str
    """names the stream of random numbers"""
    density: float

    def __call__(self, piece: Tensor, where: slice) -> Tensor:
        """See `Sparsifier`."""
        limit = round(self.density * (_LARGEST + 1))
        if piece.is_cpu:
            masks.drop(piece.numpy(), np.uint64(stream(self.key, where)), limit)
            return piece
        return piece.masked_fill_((random_bits(self.key, where, piece.device) & _LARGEST) > limit - 1, 0)


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
        for where, piece in pieces(delta, base):
            before += block_sums(piece.abs_())
            after += block_sums(sparsify(piece, where))  # what is kept does not depend on signs
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
    state = torch.arange(1, (where.stop - where.start + 1) // 2 + 1, dtype=torch.int64, device=device)
    state.mul_(_signed(_STEP)).add_(_signed(stream(key, where)))
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state.bitwise_xor_(_shift(state, bits)).mul_(_signed(factor))
    state.bitwise_xor_(_shift(state, 31))
    return state.view(torch.int32)[: where.stop - where.start]


def stream(key: str, where: slice) -> int:
    """Return splitmix64's state, 64 bits, before the output for the first of some elements, which has an even index."""
    assert where.start % 2 == 0, where
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    outputs: int = where.start // 2
    return (start + outputs * _STEP) % (1 << 64)


def _signed(value: int) -> int:
    """Return a 64-bit constant as torch's signed integers hold it."""
    return value - (1 << 64) if value >> 63 else value


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros (torch fills with the sign)."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
