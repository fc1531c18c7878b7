"""Random choice by rank, against ranks from a sort and the project's random bits."""

import math

import numpy as np
import pytest
import torch

from sensmerge.tasks.methods.contract import TaskVector
from sensmerge.tasks.methods.kernels import ranked
from sensmerge.tasks.methods.kernels.delta import Whole
from sensmerge.tasks.methods.kernels.ranked import Chosen, by_rank
from sensmerge.tasks.methods.kernels.sparsify import random_bits
from tests.tasks.methods.pieces import sparse

SHAPES = [(), (1,), (0,), (7,), (1000,), (5, 1), (3, 17), (64, 48), (0, 3), (3, 0), (5, 7, 3), (2, 3, 4, 5)]
SHARES = (0.2, 0.6)


def chosen(delta: torch.Tensor, key: str = "key") -> Chosen:
    given = TaskVector("expert", "tensor", Whole(delta.flatten()), 1.0, shape=tuple(delta.shape))
    return Chosen(by_rank(given, torch.zeros(delta.numel()), SHARES, key))


def expected(delta: torch.Tensor, key: str = "key") -> torch.Tensor:
    """Rank along the second dimension, or the only one, by a stable sort; compare with one random number each."""
    dim = 1 if delta.ndim > 1 else 0
    flat = delta.reshape(1) if delta.ndim == 0 else delta
    ranks = flat.abs().sort(dim=dim, stable=True).indices.argsort(dim)
    width = flat.shape[dim]
    shares = torch.linspace(*SHARES, width, dtype=torch.float64) if width > 1 else torch.tensor([sum(SHARES) / 2])
    bits = random_bits(key, slice(0, delta.numel()), torch.device("cpu")).long() & 0x7FFFFFFF
    kept = bits.view_as(flat) < (shares.double() * 2**31).round().long()[ranks]
    return (flat * kept).view_as(delta)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_choice_by_rank(shape: tuple[int, ...], coarse: bool) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    delta = delta.round() if coarse else delta
    assert torch.equal(sparse(delta, chosen(delta)), expected(delta))


@pytest.mark.parametrize("shape", [(5000,), (300, 41), (30, 9, 11)])
def test_how_many_rows_are_looked_at_changes_nothing(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first = chosen(delta).bits
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr(ranked, "CHUNK", size)
        assert np.array_equal(chosen(delta).bits, first)


def test_memory_is_a_bit_for_each_element() -> None:
    delta = torch.ones(33, 31)
    assert chosen(delta).bits.nbytes == math.ceil(33 * 31 / 8)
