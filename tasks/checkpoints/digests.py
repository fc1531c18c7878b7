"""Content digests of files, each computed once: a file is known again by path, size, inode and modification time."""

import hashlib
import os
import re
import time
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path

from blake3 import blake3

from sensmerge.tasks.artifacts import canonical, hash_file, read_json, sha256_text
from sensmerge.tasks.errors import InputError

SETTLED = 2 * 10**9
"""Nanoseconds: a file that was written more recently may be written again within one tick of its file system's clock,
at the same size, which nothing would tell. Its digest is not kept."""
_DIGEST = re.compile(r"(blake3|sha256):[0-9a-f]{64}")


def compute(path: Path, kind: str) -> str:
    """Return the digest of a file, `KIND:…` in hex.

    Args:
        path: the file.
        kind: `blake3`, `sha256`, or `git`, a blob id: the sha1 of the header `blob SIZE NUL` and the content.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        if kind == "blake3":
            # All cores at once, and without the interpreter's lock from the first byte to the last: beside a thread
            # that imports, pieces would wait for the lock longer than they take.
            return f"blake3:{blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()}"
        start = b"blob %d\0" % path.stat().st_size if kind == "git" else b""
        return f"{kind}:{hash_file(path, hashlib.new('sha1' if kind == 'git' else 'sha256', start))}"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def compute_once(path: Path, records: Path) -> str:
    """Return the BLAKE3 digest of a file: the one that is kept, or else a new one, which is then kept.

    Raises:
        InputError: the file cannot be read, or changes meanwhile.
    """
    begin, before = time.time_ns(), path.stat()
    if known := find(path, before, records):
        return known
    digest = compute(path, "blake3")
    if _state(path, path.stat()) != _state(path, before):
        raise InputError(f"{path}: changed while its digest was computed; wait until it is written, and run again")
    if abs(begin - before.st_mtime_ns) > SETTLED:
        with suppress(OSError):  # records that may only be read: whoever asks next takes as long
            keep(path, before, digest, records)
    return digest


def bytes_per_second(path: Path, sample: int) -> float:
    """Return how fast BLAKE3 digests are computed here, from the first `sample` bytes of a file."""
    begin = time.perf_counter()
    with path.open("rb") as file, mmap(file.fileno(), sample, access=ACCESS_READ) as content:
        blake3(content, max_threads=blake3.AUTO)
    return sample / (time.perf_counter() - begin)


def find(path: Path, stat: os.stat_result, records: Path) -> str | None:
    """Return the digest that is kept of a file as it is now; None if there is none.

    Args:
        path: the file.
        stat: what the file system says of it.
        records: folder with a record of every state of a file that has a digest.
    """
    record = _record(path, stat, records)
    if not record.is_file():
        return None
    try:
        digest = read_json(record)["digest"]
    except (ValueError, KeyError, TypeError):  # the machine stopped before the disk had it
        return None
    return digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None


def keep(path: Path, stat: os.stat_result, digest: str, records: Path) -> None:
    """Keep the digest of a file for all who share the records.

    Every state of a file has a record of its own, so that those who write at the same time lose nothing of each other.
    One that is cut, since its writer was killed, is none, and is written again: nothing has to lie beside it meanwhile.
    """
    record = _record(path, stat, records)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(canonical({"path": str(path), "size": stat.st_size, "digest": digest}) + "\n")


def forget(path: Path, records: Path) -> None:
    """Forget the digest that is kept of a file as it is now, so that whoever asks for it reads the file again."""
    _record(path, path.stat(), records).unlink(missing_ok=True)


def _record(path: Path, stat: os.stat_result, records: Path) -> Path:
    return records / f"{sha256_text(canonical(_state(path, stat)))[:32]}.json"


def _state(path: Path, stat: os.stat_result) -> list[str | int]:
    return [str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns]
