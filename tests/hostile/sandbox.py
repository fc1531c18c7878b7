"""Runs one attempt in a process of its own, forked from a warm one, and says what it did beside what it should."""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS = 10, 30
"""A machine with much else to do is no fault of the input."""
MEMORY = 2**30
"""Bytes above what the warm process has."""
LONGEST = 500
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.posix_spawn",
    "os.exec",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind")


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt."""

    status: int | None
    """exit status; None where the process died, or was ended at a limit"""
    said: str
    """on standard error"""
    breaches: Sequence[str]
    """what it did that it must not"""

    @property
    def finding(self) -> str | None:
        """What is wrong with it; None if it is as it should be."""
        if self.breaches:
            return f"did {self.breaches[0]}"
        if self.status == 0:
            return None
        lines = self.said.splitlines()
        if self.status != 2:
            return f"ended with status {self.status}: {lines[-1] if lines else ''}"
        # The bound is of a message; the command line writes `error: ` before it.
        if len(lines) != 1 or len(lines[0]) > LONGEST + len("error: "):
            return f"said {len(lines)} lines, {max(map(len, lines), default=0)} characters"
        return None


def attempt(do: Callable[[], int], folder: Path, secret: Path) -> Outcome:
    """Do something in a process of its own, within the limits.

    Args:
        do: returns an exit status and says what is wrong on standard error, as the command line does.
        folder: the only one, beside those for temporary files, that it may write to.
        secret: a folder that it has no reason to look into.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(do, folder, secret, writer)
    os.close(writer)
    end, parts = time.monotonic() + WALL_SECONDS, []
    while (left := end - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        if not (part := os.read(reader, 2**16)):
            break
        parts.append(part)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if status:
        said = (folder / "said").read_text(errors="replace") if (folder / "said").is_file() else ""
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(status)
        return Outcome(None, f"{said}\nended by {name}", [])
    found = json.loads(b"".join(parts))
    return Outcome(found["status"], found["said"], found["breaches"])


def _work(do: Callable[[], int], folder: Path, secret: Path, writer: int) -> None:
    try:
        _limit(folder)
        breaches: list[str] = []
        inside, outside = f"{os.path.realpath(folder)}/", os.path.realpath(secret)
        sys.addaudithook(lambda event, details: _judge(event, details, inside, outside, breaches))
        try:
            status = do()
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        text = (folder / "said").read_text(errors="replace")
        result = json.dumps({"status": status, "said": text[-4000:], "breaches": breaches[:5]}).encode()
        while result:
            result = result[os.write(writer, result) :]
        os._exit(0)
    finally:  # nothing of the parent's may run in this process
        os._exit(3)


def _limit(folder: Path) -> None:
    """Have this process write what it says to a file, and give it its limits."""
    os.dup2(os.open(folder / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Python's own streams may be those of pytest; these are as a new process has them.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    data = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + MEMORY,) * 2)
    used = int(time.process_time()) + 1  # the limit counts from the start of this process
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS,) * 2)
    os.chdir(folder)
    os.environ["SENSMERGE_CACHE"] = str(folder / "cache")  # where the stack of an error goes


def _judge(event: str, details: tuple[Any, ...], inside: str, secret: str, breaches: list[str]) -> None:
    if event in STARTS or event in CONNECTS:
        breaches.append(f"{event} {str(details)[:200]}")
    elif (event == "open" or event in CHANGES) and details and isinstance(details[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(details[0]))
        if path.startswith(secret):
            breaches.append(f"{event} of {path}")
        writes = event != "open" or _writes(details[1], details[2])
        if writes and not f"{path}/".startswith(inside) and not path.startswith("/dev/"):
            breaches.append(f"{event} for writing of {path}")


def _writes(mode: str | None, flags: int) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
