import pytest
import torch
from torch import nn

from sensmerge.tasks.statistics import sensitivity
from sensmerge.tasks.statistics.sensitivity import sum_of_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 31, 32, 1000])
def test_any_number_of_chunks(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "CPU_CHUNK", 32)
    parameter, gradient = torch.randn(2, size).to(dtype)
    expected = (parameter.double() * gradient.double()).abs().sum()
    assert float(sum_of_products(parameter, gradient)) == pytest.approx(float(expected), rel=1e-6)


def test_products_do_not_underflow() -> None:
    tiny = torch.full((3,), 1e-6, dtype=torch.float16)
    assert float(sum_of_products(tiny, tiny)) == pytest.approx(3 * float(tiny[0]) ** 2, rel=1e-6)


def test_a_transposed_gradient() -> None:
    parameter, gradient = torch.randn(3, 4), torch.randn(4, 3)
    assert float(sum_of_products(parameter, gradient.T)) == pytest.approx(float((parameter * gradient.T).abs().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gradient_that_is_sparse(dtype: torch.dtype, tied: bool) -> None:
    ids = torch.tensor([[3, 5, 3, 0]])
    totals = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(7, 4, padding_idx=0, sparse=sparse, dtype=dtype)
        hidden = embedding(ids)
        (hidden @ embedding.weight.T if tied else hidden).square().sum().backward()
        assert embedding.weight.grad is not None
        totals.append(float(sum_of_products(embedding.weight.detach(), embedding.weight.grad)))
    # Gradients are added up in the weights' dtype, in another order.
    assert totals[1] == pytest.approx(totals[0], rel=max(1e-6, torch.finfo(dtype).eps)) != 0.0
