import hashlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sensmerge.tasks.methods.kernels.delta import BLOCK, Whole, chunks
from sensmerge.tasks.methods.kernels.sparsify import (
    BINS,
    Drop,
    Rescaled,
    Trim,
    histogram_of,
    kept_elements,
    random_bits,
)
from tests.tasks.methods.pieces import sparse

CPU = torch.device("cpu")
MASK = (1 << 64) - 1
NUMEL = 100_000


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def splitmix64(state: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014) for a state that was already stepped."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_splitmix64_of_the_test_is_the_published_one() -> None:
    # First outputs for seed 1234567, from the reference implementation's test vector (Rosetta Code, Vigna).
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        found.append(splitmix64(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def bits(key: str, numel: int) -> torch.Tensor:
    """The random bits of the first elements as numbers from 0 to 1, float64."""
    return (random_bits(key, slice(0, numel), CPU).double() + 2**31) / 2**32


@pytest.mark.parametrize("key", ["", "0/math/model.layers.0.mlp.up_proj.weight", "seed/Ünïcode/x"])
@pytest.mark.parametrize("where", [slice(0, 1001), slice(BLOCK, BLOCK + 1000)])
def test_random_bits_are_the_halves_of_splitmix64_of_a_counter(key: str, where: slice) -> None:
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    found = random_bits(key, where, CPU)
    expected = []
    for i in range(where.start, where.stop):
        output = splitmix64((start + (i // 2 + 1) * 0x9E3779B97F4A7C15) & MASK)
        half = (output >> 32 if i % 2 else output) & 0xFFFFFFFF
        expected.append(half - (1 << 32) if half >> 31 else half)
    assert found.dtype == torch.int32
    assert found.tolist() == expected


def test_random_bits_are_uniform() -> None:
    numbers = bits("a", NUMEL)
    # Five standard errors of the mean and of each of 64 equal bins.
    assert abs(float(numbers.mean()) - 0.5) < 5 / math.sqrt(12 * NUMEL)
    bins = torch.histc(numbers, 64, 0, 1)
    assert (bins - NUMEL / 64).abs().max() < 5 * math.sqrt(NUMEL / 64)


def test_random_bits_are_uncorrelated_between_neighbours_and_keys() -> None:
    numbers, other = bits("0/math/x", NUMEL), bits("0/code/x", NUMEL)
    pairs = [(numbers, other), *((numbers[lag:], numbers[:-lag]) for lag in (1, 2, 64, 576))]
    for first, second in pairs:
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / math.sqrt(NUMEL)


def test_random_bits_depend_on_key_and_index_alone(threads: None) -> None:
    torch.set_num_threads(1)
    numbers = bits("a", NUMEL)
    torch.set_num_threads(4)
    assert torch.equal(bits("a", NUMEL), numbers)
    assert torch.equal(bits("a", 777), numbers[:777])
    assert not torch.equal(bits("b", NUMEL), numbers)


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.3, 0.9, 1 - 1e-9])
def test_drop_keeps_its_share(density: float) -> None:
    kept = float(sparse(torch.ones(NUMEL), Drop("key", density)).mean())
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / NUMEL)


def test_drop_keeps_values_as_they_are_and_is_nested() -> None:
    delta = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    thin, denser = sparse(delta, Drop("key", 0.3)), sparse(delta, Drop("key", 0.6))
    assert torch.equal(thin[thin != 0], delta[thin != 0])
    assert bool((denser[thin != 0] == delta[thin != 0]).all())
    # The index is that of the logical order, whatever the memory's.
    assert torch.equal(sparse(delta.T.contiguous().T, Drop("key", 0.3)), thin)


def test_rescaled_drop_is_unbiased() -> None:
    delta = torch.randn(400, generator=torch.Generator().manual_seed(0))
    density, draws = 0.3, 2000
    drops = [Drop(f"{i}/expert/tensor", density) for i in range(draws)]
    samples = torch.stack([sparse(delta, drop) for drop in drops])
    error = delta.abs().double() * math.sqrt(density * (1 - density) / draws)
    assert bool(((samples.double().mean(0) - density * delta).abs() <= 5 * error).all())
    zero = torch.zeros_like(delta)
    rescaled = torch.stack([sparse(delta, Rescaled.of(Whole(delta), zero, drop)) for drop in drops])
    torch.testing.assert_close(rescaled.abs().sum(1), delta.abs().sum().expand(draws))
    # A ratio of sums is unbiased up to a share of 1/(elements kept).
    bias = (rescaled.double().mean(0) - delta).abs()
    assert bool((bias <= 5 * error / density + delta.abs() * 2 / (density * len(delta))).all())


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """What TIES keeps of a task vector; a density that keeps all or nothing needs no threshold."""
    keep = kept_elements(delta.numel(), density)
    if keep in (0, delta.numel()):
        return delta if keep else torch.zeros_like(delta)
    flat = Whole(delta.reshape(-1))
    zero = torch.zeros(len(flat))
    return sparse(delta, Trim.of(flat, zero, kept_elements(len(flat), density), histogram_of(flat, zero)))


def full_sort_trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    order = delta.flatten().abs().sort(descending=True, stable=True).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[: kept_elements(delta.numel(), density)]] = True
    return torch.where(mask.view_as(delta), delta, torch.zeros_like(delta))


float32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-23, 1e-45, -1e-40, 2.0**-126, 3.0e38])
differences = st.sampled_from([torch.float16, torch.bfloat16])


