"""Loops over pieces of task vectors on a CPU, compiled by numba.

Each does in one pass through the processor's cache what torch does in many, bit for bit: numba keeps the order of
operations and rounds after each. On other devices torch's own operations are used, beside the callers.

Inner loops count slices from 0: where an index is a sum, it might be negative, and numba does one element at a time.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from sensmerge.tasks.methods.kernels.compiled import compiled
from sensmerge.tasks.methods.kernels.instructions import (
    of_bfloat16,
    of_float16,
    to_bfloat16,
    to_float16,
    trailing_zeros,
)

Float32 = npt.NDArray[np.float32]
UInt16 = npt.NDArray[np.uint16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Four = tuple[npt.NDArray[Any], ...]

_MAGNITUDE = np.int32(0x7FFFFFFF)
"""All bits of a float32 but the sign; as integers they are in the order of the magnitudes."""
_BIN, _UPPER = np.int32(0x7FFF0000), np.uint16(0x7FFF)
"""The bits that are the number of a bin, in a float32 and in its upper half."""
_LARGEST_BFLOAT16, _LARGEST_FLOAT16 = np.int32(0x7F7F7FFF), np.int32(0x477FEFFF)
"""Bits of the largest float32 that is rounded to a finite bfloat16 or float16."""
INFINITE = 0x7F800000
"""Bits of the infinite float32; those of a NaN are more, those of numbers less."""
_BLOCK = 1024
"""Elements at a time where a loop goes over several arrays: what lies between then stays in the fastest cache."""
ROW, LANES = 1024, 64
"""Elements that `block_sums` adds side by side, and sums that it leaves of them."""
_NOTHING = np.float32(-0.0)
"""What changes no sum that it is added to, be that −0."""
_1, _3 = np.uint64(1), np.uint64(3)


@compiled
def subtract_narrow(left: UInt16, right: UInt16, is_half: bool, difference: Float32) -> None:
    """Subtract in float32.

    Args:
        left: bits of float16 or bfloat16.
        right: likewise, as long.
        is_half: whether they are of float16.
        difference: gets left − right; as long.
    """
    if is_half:
        for i in range(len(difference)):
            difference[i] = of_float16(left[i]) - of_float16(right[i])
    else:
        for i in range(len(difference)):
            difference[i] = of_bfloat16(left[i]) - of_bfloat16(right[i])


@compiled
def subtract_float32(left: Float32, right: Float32, difference: Float32) -> None:
    """Write left − right, all of them equally long."""
    for i in range(len(difference)):
        difference[i] = left[i] - right[i]


@compiled
def add_narrow(total: Float32, summand: UInt16, is_half: bool) -> None:
    """Add float16 or (if not `is_half`) bfloat16 numbers, given as bits, to as many float32 ones in place."""
    if is_half:
        for i in range(len(total)):
            total[i] += of_float16(summand[i])
    else:
        for i in range(len(total)):
            total[i] += of_bfloat16(summand[i])


@compiled
def round_narrow(values: Float32, is_half: bool, rounded: UInt16) -> bool:
    """Round to the nearest float16 or (if not `is_half`) bfloat16, of two equally near ones to the even one.

    Args:
        values: the numbers.
        is_half: whether to float16.
        rounded: gets the bits; as long.

    Returns:
        Whether all of these are finite; otherwise they have no meaning.
    """
    magnitudes, largest = values.view(np.int32), np.int32(0)
    if is_half:
        for i in range(len(values)):
            magnitude = np.int32(magnitudes[i] & _MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
            rounded[i] = to_float16(values[i])
        return bool(largest <= _LARGEST_FLOAT16)
    for i in range(len(values)):
        magnitude = np.int32(magnitudes[i] & _MAGNITUDE)
        largest = magnitude if magnitude > largest else largest
        rounded[i] = to_bfloat16(values[i])
    return bool(largest <= _LARGEST_BFLOAT16)


@compiled
def largest_magnitude(values: Float32) -> int:
    """Return the bits of the largest magnitude; any NaN is larger than all numbers."""
    bits, largest = values.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        largest = magnitude if magnitude > largest else largest  # `max` would be taken of one at a time
    return int(largest)


@compiled
def block_sums(values: Float32, block: int, sums: Float32) -> None:
    """Add up magnitudes: in every block, each `ROW` to those before, and then the upper half of the row to the lower.

    Args:
        values: the magnitudes.
        block: elements in a block, a multiple of `ROW`.
        sums: gets `LANES` sums for each block (blocks × LANES).
    """
    total = np.empty(ROW, np.float32)
    for number in range(len(sums)):
        elements = values[number * block : (number + 1) * block]
        total[:] = np.float32(0)
        for start in range(0, len(elements), ROW):
            row = elements[start : start + ROW]
            for i in range(len(row)):
                total[i] += row[i]
        width = ROW // 2
        while width >= LANES:
            lower, upper = total[:width], total[width : 2 * width]
            for i in range(width):
                lower[i] += upper[i]
            width //= 2
        sums[number] = total[:LANES]


def make_ready() -> None:
    """Have numba do, in a third of a second, what it does before the first of its loops runs in a process."""
    largest_magnitude(np.zeros(1, np.float32))


@compiled
def count_bins(piece: Float32, counts: Int64) -> int:
    """Add to `counts` (32768,) how many elements have each value of the upper 15 bits of a magnitude.

    Returns:
        The bits of the largest magnitude; any NaN is larger than all numbers.
    """
    halves = piece.view(np.uint16)  # lower half first
    for i in range(len(piece)):
        counts[halves[2 * i + 1] & _UPPER] += 1
    return int(largest_magnitude(piece))


@compiled
def find_bin(piece: Float32, wanted: int, places: Int64, magnitudes: Int32) -> int:
    """Write where the elements of one bin are, and their magnitudes' bits; return how many there are.

    Args:
        piece: the elements.
        wanted: the bin, as in `count_bins`.
        places: gets their indices in `piece`; as long as `piece`.
        magnitudes: gets the bits; as long as `piece`.
    """
    bits, bin_, found = piece.view(np.int32), np.int32(wanted << 16), 0
    inside = np.zeros(_BLOCK, np.uint8)
    eights = inside.view(np.uint64)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        if len(block) < _BLOCK:
            inside[:] = np.uint8(0)
        for i in range(len(block)):  # without branches, so many at once
            inside[i] = np.uint8(np.int32((block[i] ^ bin_) & _BIN) == 0)
        for eight in range((len(block) + 7) // 8):
            left = eights[eight]
            while left:  # of few
                place = 8 * eight + np.int64(trailing_zeros(left) >> _3)
                places[found], magnitudes[found] = start + place, block[place] & _MAGNITUDE
                found += 1
                left &= left - _1
    return found


@compiled
def variance(parts: Float32, found: Float32) -> None:
    """Write the variance over experts of each element, in float32.

    Args:
        parts: task vectors (experts × elements).
        found: gets the variance (elements,).
    """
    experts, numel = parts.shape
    count, mean = np.float32(experts), np.empty(_BLOCK, np.float32)
    for start in range(0, numel, _BLOCK):
        stop = min(start + _BLOCK, numel)
        total = found[start:stop]
        mean[:], total[:] = np.float32(0), np.float32(0)
        for k in range(experts):
            part = parts[k, start:stop]
            for i in range(len(part)):
                mean[i] += part[i]
        for k in range(experts):
            part = parts[k, start:stop]
            for i in range(len(part)):
                difference = part[i] - mean[i] / count
                total[i] += difference * difference
        for i in range(len(total)):
            total[i] /= count


@compiled
def sum_narrow(base: UInt16, experts: Four, is_half: bool, weights: Float32, mixed: Float32) -> None:
    """Sum the weighted differences of four experts from the base, in float32, in one pass over all.

    Where there are fewer experts, the base stands for one, with weight −1: it adds −0, which changes no sum of numbers.

    Args:
        base: bits of float16 or bfloat16.
        experts: likewise, each as long.
        is_half: whether they are of float16.
        weights: of the experts.
        mixed: gets the sum; as long.
    """
    e0, e1, e2, e3 = experts
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    if is_half:
        for i in range(len(mixed)):
            b = of_float16(base[i])
            v0, v1, v2, v3 = of_float16(e0[i]), of_float16(e1[i]), of_float16(e2[i]), of_float16(e3[i])
            mixed[i] = (v0 - b) * w0 + (v1 - b) * w1 + (v2 - b) * w2 + (v3 - b) * w3
    else:
        for i in range(len(mixed)):
            b = of_bfloat16(base[i])
            v0, v1, v2, v3 = of_bfloat16(e0[i]), of_bfloat16(e1[i]), of_bfloat16(e2[i]), of_bfloat16(e3[i])
            mixed[i] = (v0 - b) * w0 + (v1 - b) * w1 + (v2 - b) * w2 + (v3 - b) * w3


@compiled
def sum_float32(base: Float32, experts: Four, weights: Float32, mixed: Float32) -> None:
    """Do `sum_narrow` for numbers in float32."""
    e0, e1, e2, e3 = experts
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for i in range(len(mixed)):
        b = base[i]
        mixed[i] = (e0[i] - b) * w0 + (e1[i] - b) * w1 + (e2[i] - b) * w2 + (e3[i] - b) * w3


@compiled
def weighted_sum(parts: Float32, weights: Float32, mixed: Float32) -> None:
    """Sum weighted task vectors.

    Args:
        parts: (sparse) task vectors (experts × elements).
        weights: of the experts.
        mixed: gets the sum (elements,).
    """
    experts, numel = parts.shape
    for start in range(0, numel, _BLOCK):
        stop = min(start + _BLOCK, numel)
        total = mixed[start:stop]
        for k in range(experts):
            part, weight = parts[k, start:stop], weights[k]
            if k == 0:
                for i in range(len(part)):
                    total[i] = part[i] * weight
            else:
                for i in range(len(part)):
                    total[i] += part[i] * weight


@compiled
def _first_four(weights: Float32) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return the weights of the first four experts; of those that are not there, 1, with which `_NOTHING` stays."""
    found = np.ones(4, np.float32)
    for k in range(min(4, len(weights))):
        found[k] = weights[k]
    return found[0], found[1], found[2], found[3]


