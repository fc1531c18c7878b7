"""A store at a URL, such as s3://bucket/team: what machines without a disk in common share, through fsspec."""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sensmerge.tasks.artifacts import read_json, write_json
from sensmerge.tasks.errors import InputError

LOCK = ".lock"
LEASE = timedelta(minutes=5)
"""A lock that was not renewed for so long is that of a run that has died."""
RENEWAL = timedelta(minutes=1)
SYNCED = ".synced"
"""In a local folder: which state of each remote file its files are."""
POLL = 1.0
"""Seconds between two looks at another run's lock."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the file system lists it."""

    size: int
    state: str
    """another one whenever the file was written again"""


@dataclass(frozen=True)
class Remote:
    """Files below a URL. A local folder that mirrors one of its folders keeps in mind which states it has."""

    url: str
    """any that fsspec knows, without a slash at the end"""

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec

        with self._explained():
            found: tuple[Any, str] = fsspec.url_to_fs(self.url)
            return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave connections behind when travelling to another process."""
        return {"url": self.url}

    def files(self, folder: str = "") -> dict[str, RemoteFile]:
        """Return all files below a folder by their path from the root."""
        from fsspec.utils import tokenize

        fs, root = self._place
        with self._explained():
            fs.invalidate_cache()
            found = fs.find(f"{root}/{folder}".rstrip("/"), detail=True)
        return {
            str(PurePosixPath(path).relative_to(root)): RemoteFile(info["size"], tokenize(info))
            for path, info in found.items()
        }

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        fs, root = self._place
        with self._explained():
            content: bytes = fs.cat_file(f"{root}/{path}")
            return content

    def download(self, files: Mapping[str, RemoteFile], folder: str, target: Path) -> None:
        """Bring files of a remote folder to a local one, each whole or not at all; those it has already stay.

        Args:
            files: by their path from the root, as `files` lists them.
            folder: the remote folder, which they are in.
            target: the local folder.
        """
        synced = read_json(target / SYNCED) if (target / SYNCED).is_file() else {}
        names = {str(PurePosixPath(path).relative_to(folder)): file for path, file in files.items()}
        wanted = {
            name: file
            for name, file in names.items()
            if synced.get(name) != file.state or not (target / name).is_file()
        }
        if not wanted:
            return
        fs, root = self._place
        partial = {name: (target / name).with_name(f".{PurePosixPath(name).name}.partial") for name in wanted}
        for path in partial.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            fs.get([f"{root}/{folder}/{name}" for name in wanted], [str(path) for path in partial.values()])
        for name, path in partial.items():
            if path.stat().st_size != wanted[name].size:
                raise InputError(
                    f"{self.url}/{folder}/{name}: {path.stat().st_size} of {wanted[name].size} bytes came; run again"
                )
            path.replace(target / name)
        write_json(target / SYNCED, synced | {name: file.state for name, file in wanted.items()})

    def upload(self, source: Path, folder: str, names: Collection[str], last: str | None = None) -> None:
        """Write files of a local folder.

        Args:
            source: the local folder.
            folder: the remote one.
            names: of the files.
            last: the one that says that all are there: it is removed first and written last.
        """
        fs, root = self._place
        target = f"{root}/{folder}"
        with self._explained():
            if last is not None and fs.exists(f"{target}/{last}"):
                fs.rm_file(f"{target}/{last}")
            for some in ([name for name in names if name != last], [last] if last is not None else []):
                if some:
                    fs.put([str(source / name) for name in some], [f"{target}/{name}" for name in some])
        states = {str(PurePosixPath(path).relative_to(folder)): file.state for path, file in self.files(folder).items()}
        synced = read_json(source / SYNCED) if (source / SYNCED).is_file() else {}
        write_json(source / SYNCED, synced | {name: states[name] for name in names})

    def remove(self, path: str, first: str | None = None) -> None:
        """Delete a file or folder; of a folder the file `first` goes first. What is not there is none."""
        fs, root = self._place
        with self._explained():
            fs.invalidate_cache()
            for one in ([f"{path}/{first}"] if first is not None else []) + [path]:
                if fs.exists(f"{root}/{one}"):
                    fs.rm(f"{root}/{one}", recursive=True)

    @contextmanager
    def lock(self, wait: float) -> Iterator[None]:
        """Hold the lock of the store, and renew it meanwhile.

        Args:
            wait: seconds to wait for another run to end.

        Raises:
            InputError: another run holds it after that time.
        """
        mine = {"host": platform.node(), "process": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        give_up = time.monotonic() + wait
        said = False
        while not self._take(mine):
            holder = self._holder()
            if holder is None:  # it has just ended
                continue
            who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
            if time.monotonic() >= give_up:
                raise InputError(
                    f"{self.url}: locked by another run ({who}); wait longer (--wait SECONDS) or pass another --store"
                )
            if not said:
                sys.stderr.write(f"{self.url}: locked by {who}; waiting for it, {wait:g} s at most\n")
                said = True
            time.sleep(min(POLL, max(0.0, give_up - time.monotonic())))
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(mine, ended), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            self.remove(LOCK)

    def _take(self, mine: Mapping[str, Any]) -> bool:
        fs, root = self._place
        with self._explained():
            try:
                fs.pipe_file(f"{root}/{LOCK}", json.dumps(mine).encode(), mode="create")
            except FileExistsError:
                return False
        return True

    def _holder(self) -> dict[str, Any] | None:
        """Return who holds the lock; a lock of a run that has died is removed."""
        fs, root = self._place
        with self._explained():
            try:
                fs.invalidate_cache()
                age = datetime.now(UTC) - fs.modified(f"{root}/{LOCK}")
                holder: dict[str, Any] = json.loads(fs.cat_file(f"{root}/{LOCK}"))
                if age < LEASE and not _has_died(holder):
                    return holder
                fs.rm_file(f"{root}/{LOCK}")
            except FileNotFoundError:
                pass
        return None

    def _renew(self, mine: Mapping[str, Any], ended: threading.Event) -> None:
        fs, root = self._place
        while not ended.wait(RENEWAL.total_seconds()):
            with self._explained():
                fs.pipe_file(f"{root}/{LOCK}", json.dumps(mine).encode())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # every file system has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"--store {self.url}: cannot be used ({reason}); check the URL, the credentials, and that the package "
                "for its file system is installed"
            ) from error


def _has_died(holder: Mapping[str, Any]) -> bool:
    """Return whether the process that holds a lock was on this machine and is no more."""
    if holder["host"] != platform.node():
        return False
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
