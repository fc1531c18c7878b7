"""Which pieces of a plan's steps may be submitted to Ray: a bounded number of each stage at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING
from uuid import uuid4

import ray

from sensmerge.pipeline.execute.reads import Reads
from sensmerge.pipeline.execute.worker import Done, Spent, keep_if_read_from
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store.earlier import EarlierArtifacts
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.stages.job import Job

if TYPE_CHECKING:  # with transformers it takes seconds, which Ray's start does not wait for
    from sensmerge.pipeline.plan.step import Step


class Around(Enum):
    """Pieces that are not a part of a job."""

    CHECK = "check"
    """of what the step reads; before all others"""
    FINISH = "finish"
    """after all others"""


Piece = int | str | Around
"""A part of a job, by its name, or what comes before and after the parts."""


@dataclass
class Running:
    """A step under way: its pieces not submitted yet, and what the finished ones took."""

    step: Step
    job: ray.ObjectRef[Job]
    reads: ray.ObjectRef[Reads]
    waiting: deque[Piece]
    pending: int
    """pieces that have not ended, the last included"""
    checking: bool = False
    """what the step reads is being read through"""
    finishing: bool = False
    spent: Spent = field(default_factory=Spent)
    begun: float = field(default_factory=time.monotonic)
    apart: bool = False
    """whether nodes do not see each other's disks"""
    node: str | None = None
    """the one that has to do all pieces after the first then, since they leave files for each other on its disk"""
    nodes_lost: int = 0
    """how many nodes were at work on the step when they left"""

    @classmethod
    def begin(cls, run: str, step: Step, store: Store, plan: Sequence[Step], nodes_lost: int = 0) -> Running:
        """Look for what earlier runs left, and hand the job and what it reads to Ray, once for all its pieces."""
        job = prepared(step, store)
        pieces: list[Piece] = [*([Around.CHECK] if step.needs else []), *job.parts()]
        reads = ray.put(Reads.of(run, step, job, store, plan))
        return cls(step, ray.put(job), reads, deque(pieces), len(pieces) + 1, nodes_lost=nodes_lost)

    def take(self) -> Piece | None:
        """Return the piece that is next, or None while it has to wait for others."""
        if self.waiting and not self.checking:
            self.checking = self.waiting[0] is Around.CHECK
            return self.waiting.popleft()
        if self.pending == 1 and not self.finishing:
            self.finishing = True
            return Around.FINISH
        return None

    def __str__(self) -> str:
        """Say how far it is, and how long the rest may take where that can be told from what is done."""
        seconds = time.monotonic() - self.begun
        left, done = self.pending, self.spent.pieces
        rate = f", about {clock(seconds / done * left)} left" if self.spent.pieces_run == done > 0 else ""
        how_far = f"{done} of {done + left} pieces, " if done + left > 1 else ""
        return f"{self.step.title} ({how_far}{clock(seconds)}{rate})"

    def ended(self, piece: Piece, done: Done) -> None:
        """Record that a piece has ended."""
        self.pending -= 1
        self.checking = False
        if not isinstance(piece, Around):
            self.spent += done.spent


def clock(seconds: float) -> str:
    """Return a time as people read it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{rest} s"


def prepared(step: Step, store: Store) -> Job:
    """Return the job of a step that begins, with what it can take over, and its folder as it may go on from it.

    See `keep_if_read_from`.
    """
    job = step.job.resumed(EarlierArtifacts(store, step.key))
    keep_if_read_from(step.models, job, store.partial(step.key))
    return job


class Pieces:
    """Pieces that may be submitted: of steps whose needs are done, in the plan's order, within the stages' limits."""

    def __init__(
        self, steps: Sequence[Step], store: Store, limits: Mapping[Stage, int], plan: Sequence[Step] = ()
    ) -> None:
        """Begin with the steps to run; Ray is connected.

        Args:
            steps: in the plan's order; what they need beside each other is done.
            store: where earlier artifacts are.
            limits: how many pieces of each stage may be in flight.
            plan: all steps, those that are done included; none where these make nothing that is read.
        """
        self.run, self._plan = uuid4().hex, plan
        self._steps = {step.title: step for step in steps}
        self._store, self._limits = store, limits
        self._place = {title: place for place, title in enumerate(self._steps)}
        self._graph = TopologicalSorter({title: self._steps.keys() & step.needs for title, step in self._steps.items()})
        self._graph.prepare()
        self._ready: list[str] = []
        self._running: dict[str, Running] = {}
        self._in_flight: dict[Stage, int] = dict.fromkeys(limits, 0)

    def take(self) -> Iterator[tuple[Running, Piece]]:
        """Yield pieces that may be submitted now."""
        self._ready = sorted((*self._ready, *self._graph.get_ready()), key=self._place.__getitem__)
        for title in self._ready:
            if title not in self._running:
                self._running[title] = Running.begin(self.run, self._steps[title], self._store, self._plan)
            state, stage = self._running[title], self._steps[title].stage
            while self._in_flight[stage] < self._limits[stage] and (piece := state.take()) is not None:
                self._in_flight[stage] += 1
                yield state, piece

    def at_work(self) -> list[str]:
        """Return what is said of each step under way, those longest under way first."""
        return [str(state) for state in self._running.values()]

    def is_active(self) -> bool:
        """Return whether some step is not done."""
        return self._graph.is_active()

    def begin_again(self, state: Running, in_flight: int) -> None:
        """Have a step done from its start, since the node with what its pieces left is gone.

        Args:
            state: the step.
            in_flight: how many of its pieces have not ended; nobody waits for them any more.
        """
        self._in_flight[state.step.stage] -= in_flight
        begun = Running.begin(self.run, state.step, self._store, self._plan, state.nodes_lost + 1)
        self._running[state.step.title] = begun

    def piece_done(self, state: Running, piece: Piece, done: Done) -> None:
        """Record that a piece has ended."""
        self._in_flight[state.step.stage] -= 1
        state.ended(piece, done)
        if piece is Around.FINISH:
            self._ready.remove(state.step.title)
            del self._running[state.step.title]
            self._graph.done(state.step.title)
