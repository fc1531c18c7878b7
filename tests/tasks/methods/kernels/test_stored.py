"""What the compiled loops make of numbers as files have them is, bit for bit, what torch's operations make of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.methods.kernels.stored import add, rounded, subtract

DTYPES = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32}


def any_numbers(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Return numbers of random bits, so of all magnitudes; a fifth is NaN, Inf, zero, or below the normal numbers."""
    width = 8 * DTYPES[dtype]().itemsize
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**width, count, DTYPES[dtype])
    about = torch.finfo(dtype)
    least, most = about.smallest_normal, about.max
    special = torch.tensor([np.nan, np.inf, -np.inf, 0.0, -0.0, least, least / 2, -least / 4, most], dtype=dtype)
    values = torch.from_numpy(bits).view(dtype)
    where = torch.from_numpy(random.random(count) < 0.2)
    values[where] = special[torch.from_numpy(random.integers(0, len(special), int(where.sum())))]
    return values


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits, but for those of NaN."""
    is_nan = one.isnan() & other.isnan()
    integers = {2: torch.int16, 4: torch.int32}[one.itemsize]
    return bool(((one.view(integers) == other.view(integers)) | is_nan).all())


@given(
    left=st.sampled_from([*DTYPES]),
    right=st.sampled_from([*DTYPES]),
    count=st.integers(0, 3000),
    seed=st.integers(0, 2**32),
)
def test_difference_and_sum(left: torch.dtype, right: torch.dtype, count: int, seed: int) -> None:
    expert, base = any_numbers(left, count, seed), any_numbers(right, count, seed + 1)
    expert[: count // 3] = base[: count // 3].to(left)  # what is close cancels
    piece = torch.empty(count)
    subtract(expert, base, piece)
    assert same(piece, expert.float() - base.float())
    assert same(add(expert.float().clone(), base), expert.float() + base.float())


def test_every_number_of_two_bytes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.from_numpy(np.arange(2**16, dtype=np.uint16)).view(dtype)
        zeros, piece = torch.zeros_like(every), torch.empty(2**16)
        subtract(every, zeros, piece)
        assert same(piece, every.float() - zeros.float())
        finite = every[every.isfinite()]
        found, is_finite = rounded(finite.float(), dtype)
        assert is_finite
        assert same(found, finite)


@given(
    dtype=st.sampled_from([*DTYPES]), count=st.integers(1, 3000), seed=st.integers(0, 2**32), scale=st.integers(-40, 20)
)
def test_rounding(dtype: torch.dtype, count: int, seed: int, scale: int) -> None:
    """Of any float32, and of such as are about where float16 ends at both sides."""
    random = torch.Generator().manual_seed(seed)
    for values in (any_numbers(torch.float32, count, seed), torch.randn(count, generator=random) * 2.0**scale):
        expected = values.to(dtype)
        found, is_finite = rounded(values, dtype)
        assert is_finite == bool(expected.isfinite().all())
        kept = expected.isfinite()
        assert same(found[kept], expected[kept])


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
