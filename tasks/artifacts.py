"""Artifacts, and their small JSON files, which are written whole or not at all."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

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
