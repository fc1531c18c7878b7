import pytest
import torch
from torch import nn

from sensmerge.tasks.statistics.fisher import Fisher


def test_squares_do_not_underflow() -> None:
    tiny = torch.full((3,), 1e-6, dtype=torch.float16)
    found = Fisher().of(tiny, tiny)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, tiny.float() ** 2)
    assert found.min() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_that_are_sparse(tied: bool) -> None:
    """A token that comes twice counts with the sum of its gradients; the total is dense."""
    totals = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(7, 4, padding_idx=0, sparse=sparse)
        total = Fisher().total()
        for ids in (torch.tensor([[3, 5, 3, 0]]), torch.tensor([[1, 3]])):
            embedding.zero_grad()
            hidden = embedding(ids)
            (hidden @ embedding.weight.T if tied else hidden).square().sum().backward()
            assert embedding.weight.grad is not None
            assert embedding.weight.grad.is_sparse == (sparse and not tied)
            total.add(embedding.weight.detach(), embedding.weight.grad)
        totals.append(total.stored())
    assert not totals[1].is_sparse
    assert totals[1].shape == (7, 4)
    torch.testing.assert_close(totals[1], totals[0])
