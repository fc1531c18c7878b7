"""Leases on artifacts that are being served: what a server would have to load again is not freed meanwhile."""

import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import fsspec

LEASES = "leases"
"""Folder of a store: a folder per artifact, with a file per server."""
RENEWAL = timedelta(minutes=5)
LIFE = timedelta(hours=1)
"""How long a lease lasts that is not renewed: much longer than clocks of machines differ."""


@dataclass(frozen=True)
class Held:
    """A lease that some server has, or had."""

    artifact: str
    """`stage/folder`"""
    host: str
    renewed: datetime
    path: str
    """of its file, for `release`"""

    @property
    def is_live(self) -> bool:
        """Whether it still counts."""
        return datetime.now(UTC) - self.renewed < LIFE


class Lease:
    """A lease that is renewed until it is let go of, or this process ends."""

    def __init__(self, place: str) -> None:
        """Take a lease on an artifact; where none can be taken, a warning says so.

        Args:
            place: the artifact's folder in its store, or its URL; anything else has no lease.
        """
        root, stage, name = ("", "", *place.rstrip("/").rsplit("/", 2))[-3:]
        self._files, folder = fsspec.url_to_fs(root or ".")
        self._path = f"{folder}/{LEASES}/{stage}--{name}/{uuid4().hex}.json"
        if not self._files.exists(f"{folder}/{stage}/{name}/manifest.json"):
            return
        try:
            _renew(self._files, self._path)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: the store cannot be written, so gc does not know that this version is served (%s); give it an "
                "alias or the tag `pinned`",
                place,
                type(error).__name__,
            )
            return
        ended = threading.Event()
        threading.Thread(target=_keep, args=(self._files, self._path, ended), daemon=True).start()
        self.release = weakref.finalize(self, _end, self._files, self._path, ended)


def held(place: str) -> list[Held]:
    """Return all leases in a store, those that have ended too.

    Args:
        place: the store's folder or URL.
    """
    files, folder = fsspec.url_to_fs(place)
    files.invalidate_cache()
    return list(_read(files, f"{folder}/{LEASES}"))


def release(place: str, lease: Held) -> None:
    """Remove a lease from a store."""
    files, _ = fsspec.url_to_fs(place)
    files.rm_file(lease.path)


def _read(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[Held]:
    for path in files.find(folder) if files.exists(folder) else ():
        stage, _, name = path.rsplit("/", 2)[1].partition("--")
        try:
            found = json.loads(files.cat_file(path))
            yield Held(f"{stage}/{name}", str(found["host"]), datetime.fromisoformat(found["renewed"]), path)
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            continue  # let go of meanwhile, or just being written


def _renew(files: fsspec.AbstractFileSystem, path: str) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "renewed": datetime.now(UTC).isoformat()}
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, json.dumps(about).encode())


def _keep(files: fsspec.AbstractFileSystem, path: str, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL.total_seconds()):
        try:
            _renew(files, path)
        except OSError as error:  # the next time may be in time
            logging.getLogger(__name__).warning("%s: the lease could not be renewed (%s)", path, type(error).__name__)


def _end(files: fsspec.AbstractFileSystem, path: str, ended: threading.Event) -> None:
    ended.set()
    try:
        files.rm_file(path)
    except OSError as error:  # it ends by itself
        logging.getLogger(__name__).warning("%s: the lease could not be removed (%s)", path, type(error).__name__)
