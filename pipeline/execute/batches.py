"""Work in batches on Ray, by processes that each load something once; a dead one is replaced."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import ray
from rich.console import Console

from sensmerge.pipeline.execute.cluster import SYSTEM_RETRIES, answer_of, room_for
from sensmerge.pipeline.execute.progress import progress
from sensmerge.tasks.errors import InputError

Batch = TypeVar("Batch")
Answer = TypeVar("Answer")
BATCHES_AHEAD = 4
"""How many batches for each worker may be sent before the first of them is taken."""


@dataclass(frozen=True)
class Workers:
    """Processes that each load something once and then work on batch after batch, on one CPU and some GPUs."""

    count: int | None
    """how many; None for as many as the cluster has room for"""
    num_gpus: float
    """GPUs of each"""


class _Worker(Generic[Batch, Answer]):
    """Loads with its first batch, so that a worker started again loads again, and errors in it are as any others."""

    def __init__(self, load: Callable[[], Callable[[Batch], Answer]]) -> None:
        self._load = load

    @cached_property
    def _work(self) -> Callable[[Batch], Answer]:
        import torch

        torch.set_num_threads(1)  # of one CPU; and the number of threads decides how sums are rounded
        return self._load()

    def started(self) -> None:
        """Return as soon as Ray has found a place for this worker."""

    def work(self, batch: Batch) -> Answer:
        return self._work(batch)


def work_in_batches(
    load: Callable[[], Callable[[Batch], Answer]],
    batches: Iterator[Batch],
    total: int,
    take: Callable[[Answer], None],
    workers: Workers,
    console: Console,
) -> None:
    """Work on batches and take what comes out in their order. A batch whose worker died is done again.

    Ray is connected.

    Args:
        load: called once on each worker; what it returns is called with batches.
        batches: read as workers have room, so that few are in memory.
        total: number of batches.
        take: called here with the answer to each batch.
        workers: how many, and their GPUs.
        console: where progress goes.

    Raises:
        InputError: bad input that the work found, or more workers than the cluster has room for.
        StepError: the work failed otherwise, or a batch's worker died `SYSTEM_RETRIES` + 1 times.
    """
    with progress(console, total, "batches") as shown:
        count = min(_count(workers), total)
        # Workers are replaced without limit: what is counted is how often a batch is tried.
        options = {"num_gpus": workers.num_gpus, "max_restarts": -1, "max_task_retries": SYSTEM_RETRIES}
        actors = [ray.remote(_Worker).options(num_cpus=1, **options).remote(load) for _ in range(count)]
        # A worker gets batches once it has started: one that waits for its CPU must not hold any up.
        flying = {actor.started.remote(): (actor, -1) for actor in actors}
        idle: list[Any] = []
        answers: dict[int, Answer] = {}
        sent = 0
        for number in range(total):
            while number not in answers:
                while idle and sent < min(total, number + BATCHES_AHEAD * count):
                    actor = idle.pop()
                    flying[actor.work.remote(next(batches))] = (actor, sent)
                    sent += 1
                (ready, *_), _ = ray.wait(list(flying), num_returns=1)
                actor, place = flying.pop(ready)
                answer = answer_of(ready, "a batch", "use fewer --workers or a smaller --batch-size", ())
                idle.append(actor)
                if place >= 0:
                    answers[place] = answer
            take(answers.pop(number))
            shown.advance("batches" if (number + 1) * 10 // total > number * 10 // total else None)


def _count(workers: Workers) -> int:
    """Return how many workers are wanted. Refuses more than the cluster has room for: Ray would wait for ever."""
    gpus = workers.num_gpus
    if not (gpus <= 1 or gpus.is_integer()):
        raise InputError(f"--num-gpus: is {gpus:g}; above 1, Ray gives only whole GPUs")
    room = room_for({"CPU": 1} | ({"GPU": gpus} if gpus else {}))
    count = workers.count or room
    if not 0 < count <= room:
        raise InputError(
            f"--workers: the cluster has room for {room} workers with 1 CPU and {gpus:g} GPUs each, "
            f"{workers.count or 'one or more'} wanted; lower --workers or --num-gpus, or use another --address"
        )
    return count
