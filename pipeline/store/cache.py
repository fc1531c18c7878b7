"""What came from URLs to a machine's disk, bounded in bytes: what nobody reads goes, least recently used first.

It is emptied by units: a model, or an artifact. Of both, small files stay, since a run looks at them on its way. Units
that pieces of work read are held (`tasks.checkpoints.held`); of a model that is, those tensors go that nobody reads.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sensmerge.pipeline.store.manifest import SMALL
from sensmerge.pipeline.store.remote import SYNCED
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import read_json, write_json
from sensmerge.tasks.checkpoints import sparse
from sensmerge.tasks.checkpoints.companions import WEIGHTS
from sensmerge.tasks.checkpoints.held import mark_of, read_of
from sensmerge.tasks.checkpoints.url import LARGE, URLS, thin
from sensmerge.tasks.errors import InputError

LIMIT = "SENSMERGE_CACHE_BYTES"
"""Environment variable: bytes that models and artifacts from URLs may take below `SENSMERGE_CACHE`."""
_EMPTYING = ".emptying.lock"


@dataclass(frozen=True)
class _Unit:
    """A model, or an artifact, and its large files."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Bytes on the disk, where holes take none."""
        return sum(path.stat().st_blocks * 512 for path in self.files if path.exists())

    @property
    def used(self) -> float:
        """When it was last used, as far as is known."""
        mark = mark_of(self.folder)
        return (mark if mark.exists() else self.folder).stat().st_mtime


def limit() -> int | None:
    """Return how many bytes the cache may take; None if there is no bound.

    Raises:
        InputError: the variable is no number of bytes.
    """
    text = os.environ.get(LIMIT, "")
    if not text:
        return None
    if not text.isdecimal() or not int(text):
        raise InputError(f"{LIMIT} is {text!r}; expected a number of bytes, such as 500000000000, or nothing")
    return int(text)


def make_room(store: Store) -> None:
    """Empty units of all stores beside this one until the rest is within the bound, or all of it is held.

    Units that nobody holds come first, and then tensors that nobody reads.

    Raises:
        InputError: as `limit`.
    """
    most = limit()
    if store.remote is None or most is None:
        return
    place = store.root.parent
    with FileLock(place / _EMPTYING):
        units = [*_models(place), *_artifacts(place)]
        left = sum(unit.bytes for unit in units)
        for unit in sorted(units, key=lambda unit: unit.used):
            if left <= most:
                return
            left -= _emptied(unit)
        for unit in sorted(_models(place), key=lambda unit: unit.used):
            if left <= most:
                return
            left -= _thinned(unit)


def _models(place: Path) -> Iterator[_Unit]:
    for folder in place.glob(f"*/hub/{URLS}/*/*/"):
        yield _Unit(folder, tuple(path for path in folder.glob(WEIGHTS) if path.stat().st_size >= LARGE))


def _artifacts(place: Path) -> Iterator[_Unit]:
    """Yield artifacts, with those of their files that are at the URL too."""
    for record in place.glob(f"*/*/*/{SYNCED}"):
        files = (record.parent / name for name in read_json(record))
        large = tuple(path for path in files if path.is_file() and path.stat().st_size > SMALL)
        yield _Unit(record.parent, large)


def _emptied(unit: _Unit) -> int:
    """Delete the large files of a unit, unless somebody holds it; return how many bytes that freed."""
    with mark_of(unit.folder).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        freed, record = unit.bytes, unit.folder / SYNCED
        if record.exists():
            gone = {path.relative_to(unit.folder).as_posix() for path in unit.files}
            write_json(record, {name: state for name, state in read_json(record).items() if name not in gone})
        for path in unit.files:
            with suppress(FileNotFoundError):
                sparse.remove(path)
        return freed


def _thinned(unit: _Unit) -> int:
    """Delete the tensors of a model that nobody reads; return how many bytes that freed."""
    if read_of(unit.folder) is None:
        return 0  # without waiting for those who fetch more of it
    # Whoever begins to read from now on has a note before it looks for what is here, and fetches what is not.
    return thin(unit.folder, unit.folder.parents[2], lambda: read_of(unit.folder))
