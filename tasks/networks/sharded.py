"""A network with its blocks on Ray actors: activations and gradients travel, and several samples are under way at once.

This process has no weights; it sends each piece of work to the actor that owns the blocks, and keeps what comes back.
So an actor that dies takes nothing with it: it is replaced, and what it was at work on is sent again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from typing import Any, TypeVar

import ray
import torch
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from sensmerge.tasks.networks.blocks import Part, Shell, blocks_of, to_device
from sensmerge.tasks.networks.journeys import SHELL, Journey, PartsRunner, Work
from sensmerge.tasks.networks.placement import Actors, shares
from sensmerge.tasks.networks.source import Source

Result = TypeVar("Result")
SAMPLES_PER_ACTOR = 3
"""How many samples for each actor are under way at once, so that it has work while others have theirs."""
SENT_AHEAD = 2
"""How many pieces of work an actor has at once: the next one travels while it is busy."""
MAX_TRIES = 2
"""How often a piece of work is tried before the run stops."""


class ShardedRunner(PartsRunner):
    """A range of blocks on each actor, the shell with the first. Actors keep nothing but weights.

    Memory of an actor: its weights, one tensor's gradient, and the activations of one sample in its blocks. This
    process holds the hidden states between actors, of `SAMPLES_PER_ACTOR` samples for each actor.
    """

    def __init__(self, source: Source, actors: Actors, group: Any) -> None:
        """Start the actors.

        Args:
            source: where the network comes from.
            actors: how many, and what each needs.
            group: placement group with a bundle for each.
        """
        network = source.hollow()
        sizes = [sum(one.numel() for one in block.parameters()) for block in blocks_of(network).values()]
        assert actors.count <= len(sizes), f"{actors.count} actors for {len(sizes)} blocks"
        self._parts = shares(network.num_parameters() - sum(sizes), sizes, actors.count)
        self._lanes = [_Lane(source, actors, group, place, part) for place, part in enumerate(self._parts)]

    @classmethod
    @contextmanager
    def open(cls, source: Source, actors: Actors, name: str) -> "Iterator[ShardedRunner]":
        """Reserve a place for all actors together and start them; stop them in the end.

        Args:
            source: where the network comes from.
            actors: how many, and what each needs.
            name: of the placement group; one that an earlier try left behind is removed.
        """
        with suppress(ValueError):  # there is none
            remove_placement_group(get_placement_group(name))
        bundle = {"CPU": actors.num_cpus} | ({"GPU": actors.num_gpus} if actors.num_gpus else {})
        group = placement_group([bundle] * actors.count, name=name)
        try:
            ray.get(group.ready())
            yield cls(source, actors, group)
        finally:
            remove_placement_group(group)  # ends the actors in it

    def _keep(self, hidden: Tensor) -> Tensor:
        return hidden

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


@dataclass(order=True)
class _Piece:
    """Samples that set out first go first: they are nearest to their end, where they take no more memory."""

    number: int
    work: Work = field(compare=False)
    failures: int = field(default=0, compare=False)


class _Lane:
    """One actor, the work it has, and the work it will get."""

    def __init__(self, source: Source, actors: Actors, group: Any, place: int, blocks: slice) -> None:
        self._source, self._actors, self._group, self._place, self._blocks = source, actors, group, place, blocks
        self.queue: list[_Piece] = []
        self.sent: dict[Any, _Piece] = {}
        self._start()

    def _start(self) -> None:
        options = {
            "num_cpus": self._actors.num_cpus,
            "num_gpus": self._actors.num_gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, self._place),
        }
        threads = max(1, int(self._actors.num_cpus))
        actor = ray.remote(BlockOwner).options(**options)
        self._actor = actor.remote(self._source, self._blocks, self._place == 0, threads)

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
        ray.kill(self._actor)
        at_work, *others = self.sent.values()
        at_work.failures += 1
        if at_work.failures == MAX_TRIES:
            blocks = f"blocks {self._blocks.start} to {self._blocks.stop - 1}"
            where = "the shell" if at_work.work.place == SHELL else blocks
            raise RuntimeError(
                f"{self._source.key}: {at_work.work.method} of {where} on sample {at_work.number}: its actor died "
                f"{MAX_TRIES} times; if it ran out of memory, raise placement.actors or set placement: streamed. "
                f"Ray says: {error}"
            ) from error
        for piece in (at_work, *others):
            heappush(self.queue, piece)
        self.sent.clear()
        self._start()


class BlockOwner:
    """A Ray actor: a range of blocks, and the shell if it is the first."""

    def __init__(self, source: Source, blocks: slice, has_shell: bool, threads: int) -> None:
        """Load nothing yet, so that errors of loading are as any others.

        Args:
            source: where the network comes from.
            blocks: which are its own.
            has_shell: whether it has the shell.
            threads: how many torch may use.
        """
        torch.set_num_threads(threads)
        self._source, self._range, self._has_shell = source, blocks, has_shell

    @cached_property
    def _loaded(self) -> tuple[Part, Shell | None]:
        network = self._source.hollow()
        blocks = blocks_of(network)
        own = dict(list(blocks.items())[self._range])
        part = Part(self._source, own)
        return part, Shell(self._source, network, blocks) if self._has_shell else None

    def work(self, in_shell: bool, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the shell or of the blocks; tensors in what it returns are on the CPU, to travel."""
        part, shell = self._loaded
        return to_device(getattr(shell if in_shell else part, method)(*arguments), "cpu")
