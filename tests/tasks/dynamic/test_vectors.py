from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Sparse, Vector, compact, load_vectors, save_vectors
from sensmerge.tasks.errors import InputError

DTYPES = (torch.float32, torch.bfloat16)


def masked(shape: tuple[int, ...], density: float, seed: int = 0) -> torch.Tensor:
    """A random task vector, most of whose elements are zero."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return torch.randn(shape, generator=generator) * kept


@given(array_shapes(max_dims=4, max_side=9), st.floats(0, 1), st.integers(0, 1000), st.sampled_from(DTYPES))
def test_compact_keeps_every_element(shape: tuple[int, ...], density: float, seed: int, dtype: torch.dtype) -> None:
    delta = masked(shape, density, seed).to(dtype)
    vector = compact(delta, dtype)
    if vector is None:
        assert not delta.any()
        return
    assert vector.dense().dtype == dtype
    assert torch.equal(vector.dense(), delta)
    # The smaller of the two forms.
    nnz = int(delta.count_nonzero())
    packed = -(-delta.numel() // 8) + nnz * dtype.itemsize
    assert vector.nbytes == min(delta.numel() * dtype.itemsize, packed)
    assert isinstance(vector, Sparse) == (packed < delta.numel() * dtype.itemsize)


@given(array_shapes(max_dims=3, max_side=9), st.integers(0, 1000))
def test_mask_is_packed_from_the_lowest_bit(shape: tuple[int, ...], seed: int) -> None:
    delta = masked(shape, 0.3, seed).double()
    vector = compact(delta, torch.float64)
    if isinstance(vector, Sparse):
        bits = (delta != 0).numpy().ravel()
        assert vector.mask.numpy().tolist() == np.packbits(bits, bitorder="little").tolist()
        assert vector.values.tolist() == delta[delta != 0].tolist()
        assert vector.shape == shape


@given(
    st.integers(1, 12),
    st.integers(1, 20),
    st.floats(0, 1),
    st.lists(st.integers(0, 11), min_size=1),
    st.integers(0, 99),
)
def test_rows_are_those_of_the_whole(rows: int, columns: int, density: float, chosen: list[int], seed: int) -> None:
    delta = masked((rows, columns), density, seed)
    indices = torch.tensor([chosen]).remainder(rows)
    assert torch.equal(Dense(delta).rows(indices), delta[indices])
    vector = compact(delta, torch.float32)
    if isinstance(vector, Sparse):
        assert torch.equal(vector.rows(indices), delta[indices])


def test_zero_in_the_target_dtype_is_no_task_vector() -> None:
    assert compact(torch.zeros(3, 4), torch.float32) is None
    assert compact(torch.tensor([1e-10, -1e-10]), torch.float16) is None
    assert compact(torch.tensor(0.0), torch.float32) is None


def test_transposed_and_scalar_deltas() -> None:
    delta = masked((5, 9), 0.2).T
    sparse = compact(delta, torch.float32)
    assert isinstance(sparse, Sparse)
    assert torch.equal(sparse.dense(), delta)
    scalar = compact(torch.tensor(2.0), torch.float32)
    assert isinstance(scalar, Dense)
    assert scalar.dense() == 2


def test_low_rank_is_second_times_first() -> None:
    first, second = torch.randn(2, 5), torch.randn(3, 2)
    vector = LowRank(first, second)
    assert torch.allclose(vector.dense(), torch.einsum("rc,or->oc", first, second))
    assert vector.nbytes == 4 * (10 + 6)


def test_to_casts_values_and_not_the_mask() -> None:
    delta = masked((6, 7), 0.2)
    sparse = compact(delta, torch.float32)
    assert isinstance(sparse, Sparse)
    cast = sparse.to("cpu", torch.bfloat16)
    assert cast.mask.dtype == torch.uint8
    assert torch.equal(cast.dense(), delta.bfloat16())
    assert Dense(delta).to("cpu", torch.bfloat16).dense().dtype == torch.bfloat16
    assert LowRank(delta, delta.T).to("cpu", torch.float64).dense().dtype == torch.float64


def some_vectors(dtype: torch.dtype) -> dict[str, dict[str, Vector]]:
    sparse = compact(masked((7, 9), 0.1), dtype)
    assert isinstance(sparse, Sparse)
    factors = LowRank(torch.randn(2, 9, dtype=dtype), torch.randn(2, 7, dtype=dtype).T)
    return {
        "layer.0.weight": {"math": Dense(torch.randn(7, 9, dtype=dtype)), "code": sparse, "law.v2": factors},
        "bias": {"code": Dense(torch.randn(3, dtype=dtype))},
        "scale": {"math": Dense(torch.tensor(0.5, dtype=dtype))},
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_vectors_load_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    vectors = some_vectors(dtype)
    save_vectors(vectors, tmp_path / "vectors.safetensors")
    loaded = load_vectors(tmp_path / "vectors.safetensors")
    assert {tensor: set(found) for tensor, found in loaded.items()} == {
        tensor: set(found) for tensor, found in vectors.items()
    }
    for tensor, by_expert in vectors.items():
        for expert, vector in by_expert.items():
            found = loaded[tensor][expert]
            assert type(found) is type(vector)
            assert found.nbytes == vector.nbytes
            assert found.dense().dtype == dtype
            assert torch.equal(found.dense(), vector.dense())


def test_the_file_depends_on_the_vectors_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vectors = some_vectors(torch.float32)
    save_vectors(vectors, tmp_path / "one")
    other_order = {tensor: dict(reversed(by_expert.items())) for tensor, by_expert in reversed(vectors.items())}
    save_vectors(other_order, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.safetensors: not a readable file of task vectors"):
        load_vectors(tmp_path / "missing.safetensors")
    (tmp_path / "broken").write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="broken: not a readable file of task vectors"):
        load_vectors(tmp_path / "broken")
