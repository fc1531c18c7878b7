"""Which pieces of a plan's steps may be submitted to Ray: a bounded number of each stage at a time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING
from uuid import uuid4

import ray

from sensmerge.pipeline.execute.begun import begun
from sensmerge.pipeline.execute.nodes import alive
from sensmerge.pipeline.execute.reads import Reads
from sensmerge.pipeline.execute.united import bundles_of
from sensmerge.pipeline.execute.worker import Done, Spent, keep_if_read_from
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store.earlier import EarlierArtifacts
from sensmerge.pipeline.store.sent import Bundle, abandon, received
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.stages.job import Job

if TYPE_CHECKING:  # with transformers it takes seconds, which Ray's start does not wait for
    from sensmerge.pipeline.plan.step import Step


class Around(Enum):
    """Pieces that are not a part of a job."""

    CHECK = "check"
    """of what the step reads; before all others"""
    SEND = "send"
    """of the files of a bundle to the URL; after all others of the bundle"""
    FINISH = "finish"
    """after all others"""


AHEAD = 2
"""How many bundles a node is at work on at once: their files are on its disk until they are sent."""
Piece = int | str | Around
"""A part of a job, by its name, or what comes before and after the parts."""


@dataclass
class Strand:
    """Pieces that leave files for each other: where disks are apart, one node does all of them."""

    waiting: deque[Piece]
    """pieces not submitted yet, but for the last"""
    last: Around
    """comes after all others"""
    bundle: Bundle | None = None
    """of several, the one that the pieces make"""
    pending: int = 0
    """pieces that have not ended, the last included"""
    checking: bool = False
    """what the step reads is being read through"""
    ending: bool = False
    is_writing: bool = False
    """some piece that leaves files has been submitted"""
    spent: Spent = field(default_factory=Spent)
    node: str | None = None
    """the one that has to do all pieces after the first, where disks are apart"""
    nodes_lost: int = 0
    """how many nodes were at work on it when they left"""

    @classmethod
    def of(cls, pieces: Sequence[Piece], last: Around, bundle: Bundle | None = None, nodes_lost: int = 0) -> Strand:
        """Begin with all pieces."""
        return cls(deque(pieces), last, bundle, len(pieces) + 1, nodes_lost=nodes_lost)

    @property
    def is_begun(self) -> bool:
        """Whether some piece has been submitted."""
        return self.checking or self.ending or len(self.waiting) + 1 < self.pending or self.node is not None

    def take(self) -> Piece | None:
        """Return the piece that is next, or None while it has to wait for others."""
        if self.waiting and not self.checking:
            self.checking = self.waiting[0] is Around.CHECK
            self.is_writing = not self.checking
            return self.waiting.popleft()
        if self.pending == 1 and not self.ending:
            self.ending = True
            return self.last
        return None

    def ended(self, piece: Piece, done: Done) -> None:
        """Record that a piece has ended."""
        self.pending -= 1
        self.checking = False
        if not isinstance(piece, Around):
            self.spent += done.spent


@dataclass
class Running:
    """A step under way: its pieces not submitted yet, and what the finished ones took."""

    step: Step
    job: ray.ObjectRef[Job]
    reads: ray.ObjectRef[Reads]
    bundles: list[Strand]
    """where disks are apart, and the step's files can be made by several nodes"""
    last: Strand
    """the pieces after these, which are all of them if there are no bundles"""
    begun: float | None = None
    """when a worker was seen to have begun it; None while it waits for one"""
    apart: bool = False
    """whether nodes do not see each other's disks"""
    in_bundles: bool = False
    """whether these, some of which an earlier run may have sent, are all that is left to unite"""

    @classmethod
    def begin(
        cls, run: str, step: Step, store: Store, plan: Sequence[Step], apart: bool = False, nodes_lost: int = 0
    ) -> Running:
        """Look for what earlier runs left, and hand the job and what it reads to Ray, once for all its pieces."""
        job = prepared(step, store)
        reads = ray.put(Reads.of(run, step, job, store, plan))
        check: list[Piece] = [Around.CHECK] if step.needs else []
        bundles = bundles_of(job, step.models) if apart else []
        if len(bundles) < 2:
            last = Strand.of([*check, *job.parts()], Around.FINISH, nodes_lost=nodes_lost)
            return cls(step, ray.put(job), reads, [], last, apart=apart)
        abandon(store, step.key)
        there = received(store, step.key, bundles)
        left = [Strand.of([*check, *one.parts], Around.SEND, one) for one in bundles if one.number not in there]
        last = Strand.of([], Around.FINISH)
        last.spent = Spent(pieces=sum(len(one.parts) for one in bundles if one.number in there))
        return cls(step, ray.put(job), reads, left, last, apart=apart, in_bundles=True)

    @property
    def spent(self) -> Spent:
        """What the pieces that have ended took."""
        return sum((one.spent for one in self.bundles), self.last.spent)

    def nodes_of_files(self) -> list[str | None]:
        """Return the nodes that have files of bundles on their disks, each as often as it has one's."""
        return [one.node for one in self.bundles if one.is_writing and one.pending]

    def take(self, most: int, full: Collection[str | None] = ()) -> tuple[Strand, Piece] | None:
        """Return the piece that is next, or None while it has to wait for others.

        Args:
            most: how many bundles may be under way.
            full: nodes that have files of as many bundles as they may have.
        """
        under_way = sum(one.is_begun and one.pending > 0 for one in self.bundles)
        for strand in self.bundles:
            if not strand.is_begun:
                if under_way >= most:
                    continue  # others may have begun on nodes that are gone, and wait to be found out
                under_way += 1
            elif not strand.is_writing and strand.node in full:
                continue
            if (piece := strand.take()) is not None:
                return strand, piece
        if any(one.pending for one in self.bundles) or (piece := self.last.take()) is None:
            return None
        return self.last, piece

    def __str__(self) -> str:
        """Say how far it is, if it has begun, and how long the rest may take where what is done tells it."""
        seconds, spent = 0.0 if self.begun is None else time.monotonic() - self.begun, self.spent
        left, done = sum(one.pending for one in (*self.bundles, self.last)), spent.pieces
        rate = f", about {clock(seconds / done * left)} left" if spent.pieces_run == done > 0 else ""
        how_far = f"{done} of {done + left} pieces, " if done + left > 1 else ""
        return f"{self.step.title} ({how_far}{clock(seconds)}{rate})"


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
        self,
        steps: Sequence[Step],
        store: Store,
        limits: Mapping[Stage, int],
        plan: Sequence[Step] = (),
        are_apart: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin with the steps to run; Ray is connected.

        Args:
            steps: in the plan's order; what they need beside each other is done.
            store: where earlier artifacts are.
            limits: how many pieces of each stage may be in flight.
            plan: all steps, those that are done included; none where these make nothing that is read.
            are_apart: says whether nodes do not see each other's disks.
        """
        self._are_apart = are_apart
        self.run, self._plan = uuid4().hex, plan
        self._steps = {step.title: step for step in steps}
        self._store, self._limits = store, limits
        self._place = {title: place for place, title in enumerate(self._steps)}
        self._graph = TopologicalSorter({title: self._steps.keys() & step.needs for title, step in self._steps.items()})
        self._graph.prepare()
        self._ready: list[str] = []
        self._running: dict[str, Running] = {}
        self._in_flight: dict[Stage, int] = dict.fromkeys(limits, 0)

    def take(self) -> Iterator[tuple[Running, Strand, Piece]]:
        """Yield pieces that may be submitted now, each with the strand that it is of."""
        self._ready = sorted((*self._ready, *self._graph.get_ready()), key=self._place.__getitem__)
        for title in self._ready:
            if title not in self._running:
                step = self._steps[title]
                self._running[title] = Running.begin(self.run, step, self._store, self._plan, self._are_apart())
            state, stage = self._running[title], self._steps[title].stage
            most = AHEAD * len(alive()) if state.bundles else 0
            while self._in_flight[stage] < self._limits[stage]:
                taken = state.take(most, self._full())
                if taken is None:
                    break
                self._in_flight[stage] += 1
                yield state, *taken

    def _full(self) -> set[str | None]:
        """Return the nodes that have files of as many bundles on their disks as they may have, of all steps."""
        counts = Counter(node for state in self._running.values() for node in state.nodes_of_files())
        return {node for node, count in counts.items() if count >= AHEAD}

    def at_work(self) -> tuple[list[str], int]:
        """Return what is said of each step that a worker has begun, and the number of those that wait for one."""
        if any(state.begun is None for state in self._running.values()):
            self._see(begun(self.run))
        found = [str(state) for state in self._running.values() if state.begun is not None]
        return found, len(self._running) - len(found)

    def _see(self, titles: Set[str]) -> None:
        """Take the time of steps that are seen to have begun."""
        for title in titles & self._running.keys():
            if self._running[title].begun is None:
                self._running[title].begun = time.monotonic()

    def is_active(self) -> bool:
        """Return whether some step is not done."""
        return self._graph.is_active()

    def begin_again(self, state: Running, strand: Strand, in_flight: int) -> None:
        """Have a strand of a step done from its start, since the node with what its pieces left is gone.

        Args:
            state: the step.
            strand: of it.
            in_flight: how many of its pieces have not ended; nobody waits for them any more.
        """
        self._in_flight[state.step.stage] -= in_flight
        lost = strand.nodes_lost + 1
        if strand.bundle is None:
            again = Running.begin(self.run, state.step, self._store, self._plan, state.apart, lost)
            self._running[state.step.title] = again
        else:
            fresh = Strand.of([Around.CHECK, *strand.bundle.parts], Around.SEND, strand.bundle, lost)
            state.bundles[state.bundles.index(strand)] = fresh

    def piece_done(self, state: Running, strand: Strand, piece: Piece, done: Done) -> None:
        """Record that a piece has ended."""
        self._in_flight[state.step.stage] -= 1
        strand.ended(piece, done)
        if piece is Around.CHECK and state.apart:
            strand.node = done.node_id
        if piece is Around.FINISH:
            self._ready.remove(state.step.title)
            del self._running[state.step.title]
            self._graph.done(state.step.title)
