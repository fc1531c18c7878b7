"""Executes plans and work in batches on Ray: bounded fan-out, resources, retries of system failures, progress."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray.util.metrics import Counter, Histogram
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sensmerge.pipeline.execute.stop import Stopped
from sensmerge.pipeline.execute.worker import Done, Spent, run_finish, run_part
from sensmerge.pipeline.recipe.schema import Stage
from sensmerge.pipeline.store.earlier import EarlierArtifacts
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.errors import InputError, StepError
from sensmerge.tasks.stages.job import Job

if TYPE_CHECKING:  # with transformers they take seconds, which Ray's start does not wait for
    from sensmerge.pipeline.plan.plan import Plan
    from sensmerge.pipeline.plan.steps import Step

Batch = TypeVar("Batch")
Answer = TypeVar("Answer")
SYSTEM_RETRIES = 1
"""How often a piece of work is tried again after its worker or node died. Exceptions of the work itself are final."""
# One remote function for all steps: Ray takes calls of one function in their order, those of several in any.
_RUN_PART, _RUN_FINISH = ray.remote(run_part), ray.remote(run_finish)
SECONDS_BOUNDS = [1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0]
"""Of the histogram of steps' times."""
TAGS = ("recipe", "stage")
"""Of Ray's metrics."""
BATCHES_AHEAD = 4
"""How many batches for each worker may be sent before the first of them is taken."""


@dataclass
class _Running:
    """A step under way: its pieces not submitted yet, and what the finished ones took."""

    step: Step
    job: ray.ObjectRef[Job]
    waiting: deque[int | str]
    pending: int
    spent: Spent = field(default_factory=Spent)

    @classmethod
    def begin(cls, step: Step, store: Store) -> _Running:
        """Look for what earlier runs left, and hand the job to Ray, once for all its pieces."""
        job = step.job.resumed(EarlierArtifacts(store, step.key))
        return cls(step, ray.put(job), deque(job.parts()), len(job.parts()) + 1)


@dataclass
class _Schedule:
    """Which steps are ready, and how much of each stage is in flight."""

    steps: list[Step]
    store: Store
    done: set[str]
    limits: Mapping[Stage, int]
    in_flight: dict[str, int] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)

    def take(self) -> Iterator[tuple[_Running, int | str | None]]:
        """Yield pieces that may be submitted now; None stands for a step's finish."""
        for step in self.steps:
            if step.title in self.done or not set(step.needs) <= self.done:
                continue
            if step.title not in self.running:
                self.running[step.title] = _Running.begin(step, self.store)
            state = self.running[step.title]
            while self._has_room(step.stage) and state.waiting:
                self._count(step.stage, 1)
                yield state, state.waiting.popleft()
            if self._has_room(step.stage) and state.pending == 1:
                self._count(step.stage, 1)
                state.pending = 0
                yield state, None

    def finished(self) -> bool:
        """Return whether all steps are done."""
        return all(step.title in self.done for step in self.steps)

    def piece_done(self, state: _Running, last: bool, done: Done) -> None:
        """Record that a piece has ended."""
        self._count(state.step.stage, -1)
        if last:
            self.done.add(state.step.title)
            return
        state.pending -= 1
        state.spent += done.spent

    def _has_room(self, stage: Stage) -> bool:
        return self.in_flight.get(stage, 0) < self.limits[stage]

    def _count(self, stage: str, change: int) -> None:
        self.in_flight[stage] = self.in_flight.get(stage, 0) + change


class StepMetrics:
    """`ray_sensmerge_steps_total`, `ray_sensmerge_bytes_total` and `ray_sensmerge_step_seconds`, by recipe and stage.

    Ray collects them every 10 seconds.
    """

    def __init__(self, recipe: str) -> None:
        """Begin to count; Ray is connected."""
        self._recipe = recipe
        self._steps = Counter("sensmerge_steps", "Steps that have ended well.", TAGS)
        self._bytes = Counter("sensmerge_bytes", "Bytes of their artifacts.", TAGS)
        self._seconds = Histogram("sensmerge_step_seconds", "Time of a step on the workers.", SECONDS_BOUNDS, TAGS)

    def count(self, step: Step, done: Done) -> None:
        """Count a step that has ended well."""
        tags = {"recipe": self._recipe, "stage": step.stage}
        self._steps.inc(1, tags)
        if done.bytes:
            self._bytes.inc(done.bytes, tags)
        self._seconds.observe(max(done.spent.seconds, 1e-3), tags)


