"""Inner products of models and task vectors: all that their lengths and angles depend on."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels import product_loops
from sensmerge.tasks.methods.kernels.delta import BLOCK, CHUNK, Delta, Difference, Unchanged, chunks, expert_values
from sensmerge.tasks.methods.kernels.stored import bits, is_narrow

Float64 = npt.NDArray[np.float64]


def inner_products(base: Tensor, deltas: Sequence[Delta], made_of: Float64) -> Float64:
    """Return the inner products of vectors over the whole tensor, float64 (vectors × vectors).

    Args:
        base: the base's tensor, flat, in any float dtype.
        deltas: the experts' task vectors.
        made_of: what the vectors are (vectors × 1 + experts), 0 or 1: the base, a task vector, or an expert, which is
            both together.
    """
    pairs = _pairs(len(made_of))
    found = _of_stored(base, deltas, made_of)
    if found is None:
        found = _of_values(base, deltas, made_of)
    return _symmetric([np.asarray(_exact([block[k] for block in found])) for k in range(len(pairs))], pairs)


def _of_values(base: Tensor, deltas: Sequence[Delta], made_of: Float64) -> list[list[float]]:
    """Return the inner products of all pairs in each block (blocks × pairs)."""
    found = []
    for where in chunks(len(base)):
        every = [_values(row, base[where], deltas, where).numpy() for row in made_of]
        for start in range(0, where.stop - where.start, BLOCK):
            blocks = [values[start : start + BLOCK] for values in every]
            found.append([product_loops.inner_product(blocks[i], blocks[j]) for i, j in _pairs(len(blocks))])
    return found


def _of_stored(base: Tensor, deltas: Sequence[Delta], made_of: Float64) -> list[list[float]] | None:
    """Do `_of_values`, to the same bits, from two or three vectors as files hold them; None where that cannot be."""
    are_models = bool(made_of[0, 0])
    if not (len(made_of) in (2, 3) and is_narrow(base) and (made_of[:, 0] == are_models).all()):
        return None
    vectors = []
    for row in made_of:
        delta = next((delta for delta, there in zip(deltas, row[1:], strict=True) if there), Unchanged(len(base)))
        if isinstance(delta, Difference) and delta.expert.dtype == base.dtype:
            vectors.append(bits(delta.expert))
        elif isinstance(delta, Unchanged):
            vectors.append(bits(base))
        else:
            return None
    every, is_half = (bits(base), *vectors, vectors[-1])[:4], base.dtype == torch.float16
    found = np.empty((-(-len(base) // BLOCK), 6))
    for products, start in zip(found, range(0, len(base), BLOCK), strict=True):
        origin, *three = (one[start : start + BLOCK] for one in every)
        product_loops.products_narrow(origin, tuple(three), is_half, not are_models, products)
    chosen: list[list[float]] = found[:, [0, 1, 3] if len(vectors) == 2 else range(6)].tolist()
    return chosen


def _values(made_of: Float64, base: Tensor, deltas: Sequence[Delta], where: slice) -> Tensor:
    """Return some elements of one vector, float32; the base's in any float dtype."""
    chosen = [delta for delta, there in zip(deltas, made_of[1:], strict=True) if there]
    if not chosen:
        return base.float()
    (delta,) = chosen
    if made_of[0]:
        return expert_values(delta, where, base)
    values = torch.empty(len(base))
    delta.fill(values, where, base)
    return values


def row_groups(numel: int, width: int) -> Iterator[slice]:
    """Yield the slices of a tensor that are some whole rows each: about `CHUNK` elements, one row at least.

    Args:
        numel: elements of the tensor, above 0.
        width: of a row.
    """
    step = max(1, CHUNK // width) * width
    for start in range(0, numel, step):
        yield slice(start, min(start + step, numel))


def rows_of(base: Tensor, deltas: Sequence[Delta], width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, some whole rows, and there base and task vectors, float32 (1 + experts × rows × width).

    Args:
        base: the base's tensor, flat, in any float dtype, not empty.
        deltas: the experts' task vectors.
        width: of a row.
    """
    for where in row_groups(len(base), width):
        origin = base[where]
        found = torch.empty(1 + len(deltas), len(origin))
        found[0] = origin
        for part, delta in zip(found[1:], deltas, strict=True):
            delta.fill(part, where, origin)
        yield where, found.view(len(found), -1, width)


def products_of_rows(found: Tensor) -> Float64:
    """Return the inner products of vectors in each row, float64 (rows × n × n); found is float32 (n × rows × width)."""
    return _products(found, 1)


def products_of_columns(base: Tensor, deltas: Sequence[Delta], width: int) -> Float64:
    """Return the inner products of base and task vectors in each column, float64 (width × 1 + experts, twice).

    Args:
        base: the base's tensor, flat, in any float dtype, not empty.
        deltas: the experts' task vectors.
        width: of a row.
    """
    total = np.zeros((width, 1 + len(deltas), 1 + len(deltas)))
    for _, found in rows_of(base, deltas, width):
        total += _products(found, 0)
    return total


def _products(found: Tensor, dim: int) -> Float64:
    every, pairs = found.double(), _pairs(len(found))
    return _symmetric([(every[i] * every[j]).sum(dim).numpy() for i, j in pairs], pairs)


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def _symmetric(products: Sequence[Float64], pairs: Sequence[tuple[int, int]]) -> Float64:
    """Return the products of all pairs as matrices, in the last two dimensions."""
    count = 1 + pairs[-1][0]
    found = np.empty((*products[0].shape, count, count))
    for product, (i, j) in zip(products, pairs, strict=True):
        found[..., i, j] = found[..., j, i] = product
    return found


def _exact(summands: Sequence[float]) -> float:
    """Return a sum that does not depend on the order of the summands; NaN if one is, or if it overflows."""
    try:
        return math.fsum(summands)
    except (OverflowError, ValueError):  # inf − inf
        return math.nan
