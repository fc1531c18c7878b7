"""An expert's network run whole, block by block, or with its blocks on other workers: the same numbers each way.

What is done with a sample in a network in parts is a *journey*: a generator that yields one piece of work after the
other, each for the shell or for some blocks, and is sent what comes out of it. Streamed, all samples travel side by
side, and a block is loaded once for all of them on the way forward and once on the way back. Sharded, each sample
travels for itself, several at once, so that all actors are busy.
"""

import ctypes
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tasks.models.blocks import Batch, Part, Shell, Sums, TrunkOutput, blocks_of, to_device, trunk_output, watch
from tasks.models.networks import trunk_of
from tasks.models.placement import Actors, Placement
from tasks.models.products import GradientProducts
from tasks.models.source import Source

Result = TypeVar("Result")
SHELL = -1
"""The place of the shell; parts of the blocks are counted from 0."""
LARGE = 2**22
"""Bytes from which on a free piece of memory is given back to the system."""
_M_MMAP_THRESHOLD = -3  # of malloc.h
KEPT_FILE = 2**28
"""Bytes of hidden states in one file, but for larger ones."""


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


@contextmanager
def open_runner(source: Source, placement: Placement, scratch: Path) -> Iterator[Runner]:
    """Load a network, or have it loaded, and let go of it in the end.

    Args:
        source: where it comes from.
        placement: where it runs.
        scratch: folder of the step, on a disk: for hidden states, of which no file is left, and by its name nothing
            else runs at the same time.

    Raises:
        InputError: parameters are left without weights; a network whose blocks cannot be run apart.
    """
    if isinstance(placement, Actors):
        from tasks.models.streaming import ShardedRunner  # Ray takes seconds to import

        with ShardedRunner.open(source, placement, str(scratch)) as runner:
            yield runner
    elif placement == "streamed":
        with ThreadPoolExecutor(1) as loader:
            yield StreamedRunner(source, scratch, loader)
    else:
        yield WholeRunner(source)


class WholeRunner(Runner):
    """Memory: the network, one tensor's gradient, and the activations of one sample."""

    def __init__(self, source: Source) -> None:
        """Load the network."""
        self._source = source
        self._network = source.network()
        self._products = GradientProducts()
        watch(self._products, source, self._network, "")

    def sensitivities(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Sensitivity]]:
        """See `Runner`."""
        for number, batch in enumerate(batches):
            loss = self._network(**to_device(batch, self._source.device)).loss
            value = float(loss.detach())
            check(number, value)
            loss.backward()
            yield number, Sensitivity(value, self._products.take())

    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """See `Runner`."""
        with torch.no_grad():
            for number, batch in enumerate(batches):
                output = trunk_of(self._network)(**to_device(batch, self._source.device))
                yield number, trunk_output(output)


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


class StreamedRunner(PartsRunner):
    """One block at a time, for all samples; the next one is loaded meanwhile.

    Memory: the shell (embedding, final norm, head); two blocks and one tensor's gradient, which is less than a third;
    the activations of one sample in one block, or its logits in the head; and what the network gives its blocks beside
    the hidden states, of all samples (for Llama 2 × head size numbers a token). The hidden states themselves, those of
    all samples before all blocks, lie in files that are mapped into memory: tokens × width × (blocks + 1) numbers.
    """

    def __init__(self, source: Source, scratch: Path, loader: Executor) -> None:
        """Load the shell.

        Args:
            source: where the network comes from.
            scratch: folder for hidden states.
            loader: one thread, which reads the blocks.
        """
        _hold_no_free_memory()
        network = source.hollow()
        blocks = blocks_of(network)
        self._source = source
        self._shell = Shell(source, network, blocks)
        self._blocks = [{name: block} for name, block in blocks.items()]
        self._parts = [slice(number, number + 1) for number in range(len(blocks))]
        self._loader = loader
        self._loading: dict[int, Future[Part]] = {}
        self._scratch = scratch
        self._file = torch.empty(0, dtype=torch.uint8)

    def _travel(self, journeys: Sequence[Journey[Result]]) -> Iterator[tuple[int, Result]]:
        works = [next(journey) for journey in journeys]
        while works:
            # All samples take the same way, so all are in the same place.
            do = getattr(self._worker(works[0]), works[0].method)
            following = []
            for number, (journey, work) in enumerate(zip(journeys, works, strict=True)):
                try:
                    following.append(journey.send(do(*work.arguments)))
                except StopIteration as end:
                    yield number, end.value
            works = following
            del do  # with it goes the block, before another one is loaded

    def _worker(self, work: Work) -> Shell | Part:
        if work.place != SHELL:
            return self._part(work.place, work.place + (1 if work.method == "forward" else -1))
        if work.method == "backward":
            self._loading.clear()  # no block is needed any more
        return self._shell

    def _part(self, place: int, following: int) -> Part:
        """Return a block, and have the one that follows loaded if there is one."""
        loading = self._loading.get(place) or self._load(place)
        self._loading = {place: loading}  # the others are dropped before more is loaded
        part = loading.result()
        if 0 <= following < len(self._blocks):
            self._loading[following] = self._load(following)
        return part

    def _load(self, place: int) -> "Future[Part]":
        return self._loader.submit(Part, self._source, self._blocks[place])

    def _keep(self, hidden: Tensor) -> Tensor:
        """Copy hidden states to a mapped file, which takes disk rather than memory, and is gone when they are."""
        size = -(-hidden.nbytes // 64) * 64  # aligned
        if size > self._file.nbytes:
            with tempfile.NamedTemporaryFile(dir=self._scratch) as file:
                self._file = torch.from_file(file.name, shared=True, size=max(size, KEPT_FILE), dtype=torch.uint8)
        place, self._file = self._file[:size], self._file[size:]
        return place[: hidden.nbytes].view(hidden.dtype).view(hidden.shape).copy_(hidden)


def _hold_no_free_memory() -> None:
    """Have glibc, where it is the C library, give large pieces back to the system as soon as they are free.

    By itself it learns to keep pieces of up to 32 MiB, which are most weights of a block: several blocks in time.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, LARGE)
