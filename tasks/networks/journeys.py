"""What is done with a sample in a network in parts.

A *journey* is a generator that yields one piece of work after the other, each for the shell or for some blocks, and is
sent what comes out of it. Streamed, all samples travel side by side, and a block is loaded once for all of them on the
way forward and once on the way back. Sharded, each sample travels for itself, several at once, so that all actors are
busy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sensmerge.tasks.networks.blocks import Batch, TrunkOutput
from sensmerge.tasks.networks.watching import Statistics, Sums, added, needs_gradients

Result = TypeVar("Result")


SHELL = -1
"""The place of the shell; parts of the blocks are counted from 0."""


@dataclass(frozen=True)
class Work:
    """A piece of work on one sample."""

    place: int
    """SHELL or the number of a part of the blocks"""
    method: str
    """of `Shell` or `Part`"""
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Measured:
    """What one sample says."""

    loss: float | None
    """None for a sample without labels"""
    sums: Sums
    """what it adds to statistics by layer"""


Journey = Generator[Work, Any, Result]


Keep = Callable[[Tensor], Tensor]
"""Puts hidden states away until they are needed."""


Check = Callable[[int, float], None]
"""Called with the number of a sample and its loss as soon as it is known, if it has one."""


def statistics_journey(
    batch: Batch, parts: Sequence[slice], keep: Keep, check: Callable[[float], None], backward: bool
) -> Journey[Measured]:
    """Have all statistics see a sample, and return its loss and what it adds to those by layer.

    A piece of work counts once, however often it is tried: what it adds is in its answer.

    Args:
        batch: the sample, with labels if gradients are needed.
        parts: the blocks of each part.
        keep: what becomes of hidden states between the way forward and the way back.
        check: called with the loss.
        backward: whether gradients are needed.
    """
    hidden, calls, learned = yield Work(SHELL, "enter", (batch,))
    states = [keep(hidden)]
    sums: Sums = {}
    for place, blocks in enumerate(parts):
        hidden, found = yield Work(place, "forward", (states[-1], calls[blocks], learned))
        states = [*(states if backward else ()), keep(hidden)]
        sums = added(sums, found)
    end = states.pop()
    if not backward:
        ending, found = yield Work(SHELL, "end", (batch, end))
        if ending is not None:
            check(ending)
        return Measured(ending, added(sums, found))
    loss, gradient, found = yield Work(SHELL, "loss", (batch, end))
    check(loss)
    sums = added(sums, found)
    gradients = [torch.zeros_like(one) for one in learned]
    for place, blocks in reversed(list(enumerate(parts))):
        work = Work(place, "backward", (states.pop(), calls[blocks], learned, keep(gradient)))
        gradient, found, more = yield work
        gradients = [one + other for one, other in zip(gradients, more, strict=True)]
        sums = added(sums, found)
    found = yield Work(SHELL, "backward", (batch, end, keep(gradient), gradients))
    return Measured(loss, added(sums, found))


def trunk_journey(batch: Batch, parts: Sequence[slice], keep: Keep) -> Journey[TrunkOutput]:
    """Return what the trunk hands to the head; arguments as in `statistics_journey`."""
    hidden, calls, learned = yield Work(SHELL, "enter", (batch,))
    for place, blocks in enumerate(parts):
        hidden, _ = yield Work(place, "forward", (keep(hidden), calls[blocks], learned))
    output: TrunkOutput = yield Work(SHELL, "trunk", (batch, hidden))
    return output


class Runner(ABC):
    """A network in some placement, watched by statistics."""

    @abstractmethod
    def run(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """Have all statistics see all samples, in one pass.

        What statistics by tensor add up is written to the runner's folder, in the order of the samples.

        Yields:
            Number and `Measured` of every sample, in any order; after a loss of totals again, with the same numbers.
        """

    @abstractmethod
    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """Yield number and trunk output (`Shell.trunk`) of every sample, in any order."""


class PartsRunner(Runner):
    """A network in parts, on which journeys are made."""

    _parts: Sequence[slice]
    _statistics: Statistics

    @abstractmethod
    def _travel(self, journeys: Sequence[Journey[Result]]) -> Iterator[tuple[int, Result]]:
        """Do the work of journeys and yield number and result of each that ends."""

    @abstractmethod
    def _keep(self, hidden: Tensor) -> Tensor:
        """Put hidden states away until they are needed."""

    def run(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """See `Runner`."""
        backward = needs_gradients(self._statistics)
        return self._travel(
            [
                statistics_journey(batch, self._parts, self._keep, partial(check, number), backward)
                for number, batch in enumerate(batches)
            ]
        )

    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """See `Runner`."""
        return self._travel([trunk_journey(batch, self._parts, self._keep) for batch in batches])