@given(
    values=arrays("float32", st.integers(1, 60), elements=float32 | few_values),
    density=st.floats(0, 1),
)
def test_trim_is_a_full_sort(values: np.ndarray, density: float) -> None:
    delta = torch.from_numpy(values)
    found = trim(delta, density)
    assert torch.equal(found, full_sort_trim(delta, density))


@given(seed=st.integers(0, 1000), dtype=differences, density=st.floats(0, 1), scale=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_trim_of_differences_of_half_precision_weights(
    seed: int, dtype: torch.dtype, density: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(23, 29, generator=generator)
    expert = base + scale * torch.randn(23, 29, generator=generator)
    delta = expert.to(dtype).float() - base.to(dtype).float()
    found = trim(delta, density)
    assert torch.equal(found, full_sort_trim(delta, density))


def test_trim_breaks_ties_by_index() -> None:
    delta = torch.tensor([-1.0, 1.0, 2.0, 1.0, -1.0])
    trimmed = trim(delta, 0.6)
    assert trimmed.tolist() == [-1.0, 1.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.999])
def test_trim_of_several_chunks(dtype: torch.dtype, density: float) -> None:
    """With ties at the threshold in more than one chunk."""
    base, expert = (torch.randn(9 * BLOCK + 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    delta = (base + 0.01 * expert).to(dtype).float() - base.to(dtype).float()
    assert len(list(chunks(len(delta)))) > 2
    assert torch.equal(trim(delta, density), full_sort_trim(delta, density))


def test_trim_of_equal_magnitudes_in_several_chunks() -> None:
    delta = torch.where(torch.arange(5 * BLOCK) % 3 == 0, 0.5, -0.5)
    for density in (0.1, 0.4, 0.8, 0.9999):
        assert torch.equal(trim(delta, density), full_sort_trim(delta, density))


def test_trim_of_a_transposed_task_vector() -> None:
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    transposed = delta.T.contiguous().T
    assert torch.equal(trim(transposed, 0.3), full_sort_trim(delta, 0.3))


@given(values=arrays("float32", st.integers(0, 60), elements=float32 | few_values))
def test_histogram_counts_every_element_in_order_of_magnitude(values: np.ndarray) -> None:
    delta = torch.from_numpy(values)
    histogram = histogram_of(Whole(delta), torch.zeros_like(delta))
    assert histogram.shape == (BINS,)
    assert histogram.dtype == torch.int64
    assert int(histogram.sum()) == delta.numel()
    # Bin by bin in order of magnitude: the sorted elements, each in its own bin, fill the bins from the left.
    ordered = delta.abs().sort().values
    bins = [int(histogram_of(Whole(one.view(1)), torch.zeros(1)).argmax()) for one in ordered]
    assert torch.repeat_interleave(torch.arange(BINS), histogram).tolist() == bins


@pytest.mark.parametrize(
    ("numel", "density", "kept"),
    [(10, 0.0, 0), (10, 1.0, 10), (10, 0.05, 1), (10, 0.39, 3), (0, 0.5, 0), (1, 0.01, 1), (3, 2 / 3, 2)],
)
def test_kept_elements(numel: int, density: float, kept: int) -> None:
    assert kept_elements(numel, density) == kept
