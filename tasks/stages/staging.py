"""Tensors on their way to a GPU and back: loaded one ahead, over pinned memory, beside what is computed.

The file system cannot write to a GPU. A plain copy to one goes by way of a buffer of CUDA's own, and nothing else
happens meanwhile. Here a thread reads what comes next from files into two pinned buffers in turn, of which one is
copied to the GPU while the other is filled. Results come back over two more, of which one is written while the other
gets the next. All of it runs on a CPU just as well, with copies that are waited for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from sensmerge.tasks.errors import InputError

BUFFER = 1 << 25
"""Bytes of a pinned buffer."""

Name = TypeVar("Name")
Loaded = TypeVar("Loaded")
Item = TypeVar("Item")


def one_ahead(load: Callable[[Name], Loaded], names: Sequence[Name]) -> Iterator[tuple[Name, Loaded]]:
    """Yield every name and what is loaded for it; a thread loads the next while the caller is busy with one.

    No more than two are in memory, if the caller lets go of one before it asks for the next. What `load` raises is
    raised when its turn comes.
    """
    with ThreadPoolExecutor(1, "load", torch.set_num_threads, (1,)) as thread:
        coming = thread.submit(load, names[0]) if names else None
        for number, name in enumerate(names):
            assert coming is not None
            loaded = coming.result()
            coming = thread.submit(load, names[number + 1]) if number + 1 < len(names) else None
            yield name, loaded


class Staging:
    """Copies tensors to a device (`sent`, in one thread) and results back (`returned`, in another)."""

    def __init__(self, device: str) -> None:
        """Prepare for a device, as the thread does in which tensors are computed with.

        Raises:
            InputError: torch has no GPU here.
        """
        self.device = torch.device(device)
        self._is_cuda = self.device.type == "cuda"
        if self._is_cuda and not torch.cuda.is_available():
            raise InputError(
                "resources.merge.num_gpus: torch finds no GPU on a worker; install torch for CUDA there, or leave "
                "it out"
            )
        self._computing = torch.cuda.current_stream(self.device) if self._is_cuda else None
        self._loading = torch.cuda.Stream(self.device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._out, self._back = _Buffers(self._is_cuda), _Buffers(self._is_cuda)

    def sent(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is on the device; it is all there, whatever stream it is used in."""
        flat, size = tensor.reshape(-1), BUFFER // tensor.dtype.itemsize
        with torch.cuda.stream(self._loading) if self._loading is not None else nullcontext():
            there = torch.empty(flat.shape, dtype=flat.dtype, device=self.device)
            for start in range(0, len(flat), size):
                piece = flat[start : start + size]
                buffer = self._out.next(piece)
                buffer.copy_(piece)
                there[start : start + size].copy_(buffer, non_blocking=True)
                self._out.mark()
        if self._loading is not None and self._computing is not None:
            self._loading.synchronize()
            there.record_stream(self._computing)  # its memory is not loaded into again while kernels still read it
        return there.view(tensor.shape)

    def returned(self, pieces: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        """Yield pieces of a flat tensor from the device, in CPU memory that the caller has until it asks for the next.

        The next piece is computed and copied while the caller is busy with one.
        """
        for where, buffer, wait in _one_behind(self._returning(pieces)):
            wait()
            yield where, buffer

    def _returning(self, pieces: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor, Callable[[], None]]]:
        """Begin to copy each piece back; yield what gets it, and what waits for it."""
        for where, values in pieces:
            buffer = self._back.next(values)
            buffer.copy_(values, non_blocking=True)
            yield where, buffer, self._back.mark()

    def release(self) -> None:
        """Leave the memory of a GPU to other processes."""
        if self._is_cuda:
            torch.cuda.empty_cache()


def _one_behind(found: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one has been found."""
    before: list[Item] = []
    for item in found:
        yield from before
        before = [item]
    yield from before


class _Buffers:
    """Two buffers that take turns, pinned for a GPU."""

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._waits: list[Callable[[], None]] = [_nothing] * 2
        self._turn = 0

    def next(self, like: Tensor) -> Tensor:
        """Return the buffer whose turn it is, once its last copy has ended: as long as a flat tensor, of its dtype."""
        self._turn = 1 - self._turn
        self._waits[self._turn]()
        size = len(like) * like.dtype.itemsize
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = torch.empty(max(size, BUFFER), dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._buffers[self._turn][:size].view(like.dtype)

    def mark(self) -> Callable[[], None]:
        """Note that a copy has begun of the buffer whose turn it is; return what waits for its end."""
        if self._is_pinned:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._waits[self._turn] = event.synchronize
        return self._waits[self._turn]


def _nothing() -> None:
    return None
