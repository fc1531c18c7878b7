"""Inner products of vectors as files hold them: the same bits as those of their values, and close to numpy's."""

import numpy as np
import pytest
import torch

from sensmerge.tasks.methods.kernels.delta import BLOCK, Delta, Difference, Unchanged, Whole
from sensmerge.tasks.methods.kernels.products import inner_products

MODELS = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])
DIFFERENCES = MODELS * [0, 1, 1, 1]
WITH_BASE = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize("numel", [0, 1, 1025, BLOCK, 2 * BLOCK + 77])
@pytest.mark.parametrize("made_of", [MODELS, DIFFERENCES, WITH_BASE, MODELS[:2]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_stored_has_the_products_of_its_values(numel: int, made_of: np.ndarray, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(numel, generator=random).to(dtype) for _ in range(3))
    deltas: list[Delta] = [Difference(first), Difference(second), Unchanged(numel)]
    # An expert of another dtype is read by its values, and so are all.
    widened: list[Delta] = [Difference(first.float()), Difference(second.float()), Unchanged(numel)]
    found = inner_products(base, deltas, made_of)
    assert np.array_equal(found, inner_products(base, widened, made_of))
    values = np.stack([one.float().numpy() for one in (base, first - base, second - base, torch.zeros(numel))])
    if dtype == torch.float32:
        vectors = (made_of @ values).astype(np.float64)
        np.testing.assert_allclose(found, vectors @ vectors.T, rtol=1e-5, atol=1e-3)


def test_values_that_are_no_numbers_stay() -> None:
    base = torch.zeros(5, dtype=torch.bfloat16)
    expert = torch.tensor([1.0, torch.nan, 0, 0, 0], dtype=torch.bfloat16)
    found = inner_products(base, [Difference(expert), Difference(base)], np.array([[1.0, 1, 0], [1, 0, 1]]))
    assert np.isnan(found[0, 0])
    assert found[1, 1] == 0


def test_a_task_vector_that_no_file_holds() -> None:
    base, delta = torch.ones(7, dtype=torch.bfloat16), torch.arange(7.0)
    found = inner_products(base, [Whole(delta), Difference(base)], np.array([[0.0, 1, 0], [0, 0, 1]]))
    assert found.tolist() == [[91.0, 0], [0, 0]]
