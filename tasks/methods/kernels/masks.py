"""Loops that set elements of task vectors to zero, or choose which, on a CPU; compiled as those of `loops` are."""

from typing import Any

import numpy as np
import numpy.typing as npt

from sensmerge.tasks.methods.kernels.compiled import compiled
from sensmerge.tasks.methods.kernels.loops import Float32, Int64

UInt8 = npt.NDArray[np.uint8]

_MAGNITUDE = np.int32(0x7FFFFFFF)
"""All bits of a float32 but the sign; as integers they are in the order of the magnitudes."""
_PLACE = np.int64(0xFFFFFFFF)
"""The bits of a sorted key that say where an element is."""
_27, _30, _31, _32, _LOWER = (np.uint64(n) for n in (27, 30, 31, 32, 0x7FFFFFFF))
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@compiled
def trim(piece: Float32, least: int) -> None:
    """Set elements whose magnitude's bits are less than `least` to zero, in place."""
    bits = piece.view(np.int32)
    bound, zero = np.int32(least), np.int32(0)
    for i in range(len(bits)):
        element = bits[i]
        bits[i] = element if (element & _MAGNITUDE) >= bound else zero


@compiled
def cap(piece: Float32, most: int) -> None:
    """Set elements whose magnitude's bits are more than `most` to zero, in place."""
    bits = piece.view(np.int32)
    bound, zero = np.int32(most), np.int32(0)
    for i in range(len(bits)):
        element = bits[i]
        bits[i] = element if (element & _MAGNITUDE) <= bound else zero


@compiled
def keep_chosen(piece: Float32, chosen: UInt8) -> None:
    """Set elements to zero in place where `chosen`, which is as long, is 0."""
    bits, zero = piece.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        element = bits[i]
        bits[i] = element if chosen[i] else zero


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
def choose_ranked(keys: Int64, limits: Int64, state: np.uint64, inner: int, kept: UInt8) -> None:
    """Choose elements with a probability that depends on their rank: write 1 for those that are kept and 0 for others.

    The random numbers are those of `kernels.sparsify.random_bits` without their uppermost bit.

    Args:
        keys: for every row, in ascending order of what is ranked, the places in it (lower 32 bits of rows × width).
        limits: of the random numbers of each rank that are kept, 0 to 2^31 (width,).
        state: splitmix64's before the output for the first element, which has an even index.
        inner: distance of a row's elements; so many rows lie side by side.
        kept: gets the choices, in the order of the elements (rows · width,).
    """
    rows, width = keys.shape
    for row in range(rows):
        origin = (row // inner) * width * inner + row % inner
        for rank in range(width):
            index = origin + (keys[row, rank] & _PLACE) * inner
            output = _splitmix64(state, index >> 1)
            number = np.int64(((output >> _32) if index & 1 else output) & _LOWER)
            kept[index] = np.uint8(number < limits[rank])
