"""What this process does to files below a folder: counted, and ended or refused from a chosen operation on."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
GROWING = ("open", "os.mkdir", "os.link", "pwrite", "fsync")
"""What a full disk refuses."""


@dataclass
class Operations:
    """The operations of a process, in their order."""

    folder: Path
    fault: Callable[[str], None] = lambda name: None
    """called with the name of an operation before it is done"""
    first: int | None = None
    """number of the first operation, from 0, that `fault` is called for; None: of none"""
    done: list[tuple[str, str]] = field(default_factory=list)
    """name and path of each"""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def watch(self) -> None:
        """Watch this process from now to its end."""
        sys.addaudithook(self._heard)
        fsync, pwrite = os.fsync, os.pwrite  # which tell no audit hook

        def watched_fsync(descriptor: int) -> None:
            self._comes("fsync", _path(descriptor))
            fsync(descriptor)

        def watched_pwrite(descriptor: int, data: Any, offset: int) -> int:
            half = memoryview(data)[: len(data) // 2]
            self._comes("pwrite", _path(descriptor), lambda: pwrite(descriptor, half, offset))
            return pwrite(descriptor, data, offset)

        os.fsync, os.pwrite = watched_fsync, watched_pwrite  # type: ignore[assignment]

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        match event, arguments:
            case "open", (path, _, int(flags)) if flags & WRITING:
                self._comes(event, _path(path))
            case ("os.mkdir", (path, _, int(place))) | (("os.remove" | "os.rmdir"), (path, int(place))):
                self._comes(event, _path(path, place))
            case (("os.rename" | "os.link"), (_, path, _, int(place))):
                self._comes(event, _path(path, place))
            case "os.truncate", (path, _):
                self._comes(event, _path(path))

    def _comes(self, name: str, path: str, half: Callable[[], object] | None = None) -> None:
        if not path.startswith(f"{self.folder}/"):
            return
        with self._lock:
            number = len(self.done)
            self.done.append((name, path.removeprefix(f"{self.folder}/")))
            if self.first is not None and number >= self.first:
                if half is not None:
                    half()
                self.fault(name)


def _path(path: object, place: int = -1) -> str:
    """Return the whole path of a file that is named by path or descriptor, relative to a folder's descriptor."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    return os.path.abspath(os.path.join(_path(place), text) if place >= 0 else text)


def kill(name: str) -> None:
    """End this process as a power cut ends it."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(name: str) -> None:
    """Refuse what takes room."""
    if name in GROWING:
        _refuse(errno.ENOSPC)


def read_only(name: str) -> None:
    """Refuse all of it."""
    _refuse(errno.EROFS)


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
