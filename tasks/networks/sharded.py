"""A network with its blocks on Ray actors: activations and gradients travel, and several samples are under way at once.

This process has no weights; it sends each piece of work to the actor that owns the blocks, and keeps what comes back.
So an actor that dies takes nothing with it but totals of statistics by tensor: it is replaced, and what it was at work
on is sent again, or everything where it had totals.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from uuid import uuid4

import ray
import torch
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from sensmerge.tasks.checkpoints.held import held
from sensmerge.tasks.checkpoints.listing import UrlModel
from sensmerge.tasks.networks.blocks import Batch, Part, Shell, blocks_of, to_device
from sensmerge.tasks.networks.journeys import SHELL, Check, Journey, Measured, PartsRunner, Work
from sensmerge.tasks.networks.placement import Actors, shares
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.watching import Statistics, holds_totals

Result = TypeVar("Result")
SAMPLES_PER_ACTOR = 3
"""How many samples for each actor are under way at once, so that it has work while others have theirs."""
SENT_AHEAD = 2
"""How many pieces of work an actor has at once: the next one travels while it is busy."""
MAX_TRIES = 2
"""How often a piece of work is tried before the run stops."""


class ShardedRunner(PartsRunner):
    """A range of blocks on each actor, the shell with the first. Actors keep weights, and totals of statistics.

    Every actor gets the samples in their order, for each method of its own: what is sent first is taken first, on every
    stretch of the way. If an actor with totals dies, all samples set out again.

    Memory of an actor: its weights, one tensor's gradient, the activations of one sample in its blocks, and the totals
    of statistics by tensor. This process holds the hidden states between actors, of `SAMPLES_PER_ACTOR` samples for
    each actor.
    """

    def __init__(self, source: Source, actors: Actors, group: Any, scratch: Path, statistics: Statistics) -> None:
        """Start the actors; see `open`.

        Args:
            source: see there.
            actors: see there.
            group: placement group with a bundle for each.
            scratch: see there.
            statistics: see there.
        """
        self._scratch, self._statistics = scratch, statistics
        network = source.hollow()
        sizes = [sum(one.numel() for one in block.parameters()) for block in blocks_of(network).values()]
        assert actors.count <= len(sizes), f"{actors.count} actors for {len(sizes)} blocks"
        self._parts = shares(network.num_parameters() - sum(sizes), sizes, actors.count)
        self._lanes = [
            _Lane(Owned(source, part, place == 0, statistics), actors, group, place)
            for place, part in enumerate(self._parts)
        ]

    @classmethod
    @contextmanager
    def open(cls, source: Source, actors: Actors, scratch: Path, statistics: Statistics) -> "Iterator[ShardedRunner]":
        """Reserve a place for all actors together and start them; stop them in the end.

        Args:
            source: where the network comes from.
            actors: how many, and what each needs.
            scratch: folder for totals; it names the placement group, of which one that an earlier try left behind is
                removed.
            statistics: what sees the samples, by name.
        """
        name = str(scratch)
        with suppress(ValueError):  # there is none
            remove_placement_group(get_placement_group(name))
        bundle = {"CPU": actors.num_cpus, **({"GPU": actors.num_gpus} if actors.num_gpus else {}), **actors.custom}
        group = placement_group([bundle] * actors.count, name=name)
        try:
            ray.get(group.ready())
            yield cls(source, actors, group, scratch, statistics)
        finally:
            remove_placement_group(group)  # ends the actors in it

    def _keep(self, hidden: Tensor) -> Tensor:
        return hidden

    def run(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """See `Runner`."""
        for tries in range(1, MAX_TRIES + 1):
            try:
                yield from super().run(batches, check)
                for lane in self._lanes:
                    lane.write(self._scratch)
                return
            except _TotalsLost as lost:
                if tries == MAX_TRIES:
                    raise RuntimeError(str(lost)) from lost
                for lane in self._lanes:
                    lane.restart()

    def _travel(self, journeys: Sequence[Journey[Result]]) -> Iterator[tuple[int, Result]]:
        waiting = deque(enumerate(journeys))
        travelling = 0
        while waiting or travelling:
            while waiting and travelling < SAMPLES_PER_ACTOR * len(self._lanes):
                number, journey = waiting.popleft()
                self._lane(next(journey), number)
                travelling += 1
            for lane in self._lanes:
                lane.send()
            oldest = {next(iter(lane.sent)): lane for lane in self._lanes if lane.sent}
            (ready, *_), _ = ray.wait(list(oldest), num_returns=1)
            done = oldest[ready].receive()
            if done is None:
                continue
            number, answer = done
            try:
                self._lane(journeys[number].send(answer), number)
            except StopIteration as end:
                travelling -= 1
                yield number, end.value

    def _lane(self, work: Work, number: int) -> None:
        """Queue a piece of work of a sample at the actor that has its place."""
        heappush(self._lanes[max(work.place, 0)].queue, _Piece(number, work))


class _TotalsLost(Exception):
    """An actor died, and with it what statistics had added up."""


@dataclass(frozen=True)
class Owned:
    """What an actor owns."""

    source: Source
    """where the network comes from"""
    blocks: slice
    """which are its own"""
    has_shell: bool
    statistics: Statistics
    """what sees the samples, by name"""


@dataclass(order=True)
class _Piece:
    """Samples that set out first go first: they are nearest to their end, where they take no more memory."""

    number: int
    work: Work = field(compare=False)
    failures: int = field(default=0, compare=False)


class _Lane:
    """One actor, the work it has, and the work it will get."""

    def __init__(self, owned: Owned, actors: Actors, group: Any, place: int) -> None:
        self._owned, self._actors, self._group, self._place = owned, actors, group, place
        self.queue: list[_Piece] = []
        self.sent: dict[Any, _Piece] = {}
        self._start()

    def _start(self) -> None:
        options = {
            "num_cpus": self._actors.num_cpus,
            "num_gpus": self._actors.num_gpus,
            "resources": dict(self._actors.custom),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, self._place),
        }
        threads = max(1, int(self._actors.num_cpus))
        actor = ray.remote(BlockOwner).options(**options)
        self._actor = actor.remote(self._owned, threads)

    def restart(self) -> None:
        """Start over with nothing to do and nothing added up."""
        ray.kill(self._actor)
        self.queue.clear()
        self.sent.clear()
        self._start()

    def write(self, folder: Path) -> None:
        """Have what statistics have added up written to a folder, which the actor's machine need not see."""
        if holds_totals(self._owned.statistics):
            mark = folder / f".seen-{uuid4().hex}"
            mark.touch()
            try:
                for sent in self._actor.write.options(num_returns="streaming").remote(folder, mark):
                    name, content = ray.get(sent)
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(content)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise _TotalsLost(f"{self._owned.source.key}: {self._blocks}: its actor died: {error}") from error
            finally:
                mark.unlink()

    @property
    def _blocks(self) -> str:
        return f"blocks {self._owned.blocks.start} to {self._owned.blocks.stop - 1}"

    def send(self) -> None:
        """Let the actor have as much work as it may have at once."""
        while self.queue and len(self.sent) < SENT_AHEAD:
            piece = heappop(self.queue)
            work = piece.work
            self.sent[self._actor.work.remote(work.place == SHELL, work.method, work.arguments)] = piece

    def receive(self) -> tuple[int, Any] | None:
        """Return what came out of the oldest piece of work, with its sample; None if it must be done again.

        An actor works in the order of sending: if it died, then at the oldest piece whose answer is not there.

        Raises:
            InputError: bad input that the actor found.
            RuntimeError: the actors that had the same piece of work died `MAX_TRIES` times.
        """
        reference, piece = next(iter(self.sent.items()))
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            self._replace(error)
            return None
        del self.sent[reference]
        return piece.number, answer

    def _replace(self, error: Exception) -> None:
        if holds_totals(self._owned.statistics):
            raise _TotalsLost(
                f"{self._owned.source.key}: the actor of {self._blocks} died, again after all samples had set out "
                f"{MAX_TRIES} times; if it ran out of memory, raise placement.actors or set placement: streamed. "
                f"Ray says: {error}"
            ) from error
        ray.kill(self._actor)
        at_work, *others = self.sent.values()
        at_work.failures += 1
        if at_work.failures == MAX_TRIES:
            where = "the shell" if at_work.work.place == SHELL else self._blocks
            raise RuntimeError(
                f"{self._owned.source.key}: {at_work.work.method} of {where} on sample {at_work.number}: its actor "
                f"died {MAX_TRIES} times; if it ran out of memory, raise placement.actors or set placement: streamed. "
                f"Ray says: {error}"
            ) from error
        for piece in (at_work, *others):
            heappush(self.queue, piece)
        self.sent.clear()
        self._start()