@compiled
def disjoint_sum(parts: Float32, weights: Float32, normalize: bool, mixed: Float32) -> None:
    """Sum weighted task vectors where they agree with the sign of the sum over all of them (0 counts as positive).

    Args:
        parts: (sparse) task vectors (experts × elements).
        weights: of the experts.
        normalize: whether to divide by the sum of the weights that agree, where it is not 0.
        mixed: gets the result (elements,).
    """
    if len(parts) <= 4:
        _disjoint_sum_of_four(parts, weights, normalize, mixed)
        return
    zero, one = np.float32(0), np.float32(1)
    experts, numel = parts.shape
    total, kept = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, numel, _BLOCK):
        stop = min(start + _BLOCK, numel)
        agreed = mixed[start:stop]
        agreed[:], total[:], kept[:] = zero, zero, zero
        for k in range(experts):
            part, weight = parts[k, start:stop], weights[k]
            for i in range(len(part)):
                total[i] += part[i] * weight
        for k in range(experts):
            part, weight = parts[k, start:stop], weights[k]
            for i in range(len(part)):
                value = part[i] * weight
                magnitude = value if total[i] >= zero else -value
                agreed[i] += magnitude if magnitude > zero else zero
                kept[i] += weight if magnitude > zero else zero
        for i in range(len(agreed)):
            signed = agreed[i] if total[i] >= zero else -agreed[i]
            agreed[i] = signed / (kept[i] if normalize and kept[i] != zero else one)


