"""Files of weights of which some tensors are here and the others are holes; a file beside each says which are here.

A hole reads as zeros, so whoever reads a tensor asks first whether it has come. Who fetches holds a lock, says which
tensors are coming before the first byte is written, and which have come after the last is on the disk.
"""

import ctypes
import json
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sensmerge.tasks.artifacts import load_object, write_json
from sensmerge.tasks.errors import InputError

Tensors = Mapping[Path, Collection[str]]
"""Names of tensors by the file of weights that holds them; a model's folder stands for the headers of all its files,
and says that more may be read later."""
RANGE = 2**24
"""Bytes that are asked for at once, so that what breaks off is not much."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of linux/falloc.h


@dataclass(frozen=True)
class Present:
    """What is said of a file of which not all is here."""

    tensors: frozenset[str]
    """that have come"""
    coming: frozenset[str]
    """that are being written, or were when whoever wrote them was killed"""
    state: tuple[int, int]
    """inode and modification time of the file since the last of them has come"""

    def holds_of(self, path: Path) -> bool:
        """Return whether nobody but those who fetch has written to the file, as far as can be told."""
        return bool(self.coming) or self.state == state_of(path)


def record_of(path: Path) -> Path:
    """Return the file that says what is here of a file of weights."""
    return path.with_name(f".{path.name}.here")


def present(path: Path) -> Present | None:
    """Return what is said of a file of which not all is here; None of any other."""
    record = record_of(Path(os.path.realpath(path)))
    try:
        stat = record.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _read(record, stat.st_ino, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _read(record: Path, *_: int) -> Present:
    found = load_object(record)
    inode, modified = found["state"]
    return Present(frozenset(found["tensors"]), frozenset(found["coming"]), (inode, modified))


def say(path: Path, tensors: Collection[str], coming: Collection[str] = ()) -> None:
    """Write down what is here of a file as it is now."""
    state = state_of(path) if path.exists() else (0, 0)
    write_json(record_of(path), {"tensors": sorted(tensors), "coming": sorted(coming), "state": state})


def remove(path: Path) -> None:
    """Delete a file, and then what is said of it."""
    path.unlink(missing_ok=True)
    record_of(path).unlink(missing_ok=True)


def keep_only(path: Path, names: Collection[str]) -> int:
    """Have holes where other tensors of a file were, if its file system knows holes; who asks holds the lock.

    Returns:
        How many bytes that freed on the disk.
    """
    found, offsets = present(path), places(path)
    here = offsets.keys() if found is None else found.tensors
    gone = here - {*names}
    if not gone or (found is not None and not found.holds_of(path)):
        return 0
    before = path.stat().st_blocks
    # Whoever is killed from here on leaves what is kept to be found, and what goes to be fetched.
    say(path, here - gone, gone)
    with path.open("r+b") as file:
        gone = {name for name in gone if _punch(file.fileno(), *offsets[name])}
    if gone or found is not None:
        say(path, here - gone)
    else:
        record_of(path).unlink()
    return (before - path.stat().st_blocks) * 512


def _punch(descriptor: int, begin: int, end: int) -> bool:
    """Give the blocks of a stretch of an open file back to the file system; return whether it can do that."""
    try:
        fallocate = ctypes.CDLL(None).fallocate
    except AttributeError:  # not Linux
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return begin == end or not fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, begin, end - begin)


def state_of(path: Path) -> tuple[int, int]:
    """Return what tells whether somebody has written to a file."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def is_here(path: Path, name: str) -> bool:
    """Return whether a tensor of a file can be read."""
    found = present(path)
    return path.exists() and (found is None or name in found.tensors)


def require(path: Path, name: str) -> None:
    """Check that a tensor of a file that is there is no hole in it.

    Raises:
        InputError: it is.
    """
    found = present(path)
    if found is not None and name not in found.tensors:
        raise InputError(
            f"{path}: tensor {name} is not on this machine, only {len(found.tensors)} others of the file are; delete "
            "the file, and it comes whole to whoever reads it"
        )


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Return where each tensor begins and ends in a file whose header is known to be sound."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    start = 8 + length
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


def ranges(parts: Iterable[tuple[int, int]], most: int = RANGE) -> list[tuple[int, int]]:
    """Return stretches of a file as they are asked for: neighbours together, and none longer than `most` bytes."""
    joined: list[list[int]] = []
    for begin, end in sorted(parts):
        if joined and joined[-1][1] == begin:
            joined[-1][1] = end
        elif begin < end:
            joined.append([begin, end])
    return [(at, min(at + most, end)) for begin, end in joined for at in range(begin, end, most)]


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write bytes at their place in an open file."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, memoryview(content)[written:], offset + written)
