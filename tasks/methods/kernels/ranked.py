"""Random choice of a task vector's elements by the rank of their magnitudes in their row (DELLA, arXiv 2406.11617)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensmerge.tasks.methods.contract import TaskVector
from sensmerge.tasks.methods.kernels import masks
from sensmerge.tasks.methods.kernels.delta import CHUNK
from sensmerge.tasks.methods.kernels.sparsify import stream


@dataclass(frozen=True)
class Chosen:
    """Keeps the elements that were chosen before."""

    bits: masks.UInt8
    """one for every element, eight in each number, the first one uppermost"""

    def __call__(self, piece: Tensor, where: slice) -> Tensor:
        """See `sparsify.Sparsifier`; `where` starts at a multiple of 8."""
        assert where.start % 8 == 0, where
        chosen = np.unpackbits(self.bits[where.start // 8 : -(-where.stop // 8)], count=len(piece))
        masks.keep_chosen(piece.numpy(), chosen)
        return piece


def by_rank(vector: TaskVector, base: Tensor, shares: tuple[float, float], key: str) -> masks.UInt8:
    """Choose elements: each with a probability that grows evenly with its rank in its row, independently of the others.

    A row runs along the second dimension, or the only one. Of equal magnitudes, that with the smaller index ranks
    lower. The only element of a row has the mean probability.

    Args:
        vector: the task vector.
        base: the base's tensor, flat, in any float dtype.
        shares: probability of the smallest element of a row, and of the largest.
        key: names the stream of random numbers; whether an element is kept depends on it, its index and its rank alone.

    Returns:
        `Chosen.bits`.
    """
    shape = vector.shape or (len(base),)
    width, inner = (shape[1], math.prod(shape[2:])) if len(shape) > 1 else (shape[0], 1)
    slab = max(1, width * inner)
    probabilities = np.linspace(*shares, width) if width > 1 else np.array([sum(shares) / 2])
    limits = np.rint(probabilities * (1 << 31)).astype(np.int64)
    aligned = 8 // math.gcd(slab, 8)  # slabs that fill whole bytes
    step = aligned * max(1, CHUNK // (slab * aligned)) * slab
    bits = np.empty(-(-len(base) // 8), np.uint8)
    for start in range(0, len(base), step):
        where = slice(start, min(start + step, len(base)))
        values = torch.empty(where.stop - start)
        vector.delta.fill(values, where, base[where])
        magnitudes = values.numpy().view(np.int32).reshape(-1, width, inner).swapaxes(1, 2) & np.int32(0x7FFFFFFF)
        keys = (magnitudes.astype(np.int64) << 32 | np.arange(width)).reshape(-1, width)
        keys.sort(axis=1)  # whole numbers that differ: there is one order
        kept = np.empty(len(values), np.uint8)
        masks.choose_ranked(keys, limits, np.uint64(stream(key, where)), inner, kept)
        bits[start // 8 : start // 8 + -(-len(kept) // 8)] = np.packbits(kept)
    return bits
