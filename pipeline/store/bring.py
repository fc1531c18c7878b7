"""What a worker reads of a store at a URL, brought to its machine: by one process at a time, once for each run."""

import math
from pathlib import Path

from filelock import FileLock

from sensmerge.pipeline.store.remote import SYNCED
from sensmerge.pipeline.store.store import ROWS, Store, stages
from sensmerge.tasks.artifacts import sha256_text, write_whole

_LOCKS = ".fetching"
"""Folder of the store, on each machine, for the locks of those who fetch."""
_BROUGHT: dict[tuple[str, Path, float], int] = {}
"""What this process has: for which run, what, and up to how many bytes; and when something of the folder last came, or
went, since the cache is bounded."""


def bring(store: Store, path: Path, run: str, most: float = math.inf) -> None:
    """Have something of a store on this machine as it is at the URL now; of a store in a folder everyone has it.

    Args:
        store: the store.
        path: an artifact's folder, a file in one, or a file of rows; for anything else nothing is done.
        run: names the run; what it reads is there before it begins to, and stays what it is.
        most: bytes of a file in a folder that still comes.

    Raises:
        InputError: the URL cannot be used.
    """
    known, parts = (run, path, most), path.relative_to(store.root).parts
    if store.remote is None or (known in _BROUGHT and _BROUGHT[known] == _changed(store, path)):
        return
    lock = store.root / _LOCKS / f"{sha256_text('/'.join(parts[:2]))[:32]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if parts[0] == ROWS:
            if not path.is_file():  # its name says what is in it
                path.parent.mkdir(exist_ok=True)
                write_whole(path, store.remote.read(store.path_of(path)).decode())
        elif parts[0] in stages() and len(parts) > 1:
            folder, wanted = "/".join(parts[:2]), "/".join(parts)
            files = {
                name: file
                for name, file in store.remote.files(folder).items()
                if name == wanted or (folder == wanted and file.size <= most)
            }
            store.remote.download(files, folder, store.root / folder)
    _BROUGHT[known] = _changed(store, path)


def _changed(store: Store, path: Path) -> int:
    """Return when files of an artifact last came from the URL, or were deleted to make room; 0 of anything else."""
    record = store.root.joinpath(*path.relative_to(store.root).parts[:2]) / SYNCED
    return record.stat().st_mtime_ns if record.is_file() else 0
