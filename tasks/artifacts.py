"""Artifacts, and their small JSON files, which are written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Local

_HASHED_AT_ONCE = 32 * 2**20


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text beside the target, flush it to disk and rename it into place."""
    partial = partial_of(path)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def partial_of(path: Path) -> Path:
    """Return the file beside another one that becomes it when it is whole."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Return whether a file is one that was to become another: whoever wrote it was killed, or is at it."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def sync(path: Path) -> None:
    """Have a file that was written on the disk for good, whatever happens to the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def link_file(source: Path, target: Path) -> None:
    """Have a file in a second place too, whose folder is made: a hard link where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # an interrupted try left it, and may have cut it
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def read_json(path: Path) -> Any:
    """Return the value of a JSON file."""
    return json.loads(path.read_text())


MOST_BYTES = 2**28
"""Of a JSON file or a picture from outside; the largest tokenizers take an eighth of that."""


def file_bytes(path: Path, most: float = MOST_BYTES) -> bytes:
    """Return the content of a file that anyone may have put there.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, has more bytes, or is no regular file: to read a pipe may take for ever, and a
            device has no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or else to open a pipe waits for somebody who writes
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > most:
            raise OSError(errno.EINVAL, f"{found.st_size:,} bytes; expected at most {most:,}", str(path))
        return file.read()


def load_json(path: Path) -> Any:
    """Return the value of a JSON file that anyone may have written.

    Raises:
        InputError: it cannot be read, or is none: not UTF-8, a key twice in one object, nested too deeply, a number of
            thousands of digits.
    """
    try:
        return parse_json(file_bytes(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); get the file again") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); get the file again") from error


def load_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that anyone may have written.

    Raises:
        InputError: as `load_json`, or for another value.
    """
    found = load_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}; expected a JSON object; get the file again")
    return found


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text that anyone may have written.

    Raises:
        ValueError: it is none, see `load_json`.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"key {shown(twice)} stands twice in one object")
    return found


def canonical(value: Any) -> str:
    """Return the one JSON text of a value that fingerprints are taken of: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def ordered(value: Any) -> str:
    """Return the JSON text of a value in the order of its keys, which counts; no spaces."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hex, read in pieces."""
    return hash_file(path, hashlib.sha256())


def checksum_file(path: Path) -> str:
    """Return the 128-bit xxh3 of a file in hex: against damage, not against people."""
    return hash_file(path, xxhash.xxh3_128())


def has_checksum(path: Path, checksum: str) -> bool:
    """Return whether a file can be read and has this checksum."""
    try:
        return checksum_file(path) == checksum
    except OSError:
        return False


def hash_file(path: Path, digest: "hashlib._Hash | xxhash.xxh3_128") -> str:
    """Add the content of a file to a digest and return it in hex.

    Read in pieces so large that other threads, which have to hand over the interpreter between two of them, hardly
    slow this down.
    """
    buffer = memoryview(bytearray(min(_HASHED_AT_ONCE, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """What an earlier step has made."""

    fingerprint: str
    folder: Local[Path]
