"""Loops over pieces of task vectors on a CPU, compiled by numba.

Each does in one pass through the processor's cache what torch does in many, bit for bit: numba keeps the order of
operations and rounds after each. On other devices torch's own operations are used, beside the callers. Compiled at
their first call on a machine (some seconds in all), and then read from numba's cache on disk.

Inner loops count slices from 0: where an index is a sum, it might be negative, and numba does one element at a time.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from sensmerge.tasks.methods.kernels.compiled import compiled
from sensmerge.tasks.methods.kernels.conversions import of_bfloat16, of_float16, to_bfloat16, to_float16

Float32 = npt.NDArray[np.float32]
UInt16 = npt.NDArray[np.uint16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

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
_27, _30, _31, _32, _LOWER = (np.uint64(n) for n in (27, 30, 31, 32, 0x7FFFFFFF))
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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
        for i in range(len(block)):  # without branches, so many at once
            inside[i] = np.uint8(np.int32((block[i] ^ bin_) & _BIN) == 0)
        for eight in range((len(block) + 7) // 8):
            if eights[eight]:  # of few
                for i in range(8 * eight, min(8 * eight + 8, len(block))):
                    if inside[i]:
                        places[found], magnitudes[found] = start + i, block[i] & _MAGNITUDE
                        found += 1
    return found


@compiled
def trim(piece: Float32, least: int) -> None:
    """Set elements whose magnitude's bits are less than `least` to zero, in place."""
    bits = piece.view(np.int32)
    bound, zero = np.int32(least), np.int32(0)
    for i in range(len(bits)):
        element = bits[i]
        bits[i] = element if (element & _MAGNITUDE) >= bound else zero


@compiled
def drop(piece: Float32, state: np.uint64, limit: int) -> None:
    """Set elements whose random number is not below `limit` to zero, in place.

    The numbers are those of `kernels.sparsify.random_bits` without their uppermost bit.

    Args:
        piece: the elements.
        state: splitmix64's before the first output.
        limit: 0 to 2^31.
    """
    bits = piece.view(np.int32)
    bound, zero = np.uint32(limit), np.int32(0)
    for pair in range(len(bits) // 2):
        output = _splitmix64(state, pair)
        first, second = bits[2 * pair], bits[2 * pair + 1]
        bits[2 * pair] = first if np.uint32(output & _LOWER) < bound else zero
        bits[2 * pair + 1] = second if np.uint32((output >> _32) & _LOWER) < bound else zero
    if len(bits) % 2 and np.uint32(_splitmix64(state, len(bits) // 2) & _LOWER) >= bound:
        bits[-1] = zero


@compiled
def _splitmix64(state: np.uint64, number: int) -> Any:
    """Return one output of splitmix64 (Steele, Lea, Flood 2014) after a state, uint64; counted from 0."""
    mixed = state + np.uint64(number + 1) * _STEP
    mixed = (mixed ^ (mixed >> _30)) * _FIRST
    mixed = (mixed ^ (mixed >> _27)) * _SECOND
    return mixed ^ (mixed >> _31)


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
def disjoint_sum(parts: Float32, weights: Float32, normalize: bool, mixed: Float32) -> None:
    """Sum weighted task vectors where they agree with the sign of the sum over all of them (0 counts as positive).

    Args:
        parts: (sparse) task vectors (experts × elements).
        weights: of the experts.
        normalize: whether to divide by the sum of the weights that agree, where it is not 0.
        mixed: gets the result (elements,).
    """
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
