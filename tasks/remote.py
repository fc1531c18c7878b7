"""Files below a URL that fsspec knows, such as s3://bucket/team: listed, and read whole or in part."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sensmerge.tasks.artifacts import partial_of
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.urls import public

T = TypeVar("T")
WAITS = (0.1, 0.4, 2.0, 5.0)
"""Seconds after which something is tried again that a server could not do, each half as long again at most."""
FINAL = (
    InputError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    ValueError,
    TypeError,
    NotImplementedError,
)
"""What trying again does not help. Everything else that a file system may raise, and each has its own, may pass."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the file system lists it."""

    size: int
    """bytes"""
    state: str
    """another one whenever the file has another content: the server's ETag where it has one"""


@dataclass(frozen=True)
class RemoteFolder:
    """Files below a URL."""

    url: str
    """any that fsspec knows, without a slash at the end"""

    @property
    def title(self) -> str:
        """What names it in messages."""
        return self.url

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec

        if public(self.url) != self.url:  # it stands in reports, in cards and in MLflow
            raise InputError(
                f"{self.title}: the URL holds a password or token; leave it out, and give it where fsspec looks: in a "
                "variable such as FSSPEC_SFTP_PASSWORD, or in the provider's own"
            )
        with self._explained():
            # Folders are made where there are any; elsewhere that would make buckets.
            options = {"auto_mkdir": True} if self.url.startswith(("file:", "local:")) else {}
            found: tuple[Any, str] = fsspec.url_to_fs(self.url, **options)
            return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave connections behind when travelling to another process."""
        return {"url": self.url}

    def files(self, folder: str = "", depth: int | None = None) -> dict[str, RemoteFile]:
        """Return the files below a folder by their path from the root.

        Args:
            folder: path from the root.
            depth: of the folders that are looked into, 1 for the folder alone; None for all.
        """
        fs, root = self._place

        def find() -> Mapping[str, Mapping[str, Any]]:
            fs.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = fs.find(
                f"{root}/{folder}".rstrip("/"), maxdepth=depth, detail=True
            )
            return found

        return {
            str(PurePosixPath(path).relative_to(root)): RemoteFile(info["size"], _state(info))
            for path, info in self._tried(find).items()
        }

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the content of a file, or its bytes from `start` up to `end`.

        Raises:
            InputError: it cannot be read, or has fewer bytes.
        """
        fs, root = self._place

        def read() -> bytes:
            content: bytes = fs.cat_file(f"{root}/{path}", start=start, end=end)
            if start is not None and end is not None and len(content) != end - start:
                raise OSError(f"{path}: {len(content)} of {end - start} bytes came")
            return content

        return self._tried(read)

    def bring(self, files: Mapping[str, RemoteFile], targets: Mapping[str, Path]) -> None:
        """Bring files to this machine, each whole or not at all.

        Args:
            files: by their path from the root, as `files` lists them.
            targets: where each goes.

        Raises:
            InputError: one cannot be read, or has another size than was listed.
        """
        fs, root = self._place
        partial = {path: partial_of(targets[path]) for path in files}
        for one in partial.values():
            one.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            fs.get([f"{root}/{path}" for path in partial], [str(one) for one in partial.values()])
            for path, one in partial.items():
                if one.stat().st_size != files[path].size:
                    raise OSError(f"{path}: {one.stat().st_size} of {files[path].size} bytes came")

        self._tried(get)
        for path, one in partial.items():
            one.replace(targets[path])

    def _tried(self, work: Callable[[], T]) -> T:
        """Do something as `tried` does, and say what is to be done where it cannot be."""
        with self._explained():
            return tried(work)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # every file system has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{self.title}: cannot be used ({reason}); check the URL, the credentials, and that the package for "
                "its file system is installed"
            ) from error


def tried(work: Callable[[], T]) -> T:
    """Do something at a URL that may be done twice, and do it again where the server could not."""
    for wait in WAITS:
        try:
            return work()
        except FINAL:
            raise
        except Exception:  # every file system has its own
            time.sleep(wait * (1 + random.random() / 2))  # so that workers do not ask again all at once
    return work()


def _state(info: Mapping[str, Any]) -> str:
    from fsspec.utils import tokenize

    stated = next((str(info[key]).strip('"') for key in ("ETag", "etag", "md5Hash") if info.get(key)), None)
    return stated or str(tokenize(info))
