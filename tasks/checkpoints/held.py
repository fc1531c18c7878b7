"""What is read of models and artifacts on this machine, whose disk may not have room for all that ever came from URLs.

A unit, which is a model or an artifact, is held by a lock on a file beside it; the time of that file says when it was
last used. Whoever holds it also has a note beside it, with a lock as well, that says which tensors of a model it reads.
All locks end with their process.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from sensmerge.tasks.artifacts import partial_of
from sensmerge.tasks.checkpoints.sparse import Tensors

_NOTE = ".read"


def mark_of(folder: Path) -> Path:
    """Return the file beside a unit that is locked by all who hold it."""
    return folder.with_name(f".{folder.name}.used")


@contextmanager
def held(folders: Iterable[Path], tensors: Tensors | None = None) -> Iterator[None]:
    """Have units stay on this machine within the block, whichever process wants to empty them.

    Args:
        folders: of the units.
        tensors: all that is read of the weights of models; of these, the rest need not stay. None: whole files.
    """
    with ExitStack() as stack:
        for folder in sorted({*folders}):
            mark = mark_of(folder)
            mark.parent.mkdir(parents=True, exist_ok=True)
            ours = {path.name: sorted(names) for path, names in (tensors or {}).items() if path.parent == folder}
            stack.enter_context(_noted(folder, None if tensors is None or folder in tensors else ours))
            file = stack.enter_context(mark.open("a"))
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(mark)
        yield


@contextmanager
def _noted(folder: Path, read: Mapping[str, Sequence[str]] | None) -> Iterator[None]:
    """Have a note beside a unit, for as long as this process lives, that says what is read of it."""
    note = folder.with_name(f".{folder.name}.{uuid4().hex}{_NOTE}")
    begun = partial_of(note)
    with begun.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # before others see it
        file.write(json.dumps(read))
        file.flush()
        begun.rename(note)
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def read_of(folder: Path) -> dict[str, set[str]] | None:
    """Return which tensors of a model somebody reads, by file; None if somebody reads all of it."""
    found: dict[str, set[str]] = {}
    for note in folder.parent.glob(f".{folder.name}.*{_NOTE}"):
        with suppress(FileNotFoundError), note.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                read = json.load(file)
                if read is None:
                    return None
                for name, tensors in read.items():
                    found.setdefault(name, set()).update(tensors)
            else:
                note.unlink(missing_ok=True)  # of a process that was killed
    return found