class BlockOwner:
    """A Ray actor: a range of blocks, and the shell if it is the first."""

    def __init__(self, owned: Owned, threads: int) -> None:
        """Load nothing yet, so that errors of loading are as any others.

        Args:
            owned: what is its own.
            threads: how many torch may use.
        """
        torch.set_num_threads(threads)
        self._owned = owned
        listings = () if owned.source.models is None else owned.source.models.listings
        models = [one.folder for one in listings if isinstance(one.source, UrlModel)]
        self._held = ExitStack()
        self._held.enter_context(held(models))  # as long as the actor lives

    @cached_property
    def _loaded(self) -> tuple[Part, Shell | None]:
        source, statistics = self._owned.source, self._owned.statistics
        network = source.hollow()
        blocks = blocks_of(network)
        part = Part(source, dict(list(blocks.items())[self._owned.blocks]), statistics)
        return part, Shell(source, network, blocks, statistics) if self._owned.has_shell else None

    def write(self, folder: Path, mark: Path) -> Iterator[tuple[str, bytes]]:
        """Write what statistics have added up.

        Args:
            folder: where to.
            mark: a file; if it is not there, this machine does not see that folder.

        Yields:
            In that case name in the folder, and content, of every file.
        """
        if mark.exists():
            self._write(folder)
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as own:  # where there is room for artifacts
            self._write(Path(own))
            for path in [path for path in Path(own).rglob("*") if path.is_file()]:
                yield path.relative_to(own).as_posix(), path.read_bytes()

    def _write(self, folder: Path) -> None:
        for one in self._loaded:
            if one is not None:
                one.write(folder)

    def work(self, in_shell: bool, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the shell or of the blocks; tensors in what it returns are on the CPU, to travel."""
        part, shell = self._loaded
        return to_device(getattr(shell if in_shell else part, method)(*arguments), "cpu")
