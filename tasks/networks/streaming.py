"""A network block by block on one worker."""

import ctypes
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from sensmerge.tasks.networks.blocks import Batch, Part, Shell, blocks_of
from sensmerge.tasks.networks.journeys import SHELL, Check, Journey, Measured, PartsRunner, Result, Work
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.states import StatesWriter, are_written, read_states
from sensmerge.tasks.networks.watching import Statistics, Sums, added, needs_gradients

LARGE = 2**22
"""Bytes from which on a free piece of memory is given back to the system."""


_M_MMAP_THRESHOLD = -3  # of malloc.h


KEPT_FILE = 2**28
"""Bytes of hidden states in one file, but for larger ones."""


STATES = "states"
"""Folder of hidden states behind a number of blocks, by that number; of tries that were interrupted."""


class StreamedRunner(PartsRunner):
    """One block at a time, for all samples; the next one is loaded meanwhile.

    Memory: the shell (embedding, final norm, head); two blocks and one tensor's gradient, which is less than a third;
    the totals of one block; the activations of one sample in one block, or its logits in the head; and what the network
    gives its blocks beside the hidden states, of all samples (for Llama 2 × head size numbers a token). The hidden
    states themselves, those of all samples before all blocks, lie in files that are mapped into memory: tokens × width
    × (blocks + 1) numbers.

    Where no statistic needs gradients, there is no way back: one block is loaded at a time, as it runs much longer than
    it is read, and of hidden states those before and behind it are kept. Weights that are stored as they are computed
    with stay in their files, mapped into memory. So what is left is the totals of one block, activations, and what is
    beside the hidden states; and the shell and one block where their dtype or form is another one.

    If all statistics are by tensor, too, a run that was interrupted goes on behind the last block that was finished:
    its totals and the hidden states behind it are on the disk. Sums by layer are in memory alone; with them it starts
    anew.
    """

    def __init__(self, source: Source, scratch: Path, loader: Executor, statistics: Statistics) -> None:
        """Load the shell.

        Args:
            source: where the network comes from.
            scratch: folder for hidden states and the totals of statistics by tensor.
            loader: one thread, which reads the blocks.
            statistics: what sees the samples, by name.
        """
        _hold_no_free_memory()
        network = source.hollow()
        blocks = blocks_of(network)
        self._source = source
        self._returns = not statistics or needs_gradients(statistics)
        self._shell = Shell(source, network, blocks, statistics, copied=self._returns)
        self._statistics = statistics
        self._blocks = [{name: block} for name, block in blocks.items()]
        self._parts = [slice(number, number + 1) for number in range(len(blocks))]
        self._loader = loader
        self._loading: dict[int, Future[Part]] = {}
        self._scratch = scratch
        self._file = torch.empty(0, dtype=torch.uint8)

    def run(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """See `Runner`."""
        if not self._returns:
            return self._go_forward(batches, check)
        start_anew(self._scratch, self._statistics)
        return super().run(batches, check)

    def _go_forward(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """Do what journeys without a way back do, with all that a later try needs to go on kept on the disk."""
        finished = self._finished_blocks()
        if finished is None:
            start_anew(self._scratch, self._statistics)
        entries, sums = [], list[Sums]({} for _ in batches)
        with nullcontext() if finished is not None else StatesWriter(self._states(0)) as writer:
            for batch in batches:
                entry = self._shell.enter(batch)
                if writer is not None:
                    writer.append(entry.hidden)
                entries.append(entry._replace(hidden=torch.empty(0)))
        for place in range(finished or 0, len(self._blocks)):
            part = Part(self._source, self._blocks[place], self._statistics, copied=False)
            with StatesWriter(self._states(place + 1)) as writer:
                for number, hidden in enumerate(read_states(self._states(place), self._source.device)):
                    calls, learned = entries[number].calls[self._parts[place]], entries[number].learned
                    behind, found = part.forward(hidden, calls, learned)
                    sums[number] = added(sums[number], found)
                    writer.append(behind)
                part.write(self._scratch)  # before the states count as written, and with them the block
            del part  # before another one is loaded
            self._states(place).unlink()
        for number, hidden in enumerate(read_states(self._states(len(self._blocks)), self._source.device)):
            loss, found = self._shell.end(batches[number], hidden)
            if loss is not None:
                check(number, loss)
            yield number, Measured(loss, added(sums[number], found))
        self._shell.write(self._scratch)
        shutil.rmtree(self._scratch / STATES)

    def _states(self, blocks: int) -> Path:
        """Return the file of the hidden states behind a number of blocks."""
        return self._scratch / STATES / f"{blocks}.bin"

    def _finished_blocks(self) -> int | None:
        """Return how many blocks an earlier try has finished whose states are here; None if there was none."""
        places = range(len(self._blocks), -1, -1) if is_resumable(self._statistics) else ()
        return next((one for one in places if are_written(self._states(one)) and self._states(one).exists()), None)

    def _travel(self, journeys: Sequence[Journey[Result]]) -> Iterator[tuple[int, Result]]:
        works = [next(journey) for journey in journeys]
        while works:
            # All samples take the same way, so all are in the same place.
            worker = self._worker(works[0])
            do = getattr(worker, works[0].method)
            following = []
            for number, (journey, work) in enumerate(zip(journeys, works, strict=True)):
                try:
                    following.append(journey.send(do(*work.arguments)))
                except StopIteration as end:
                    yield number, end.value
            works = following
            worker.write(self._scratch)
            del worker, do  # with them goes the block, before another one is loaded

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
        return self._loader.submit(Part, self._source, self._blocks[place], self._statistics)

    def _keep(self, hidden: Tensor) -> Tensor:
        """Copy hidden states to a mapped file, which takes disk rather than memory, and is gone when they are."""
        size = -(-hidden.nbytes // 64) * 64  # aligned
        if size > self._file.nbytes:
            with tempfile.NamedTemporaryFile(dir=self._scratch) as file:
                self._file = torch.from_file(file.name, shared=True, size=max(size, KEPT_FILE), dtype=torch.uint8)
        place, self._file = self._file[:size], self._file[size:]
        return place[: hidden.nbytes].view(hidden.dtype).view(hidden.shape).copy_(hidden)


def is_resumable(statistics: Statistics) -> bool:
    """Return whether a run with some statistics can go on behind the last block that was finished."""
    return all(one.hook == "inputs" and one.by == "tensor" for one in statistics.values())


def start_anew(scratch: Path, statistics: Statistics) -> None:
    """Remove what an earlier try has left in the folder of a step."""
    for name in (STATES, *statistics):
        shutil.rmtree(scratch / name, ignore_errors=True)


def _hold_no_free_memory() -> None:
    """Have glibc, where it is the C library, give large pieces back to the system as soon as they are free.

    By itself it learns to keep pieces of up to 32 MiB, which are most weights of a block: several blocks in time.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, LARGE)
