"""What the compiled loops make of bfloat16 is, bit for bit, what torch's operations make of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sensmerge.tasks.methods.kernels.stored import add, rounded, subtract

any_bits = arrays("uint16", st.integers(0, 1100), elements=st.integers(0, 0xFFFF))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def of_bits(numbers: np.ndarray) -> torch.Tensor:
    """Return any bfloat16 numbers; the largest are left out, with which sums overflow."""
    values = torch.from_numpy(numbers.copy()).view(torch.bfloat16)
    return values.masked_fill((values.abs() < 2.0**126).logical_not(), 1.5)


@given(numbers=any_bits, seed=st.integers(0, 9))
def test_difference_and_sum_of_bfloat16(numbers: np.ndarray, seed: int) -> None:
    base = of_bits(numbers)
    expert = base[torch.randperm(len(base), generator=torch.Generator().manual_seed(seed))]
    piece = torch.empty(len(base))
    subtract(expert, base, piece)
    assert torch.equal(bits(piece), bits(expert.float() - base.float()))
    assert torch.equal(bits(add(piece.clone(), base)), bits(piece + base.float()))


@given(numbers=arrays("uint32", st.integers(1, 1100), elements=st.integers(0, 0xFFFFFFFF)))
def test_rounding_to_bfloat16(numbers: np.ndarray) -> None:
    values = torch.from_numpy(numbers).view(torch.float32)
    expected = values.to(torch.bfloat16)
    found, finite = rounded(values, torch.bfloat16)
    assert finite == bool(expected.isfinite().all())
    kept = expected.isfinite()
    assert torch.equal(found[kept].view(torch.int16), expected[kept].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_finite_when_rounded(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    step = largest - float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0, dtype=dtype)))
    for sign in (1, -1):
        half_way = torch.tensor(largest + step / 2)
        for value, expected in ((half_way, False), (torch.nextafter(half_way, torch.tensor(0.0)), True)):
            found, finite = rounded(torch.tensor([0.0, sign * float(value)]), dtype)
            assert finite == expected
            assert not finite or found[1] == sign * largest
    for value in (float("nan"), float("inf"), float("-inf")):
        assert not rounded(torch.tensor([1.0, value, 2.0]), dtype)[1]
