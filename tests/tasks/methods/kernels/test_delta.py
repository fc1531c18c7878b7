import math

import pytest
import torch

from sensmerge.tasks.methods.kernels.delta import (
    BLOCK,
    CHUNK,
    GPU_CHUNK,
    Difference,
    Unchanged,
    Whole,
    block_sums,
    divide,
)


@pytest.mark.parametrize("numel", [1, 1023, BLOCK, 2 * BLOCK + 1500])
def test_sums_of_blocks_are_the_same_on_every_device(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(numel, generator=torch.Generator().manual_seed(0)).pow_(20)
    found = block_sums(values)
    assert math.fsum(found) == pytest.approx(float(values.double().sum()), rel=1e-6)
    # Blocks are added up by themselves, so it does not matter where a tensor is cut between them.
    cut = [total for piece in torch.split(values, BLOCK) for total in block_sums(piece)]
    assert cut == found
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    assert block_sums(values) == found


def test_sums_of_blocks_by_hand() -> None:
    assert math.fsum(block_sums(torch.arange(2000.0))) == 1999 * 1000
    assert CHUNK % BLOCK == GPU_CHUNK % BLOCK == 0


def test_division_rounds_once() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    expected = (values.double() / float(torch.tensor(1.2))).float()
    # Quotients of float32 numbers are never so close to the middle of two that rounding twice would matter.
    assert torch.equal(divide(values.clone(), 1.2), expected)
    assert not torch.equal(values * (1 / torch.tensor(1.2)), expected)


def test_task_vectors_move_with_their_tensors() -> None:
    values, moved = torch.randn(5), list[torch.Tensor]()

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return tensor.clone()

    piece, base = torch.empty(5), torch.zeros(5)
    for delta in (Difference(values), Whole(values), Unchanged(5)):
        delta.moved(move).fill(piece, slice(0, 5), base)
        assert torch.equal(piece, base if isinstance(delta, Unchanged) else values)
    assert [one is values for one in moved] == [True, True]
