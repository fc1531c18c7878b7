"""Jobs that go wrong; workers import this module, so it imports little."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensmerge.tasks.identity import Local
from sensmerge.tasks.stages.job import Job


@dataclass(frozen=True)
class DieOnce(Job):
    """Kills its worker process the first time, as the kernel does when memory runs out."""

    stage = "download"
    version = 1

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        marker = out.parent / "died"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"pid": os.getpid()}


@dataclass(frozen=True)
class Die(Job):
    """Kills its worker process every time."""

    stage = "download"
    version = 1

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


@dataclass(frozen=True)
class Fail(Job):
    """Raises; every call leaves an x in the file `calls`."""

    stage = "download"
    version = 1

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        (out.parent / "calls").open("a").write("x")
        raise RuntimeError("broken on purpose")


@dataclass(frozen=True)
class FillDisk(Job):
    """Finds no room."""

    stage = "download"
    version = 1

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "weights"))


@dataclass(frozen=True)
class Exchange(Job):
    """Has a model changed by someone else while it works."""

    stage = "download"
    version = 1

    model: Local[Path]

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        (self.model / "config.json").write_text("{}")
        return {}


@dataclass(frozen=True)
class Write(Job):
    """Makes an artifact of one file."""

    stage = "download"
    version = 1

    text: str

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        (out / "text").write_text(self.text)
        return {}


@dataclass(frozen=True)
class Flip(Job):
    """Has a bit of a file flip, as a disk may do it: its size and time are as before."""

    stage = "download"
    version = 1

    file: Local[Path]

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        stat, content = self.file.stat(), self.file.read_bytes()
        self.file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        os.utime(self.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return {}


@dataclass(frozen=True)
class Tell(Job):
    """Sends a signal to a process, and then takes long."""

    stage = "download"
    version = 1

    process: Local[int]
    told: Local[int]

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        os.kill(self.process, self.told)
        time.sleep(60)
        return {}
