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

from sensmerge.tasks.networks.blocks import (
    Batch,
    Sums,
    TrunkOutput,
)

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
class Sensitivity:
    """What one sample says."""

    loss: float
    sums: Sums


Journey = Generator[Work, Any, Result]


Keep = Callable[[Tensor], Tensor]
"""Puts hidden states away until they are needed."""


Check = Callable[[int, float], None]
"""Called with the number of a sample and its loss as soon as it is known."""


def sensitivity_journey(
    batch: Batch, parts: Sequence[slice], keep: Keep, check: Callable[[float], None]
) -> Journey[Sensitivity]:
    """Return a sample's loss and Σ |p · ∂L/∂p| by layer. A piece of work counts once, however often it is tried.

    Args:
        batch: the sample, with labels.
        parts: the blocks of each part.
        keep: what becomes of hidden states between the way forward and the way back.
        check: called with the loss.
    """
    hidden, calls, learned = yield Work(SHELL, "enter", (batch,))
    states = [keep(hidden)]
    for place, blocks in enumerate(parts):
        hidden = yield Work(place, "forward", (states[-1], calls[blocks], learned))
        states.append(keep(hidden))
    end = states.pop()
    loss, gradient = yield Work(SHELL, "loss", (batch, end))
    check(loss)
    sums: Sums = {}
    gradients = [torch.zeros_like(one) for one in learned]
    for place, blocks in reversed(list(enumerate(parts))):
        work = Work(place, "backward", (states.pop(), calls[blocks], learned, keep(gradient)))
        gradient, found, more = yield work
        gradients = [one + other for one, other in zip(gradients, more, strict=True)]
        sums = _added(sums, found)
    found = yield Work(SHELL, "backward", (batch, end, keep(gradient), gradients))
    return Sensitivity(loss, _added(sums, found))


def _added(sums: Sums, others: Sums) -> Sums:
    return {layer: sums.get(layer, 0.0) + others.get(layer, 0.0) for layer in {**sums, **others}}


def trunk_journey(batch: Batch, parts: Sequence[slice], keep: Keep) -> Journey[TrunkOutput]:
    """Return what the trunk hands to the head; arguments as in `sensitivity_journey`."""
    hidden, calls, learned = yield Work(SHELL, "enter", (batch,))
    for place, blocks in enumerate(parts):
        hidden = yield Work(place, "forward", (keep(hidden), calls[blocks], learned))
    output: TrunkOutput = yield Work(SHELL, "trunk", (batch, hidden))
    return output


class Runner(ABC):
    """A network in some placement."""

    @abstractmethod
    def sensitivities(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Sensitivity]]:
        """Yield number and `Sensitivity` of every sample, in any order."""

    @abstractmethod
    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """Yield number and trunk output (`Shell.trunk`) of every sample, in any order."""


class PartsRunner(Runner):
    """A network in parts, on which journeys are made."""

    _parts: Sequence[slice]

    @abstractmethod
    def _travel(self, journeys: Sequence[Journey[Result]]) -> Iterator[tuple[int, Result]]:
        """Do the work of journeys and yield number and result of each that ends."""

    @abstractmethod
    def _keep(self, hidden: Tensor) -> Tensor:
        """Put hidden states away until they are needed."""

    def sensitivities(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Sensitivity]]:
        """See `Runner`."""
        return self._travel(
            [
                sensitivity_journey(batch, self._parts, self._keep, partial(check, number))
                for number, batch in enumerate(batches)
            ]
        )

    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """See `Runner`."""
        return self._travel([trunk_journey(batch, self._parts, self._keep) for batch in batches])
