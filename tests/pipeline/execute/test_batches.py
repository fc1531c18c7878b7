"""Work in batches on a real Ray cluster, with workers that die."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sensmerge.pipeline.execute.batches import BATCHES_AHEAD, Workers, work_in_batches
from sensmerge.pipeline.execute.cluster import cluster
from sensmerge.tasks.errors import StepError

pytestmark = pytest.mark.ray


def squares(marker: Path) -> Callable[[int], int]:
    """Load a worker that squares; batch 5 kills it the first time, as the kernel does when memory runs out."""

    def work(batch: int) -> int:
        if batch == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch**2

    return work


def killer() -> Callable[[int], int]:
    def work(batch: int) -> int:
        if batch == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    return work


def broken_model(calls: Path) -> Callable[[int], int]:
    with calls.open("a") as file:
        file.write("x")
    raise RuntimeError("broken on purpose")


def work(load: Callable[[], Callable[[int], int]], total: int, workers: int, address: str) -> list[int]:
    found: list[int] = []
    batches = iter(range(total))
    with cluster(address):
        work_in_batches(load, batches, total, found.append, Workers(workers, 0), Console(quiet=True))
    return found


def test_the_batch_of_a_worker_that_dies_is_done_again(tmp_path: Path, ray_address: str) -> None:
    found = work(partial(squares, tmp_path / "died"), 20, 2, ray_address)
    assert (tmp_path / "died").exists()
    assert found == [i**2 for i in range(20)]


def test_a_batch_that_keeps_killing_workers_stops_the_work(ray_address: str) -> None:
    with pytest.raises(StepError, match="a batch: its worker died 2 times"):
        work(killer, 8, 1, ray_address)


def test_an_exception_is_final(tmp_path: Path, ray_address: str) -> None:
    with pytest.raises(StepError, match=r"a batch failed: .*broken on purpose"):
        work(partial(broken_model, tmp_path / "calls"), 3, 1, ray_address)
    assert (tmp_path / "calls").read_text() == "x"


def test_few_batches_are_read_before_the_first_is_taken(tmp_path: Path, ray_address: str) -> None:
    taken, most = 0, 0

    def batches() -> Any:
        nonlocal most
        for number in range(60):
            most = max(most, number + 1 - taken)
            yield number

    def take(_: int) -> None:
        nonlocal taken
        taken += 1

    load = partial(squares, tmp_path)
    with cluster(ray_address):
        work_in_batches(load, batches(), 60, take, Workers(1, 0), Console(quiet=True))
    assert taken == 60
    assert most <= BATCHES_AHEAD
