import threading
from collections.abc import Iterator
from weakref import WeakSet

import pytest
import torch

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages import staging as module
from sensmerge.tasks.stages.staging import Staging, one_ahead

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_one_is_loaded_ahead_and_no_more() -> None:
    started, allowed = [], threading.Semaphore(2)

    def load(number: int) -> int:
        assert allowed.acquire(timeout=10)
        started.append(number)
        return 10 * number

    found = []
    for name, loaded in one_ahead(load, range(4)):
        found.append((name, loaded))
        while len(started) < min(4, name + 2):  # the next is loaded while this one is worked on
            pass
        assert started == list(range(min(4, name + 2)))
        allowed.release()
    assert found == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert list(one_ahead(load, [])) == []


def test_no_more_than_two_are_in_memory() -> None:
    alive, counts = WeakSet[torch.Tensor](), list[int]()

    def load(number: int) -> torch.Tensor:
        loaded = torch.full((3,), number)
        alive.add(loaded)
        counts.append(len(alive))
        return loaded

    for number, loaded in one_ahead(load, range(9)):
        assert loaded.tolist() == [number] * 3
        while len(counts) < min(9, number + 2):  # busy until the next is loaded
            pass
        del loaded  # else it would still be there as the next but one is loaded
    assert counts == [1] + [2] * 8


def test_what_a_load_raises_comes_in_its_turn() -> None:
    def load(number: int) -> int:
        if number == 1:
            raise InputError("tensor 1 is bad")
        return number

    found = one_ahead(load, range(3))
    assert next(found) == (0, 0)
    with pytest.raises(InputError, match="tensor 1 is bad"):
        next(found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_arrive_and_return(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER", 1024)  # many turns of the buffers
    staging = Staging(device)
    tensors = [torch.randn(rows, 37, dtype=torch.float64).to(dtype) for rows in (100, 1, 0, 64)]
    there = [staging.sent(tensor) for tensor in tensors]
    assert {tensor.device.type for tensor in there} == {device}
    for tensor, sent in zip(tensors, there, strict=True):
        places = [slice(start, start + 300) for start in range(0, sent.numel(), 300)]
        back = torch.full((tensor.numel(),), torch.nan, dtype=dtype)
        for where, piece in staging.returned((place, sent.view(-1)[place]) for place in places):
            assert piece.device.type == "cpu"
            back[where] = piece
        assert torch.equal(back, tensor.view(-1))


def test_the_next_piece_is_under_way_while_one_is_written() -> None:
    computed = []

    def pieces() -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(3):
            computed.append(start)
            yield slice(start, start + 1), torch.full((1,), float(start))

    for where, piece in Staging("cpu").returned(pieces()):
        assert computed == list(range(min(3, where.start + 2)))
        assert piece.item() == where.start


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_on_a_worker() -> None:
    with pytest.raises(InputError, match=r"resources\.merge\.num_gpus: torch finds no GPU .* or leave it out"):
        Staging("cuda")
