"""Loops that take inner products in float64, compiled by numba; see `loops`."""

import numpy as np
import numpy.typing as npt

from sensmerge.tasks.methods.kernels.compiled import compiled
from sensmerge.tasks.methods.kernels.instructions import of_bfloat16, of_float16
from sensmerge.tasks.methods.kernels.loops import ROW, Float32, Four, UInt16, subtract_narrow

Float64 = npt.NDArray[np.float64]


@compiled
def inner_product(left: Float32, right: Float32) -> float:
    """Return Σ left · right in float64, of arrays that are as long: in `ROW` sums side by side, and then of these."""
    total = np.zeros(ROW)
    for start in range(0, len(left), ROW):
        first, second = left[start : start + ROW], right[start : start + ROW]
        for i in range(len(first)):
            total[i] += np.float64(first[i]) * np.float64(second[i])
    found = 0.0
    for i in range(ROW):
        found += total[i]
    return found


@compiled
def products_narrow(base: UInt16, vectors: Four, is_half: bool, are_differences: bool, found: Float64) -> None:
    """Take the inner products of three vectors as `inner_product` does, in one pass over all.

    Args:
        base: bits of float16 or bfloat16.
        vectors: likewise, each as long.
        is_half: whether they are of float16.
        are_differences: whether the base is subtracted from each first, in float32.
        found: gets the products (6,): first · first, second, third; second · second, third; third · third.
    """
    total, values = np.zeros((6, ROW)), np.empty((3, ROW), np.float32)
    t0, t1, t2, t3, t4, t5 = total[0], total[1], total[2], total[3], total[4], total[5]
    for start in range(0, len(base), ROW):
        origin = base[start : start + ROW]
        for k in range(3):
            stored, row = vectors[k][start : start + ROW], values[k]
            if are_differences:
                subtract_narrow(stored, origin, is_half, row[: len(origin)])
            elif is_half:
                for i in range(len(origin)):
                    row[i] = of_float16(stored[i])
            else:
                for i in range(len(origin)):
                    row[i] = of_bfloat16(stored[i])
        x, y, z = values[0, : len(origin)], values[1], values[2]
        for i in range(len(x)):
            p, q, r = np.float64(x[i]), np.float64(y[i]), np.float64(z[i])
            t0[i] += p * p
            t1[i] += p * q
            t2[i] += p * r
            t3[i] += q * q
            t4[i] += q * r
            t5[i] += r * r
    for k in range(6):
        summed = 0.0
        for i in range(ROW):
            summed += total[k, i]
        found[k] = summed