def execute(plan: Plan, address: str | None, console: Console, count_steps: bool = False) -> None:
    """Run the steps that the store lacks.

    Args:
        plan: the plan.
        address: Ray cluster to use; None takes RAY_ADDRESS (as a Ray job has it) or starts Ray on this machine.
        console: where progress goes.
        count_steps: whether Ray's metrics count finished steps.

    Raises:
        InputError: bad input that a step found.
        StepError: a step failed otherwise, or its worker died `SYSTEM_RETRIES` + 1 times.
    """
    steps = [step for step in plan.steps if step.title in plan.todo]
    if not steps:
        return
    read = {title for step in steps for title in step.needs} - set(plan.todo)
    for step in plan.steps:
        if step.title in read:
            plan.store.fetch(step.key)
    plan.write_rows()
    with cluster(address), _progress(console, len(steps), "steps") as advance:
        _check_resources(plan, steps)
        metrics = StepMetrics(plan.recipe.name) if count_steps else None
        limits = {step.stage: plan.recipe.resources_of(step.stage).max_in_flight for step in steps}
        done = {step.title for step in plan.steps} - set(plan.todo)
        schedule = _Schedule(steps, plan.store, done, limits)
        flying: dict[ray.ObjectRef, tuple[_Running, bool]] = {}
        while not schedule.finished():
            for state, part in schedule.take():
                flying[_submit(plan, state, part)] = (state, part is None)
            (ready, *_), _ = ray.wait(list(flying), num_returns=1)
            state, last = flying.pop(ready)
            result = _result(ready, state.step.title, _advice(plan, state.step.stage), list(flying))
            schedule.piece_done(state, last, result)
            if last:
                advance(f"{plan.recipe.name}: {step_line(state.step, result)}")
                if metrics is not None:
                    metrics.count(state.step, result)


def step_line(step: Step, done: Done) -> str:
    """Return what is said of a finished step: its name and fingerprint, where it ran and what it took."""
    spent = done.spent
    text = (
        f"{step.title} ({step.key.fingerprint[:8]}) on {done.node}: {spent.seconds:.1f} s, "
        f"{decimal(done.bytes)}, {decimal(spent.peak_memory)} peak memory"
    )
    if spent.pieces_run < spent.pieces:
        text += f", {spent.pieces_run} of {spent.pieces} pieces, the others were done before"
    if done.result.get("taken_over"):
        size, whole = (decimal(done.result[key]) for key in ("taken_over_bytes", "tensor_bytes"))
        text += f", {done.result['taken_over']} of {done.result['tensors']} tensors taken over ({size} of {whole})"
    return text


def _advice(plan: Plan, stage: Stage) -> str:
    """Return what to do about a worker of a stage that runs out of memory."""
    fewer = f"raise resources.{stage}.num_cpus (fewer at once) or lower max_in_flight"
    if stage in plan.placements and plan.placements[stage].placement == "whole":
        return f"set placement: streamed, or {fewer}"
    return fewer


def _submit(plan: Plan, state: _Running, part: int | str | None) -> ray.ObjectRef[Done]:
    step = state.step
    resources = plan.recipe.resources_of(step.stage)
    threads = max(1, int(resources.num_cpus))
    options = {
        # A step with actors waits for them: what it held meanwhile they might lack.
        "num_cpus": 0 if step.actors else resources.num_cpus,
        "num_gpus": 0 if step.actors else resources.num_gpus,
        "max_retries": SYSTEM_RETRIES,
        "retry_exceptions": False,
        "name": step.title,
    }
    if part is not None:
        return _RUN_PART.options(**options).remote(state.job, part, plan.store.partial(step.key), threads)
    return _RUN_FINISH.options(**options).remote(state.job, plan.store, step.key, state.spent, threads)


