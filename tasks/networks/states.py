"""Hidden states between two blocks, those of one sample after the other, in a file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.checkpoint import CODES, DTYPES, tensor_bytes

_INDEX = ".json"


class StatesWriter:
    """Writes the hidden states of one sample after the other; the file counts once it is closed without an error."""

    def __init__(self, path: Path) -> None:
        """Begin a file, in the place of an older one."""
        self._path, self._entries = path, list[tuple[str, tuple[int, ...]]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(_INDEX).unlink(missing_ok=True)
        self._file = path.open("wb")

    def __enter__(self) -> "StatesWriter":
        """Return the writer."""
        return self

    def append(self, hidden: Tensor) -> None:
        """Write the hidden states of the next sample."""
        self._entries.append((CODES[hidden.dtype], tuple(hidden.shape)))
        self._file.write(tensor_bytes(hidden))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Flush the file to the disk, and then say what is in it, unless there was an error."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        if error is None:
            write_json(self._path.with_suffix(_INDEX), self._entries)


def are_written(path: Path) -> bool:
    """Return whether a file of hidden states is complete."""
    return path.with_suffix(_INDEX).is_file()


def read_states(path: Path, device: str) -> Iterator[Tensor]:
    """Yield the hidden states of one sample after the other, on a device."""
    entries = json.loads(path.with_suffix(_INDEX).read_text())
    with path.open("rb") as file:
        for code, shape in entries:
            empty = torch.empty(shape, dtype=DTYPES[code])
            file.readinto(tensor_bytes(empty))
            yield empty.to(device)