@compiled
def _disjoint_sum_of_four(parts: Float32, weights: Float32, normalize: bool, mixed: Float32) -> None:
    """Do `disjoint_sum` for up to four experts, for which all that lies between fits the registers."""
    zero, one = np.float32(0), np.float32(1)
    experts, numel = parts.shape
    w0, w1, w2, w3 = _first_four(weights)
    nothing = np.full(_BLOCK, _NOTHING)
    for start in range(0, numel, _BLOCK):
        stop = min(start + _BLOCK, numel)
        agreed = mixed[start:stop]
        p0 = parts[0, start:stop]
        p1 = parts[1, start:stop] if experts > 1 else nothing
        p2 = parts[2, start:stop] if experts > 2 else nothing
        p3 = parts[3, start:stop] if experts > 3 else nothing
        for i in range(len(agreed)):
            v0, v1, v2, v3 = p0[i] * w0, p1[i] * w1, p2[i] * w2, p3[i] * w3
            sign = one if zero + v0 + v1 + v2 + v3 >= zero else -one
            v0, v1, v2, v3 = v0 * sign, v1 * sign, v2 * sign, v3 * sign
            total = v0 if v0 > zero else zero
            total += v1 if v1 > zero else zero
            total += v2 if v2 > zero else zero
            total += v3 if v3 > zero else zero
            kept = w0 if v0 > zero else zero
            kept += w1 if v1 > zero else zero
            kept += w2 if v2 > zero else zero
            kept += w3 if v3 > zero else zero
            agreed[i] = total * sign / (kept if normalize and kept != zero else one)
