"""Leases on artifacts that are being served: what a server would have to load again is not freed meanwhile."""

import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
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
        self._finalizer: weakref.finalize[..., Lease] | None = None
        root, stage, name = ("", "", *place.rstrip("/").rsplit("/", 2))[-3:]
        files, folder = fsspec.url_to_fs(root or ".")
        path = f"{folder}/{LEASES}/{stage}--{name}/{uuid4().hex}.json"
        if not files.exists(f"{folder}/{stage}/{name}/manifest.json"):
            return
        try:
            _renew(files, path)
        except Exception as error:  # each file system has its own for "only read"; a model can be served all the same
            logging.getLogger(__name__).warning(
                "%s: the store cannot be written, so gc does not know that this version is served (%s); give it an "
                "alias or the tag `pinned`",
                place,
                type(error).__name__,
            )
            return
        ended = threading.Event()
        threading.Thread(target=_keep, args=(files, path, ended), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end, files, path, ended, os.getpid())

    def release(self) -> None:
        """Let go of the lease; nothing happens if there is none, or the second time."""
        if self._finalizer is not None:
            self._finalizer()


def held(place: str) -> list[Held]:
    """Return all leases in a store, those that have ended too.

    Args:
        place: the store's folder or URL.
    """
    from sensmerge.tasks.remote import tried  # needs more than a server, which never asks, has installed

    files, folder = fsspec.url_to_fs(place)
    files.invalidate_cache()
    return tried(lambda: list(_read(files, f"{folder}/{LEASES}")))


def release(place: str, lease: Held) -> None:
    """Remove a lease from a store; its server may do so at the same moment."""
    from sensmerge.tasks.remote import tried

    files, _ = fsspec.url_to_fs(place)
    with suppress(FileNotFoundError):
        tried(lambda: files.rm_file(lease.path))


def _read(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[Held]:
    for path in files.find(folder) if files.exists(folder) else ():
        stage, _, name = path.rsplit("/", 2)[1].partition("--")
        with suppress(FileNotFoundError):  # let go of meanwhile
            host, renewed = _content(files, path)
            yield Held(f"{stage}/{name}", host, renewed if renewed.tzinfo else renewed.replace(tzinfo=UTC), path)


def _content(files: fsspec.AbstractFileSystem, path: str) -> tuple[str, datetime]:
    """Return the host and the last renewal of a lease.

    A file that cannot be read counts from when it was written: it may just be being written, and is gone after `LIFE`.
    Where a file system does not know when that was, objects appear whole, so the lease has ended.
    """
    try:
        found = json.loads(files.cat_file(path))
        return str(found["host"]), datetime.fromisoformat(found["renewed"])
    except (KeyError, TypeError, ValueError):
        try:
            return "an unknown host", files.modified(path)
        except NotImplementedError:
            return "an unknown host", datetime.min


def _renew(files: fsspec.AbstractFileSystem, path: str) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "renewed": datetime.now(UTC).isoformat()}
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, json.dumps(about).encode())


def _keep(files: fsspec.AbstractFileSystem, path: str, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL.total_seconds()):
        try:
            _renew(files, path)
        except Exception as error:  # the next time may be in time
            logging.getLogger(__name__).warning("%s: the lease is not renewed (%s)", path, type(error).__name__)


def _end(files: fsspec.AbstractFileSystem, path: str, ended: threading.Event, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the server, which goes on serving
        return
    ended.set()
    try:
        files.rm_file(path)
    except Exception as error:  # it ends by itself
        logging.getLogger(__name__).warning("%s: the lease is left behind (%s)", path, type(error).__name__)