def _result(ready: ray.ObjectRef[Any], title: str, advice: str, others: Iterable[ray.ObjectRef[Any]]) -> Any:
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        for other in others:
            ray.cancel(other)
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        if _is_out_of_memory(error.cause):
            raise StepError(f"{title}: its worker ran out of memory; {advice}. It says: {error.cause}") from None
        raise StepError(f"{title} failed: {error.cause!r}\n{error}") from None  # Ray's text has process and node
    except ray.exceptions.OutOfMemoryError as error:  # Ray's memory monitor killed the worker
        what = str(error).partition("\n")[0]
        raise StepError(
            f"{title}: its worker ran out of memory {SYSTEM_RETRIES + 1} times; {advice}. Ray says: {what}"
        ) from None
    except ray.exceptions.RayError as error:
        raise StepError(
            f"{title}: its worker died {SYSTEM_RETRIES + 1} times; if it ran out of memory, {advice}. Ray says: {error}"
        ) from None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception says that a CPU's or a GPU's memory is full."""
    import torch

    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


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
    address: str | None,
    console: Console,
) -> None:
    """Work on batches and take what comes out in their order. A batch whose worker died is done again.

    Args:
        load: called once on each worker; what it returns is called with batches.
        batches: read as workers have room, so that few are in memory.
        total: number of batches.
        take: called here with the answer to each batch.
        workers: how many, and their GPUs.
        address: as in `execute`.
        console: where progress goes.

    Raises:
        InputError: bad input that the work found, or more workers than the cluster has room for.
        StepError: the work failed otherwise, or a batch's worker died `SYSTEM_RETRIES` + 1 times.
    """
    with cluster(address), _progress(console, total, "batches") as advance:
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
                answer = _result(ready, "a batch", "use fewer --workers or a smaller --batch-size", ())
                idle.append(actor)
                if place >= 0:
                    answers[place] = answer
            take(answers.pop(number))
            advance("batches" if (number + 1) * 10 // total > number * 10 // total else None)


def _count(workers: Workers) -> int:
    """Return how many workers are wanted. Refuses more than the cluster has room for: Ray would wait for ever."""
    gpus = workers.num_gpus
    if not (gpus <= 1 or gpus.is_integer()):
        raise InputError(f"--num-gpus: is {gpus:g}; above 1, Ray gives only whole GPUs")
    room = _room(1, gpus)
    count = workers.count or room
    if not 0 < count <= room:
        raise InputError(
            f"--workers: the cluster has room for {room} workers with 1 CPU and {gpus:g} GPUs each, "
            f"{workers.count or 'one or more'} wanted; lower --workers or --num-gpus, or use another --address"
        )
    return count


def _room(cpus: float, gpus: float) -> int:
    """Return how many workers of so many CPUs and GPUs each the cluster has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else math.inf)) for node in nodes)


def _check_resources(plan: Plan, steps: list[Step]) -> None:
    """Refuse a recipe that asks for more than any node has: Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for step in steps:
        wanted = plan.recipe.resources_of(step.stage)
        room = _room(wanted.num_cpus, wanted.num_gpus)
        if step.actors > room:
            raise InputError(
                f"placement.actors is {step.actors}; the cluster has room for {room} with {wanted.num_cpus:g} CPUs and "
                f"{wanted.num_gpus:g} GPUs each (resources.{step.stage}); lower them or use another --address"
            )
    for stage in {step.stage for step in steps}:
        wanted = plan.recipe.resources_of(stage)
        if not any(node.get("CPU", 0) >= wanted.num_cpus and node.get("GPU", 0) >= wanted.num_gpus for node in nodes):
            largest = max(node.get("CPU", 0) for node in nodes), max(node.get("GPU", 0) for node in nodes)
            raise InputError(
                f"resources.{stage}: a step asks for {wanted.num_cpus:g} CPUs and {wanted.num_gpus:g} GPUs, "
                f"the largest node has {largest[0]:.0f} and {largest[1]:.0f}; lower them or use another --address"
            )


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one. It ends with the thread that does so.

    Args:
        address: of the cluster; None takes RAY_ADDRESS (as a Ray job has it) or starts Ray on this machine.

    Raises:
        InputError: no cluster answers.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Left to itself Ray tries a task that its memory monitor killed again without end.
    os.environ.setdefault("RAY_task_oom_retries", str(SYSTEM_RETRIES))
    here = {"include_dashboard": False} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level="ERROR", **here)
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers ({error}); start one with ray start --head"
        ) from error
    except SystemExit:  # of the handler that Ray has while it starts
        ray.shutdown()
        raise Stopped(signal.SIGTERM) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # in place of Ray's, which prints a stack and exits with status 15


@contextmanager
def closed() -> Iterator[None]:
    """Leave no connection behind when the block is left."""
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be connected to a cluster within the block; a connection that there is already is used, and closed too.

    Args:
        address: as in `connect`.

    Raises:
        InputError: no cluster answers.
    """
    with closed():
        if not ray.is_initialized():
            connect(address)
        yield


@contextmanager
def _progress(console: Console, total: int, what: str) -> Iterator[Callable[[str | None], None]]:
    """Show a bar of what is finished, and the lines said with it; without a terminal only the lines."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)
        finished = 0

        def advance(line: str | None) -> None:
            nonlocal finished
            finished += 1
            if line is not None:
                progress.console.print(f"[{finished}/{total}] {line}", highlight=False, markup=False, soft_wrap=True)
            progress.advance(bar)

        yield advance
