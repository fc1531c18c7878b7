"""The compiled loops give, bit for bit, what torch's operations give."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sensmerge.tasks.methods.kernels.consensus import agreeing, agreeing_weight, disjoint_sum
from sensmerge.tasks.methods.kernels.delta import BLOCK
from sensmerge.tasks.methods.kernels.sparsify import BINS, Drop, Trim, add_to_histogram, random_bits

# Sums of a few stay finite, and some elements cancel or are equal.
elements = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45])
pieces = arrays("float32", st.integers(0, 1100), elements=elements)
weights = st.floats(-2, 2, width=32)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


@given(
    parts=arrays("float32", st.tuples(st.integers(1, 7), st.integers(0, 1100)), elements=elements),
    given_weights=st.lists(weights, min_size=7, max_size=7),
    normalize=st.booleans(),
)
def test_disjoint_sum(parts: np.ndarray, given_weights: list[float], normalize: bool) -> None:
    weights = given_weights[: len(parts)]
    found = disjoint_sum(torch.from_numpy(parts.copy()), weights, normalize)
    sign, magnitudes = agreeing(list(torch.from_numpy(parts.copy())), weights)
    expected = torch.zeros(parts.shape[1])
    for magnitude in magnitudes:
        expected += magnitude
    expected *= sign
    if normalize:
        expected /= agreeing_weight(magnitudes, weights)
    assert torch.equal(bits(found), bits(expected))


@given(piece=pieces)
def test_histogram(piece: np.ndarray) -> None:
    histogram = torch.ones(BINS, dtype=torch.int64)
    add_to_histogram(torch.from_numpy(piece), histogram)
    counts = np.bincount(np.abs(piece).view(np.int32) >> 16, minlength=BINS)
    assert histogram.tolist() == (counts + 1).tolist()


@given(piece=pieces, least=st.integers(0, 0x7F800000), last=st.integers(-1, 1200), start=st.sampled_from([0, BLOCK]))
def test_trim(piece: np.ndarray, least: int, last: int, start: int) -> None:
    values = torch.from_numpy(piece.copy())
    where = slice(start, start + len(piece))
    found = Trim(least, last + start)(values.clone(), where)
    magnitudes = bits(values.abs())
    kept = (magnitudes > least) | ((magnitudes == least) & (torch.arange(len(piece)) <= last))
    assert torch.equal(bits(found), bits(values) * kept)


@given(piece=pieces, density=st.floats(0, 1), start=st.sampled_from([0, 2, BLOCK]), key=st.text(max_size=3))
def test_drop(piece: np.ndarray, density: float, start: int, key: str) -> None:
    values = torch.from_numpy(piece.copy())
    where = slice(start, start + len(piece))
    found = Drop(key, density)(values.clone(), where)
    numbers = random_bits(key, where, values.device) & 0x7FFFFFFF
    assert torch.equal(bits(found), bits(values) * (numbers <= round(density * 2**31) - 1))
