"""Anonymous memory of processes, sampled: what they have for themselves, the page cache apart."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.02
"""Seconds between two looks."""


@dataclass
class Peak:
    """The largest sum seen, and what it was at first, in bytes."""

    first: int = 0
    largest: int = 0


@contextmanager
def watched(processes: Callable[[], list[psutil.Process]]) -> Iterator[Peak]:
    """Watch the sum over some processes, asked for anew at each look, until the block ends."""
    peak, finished = Peak(), threading.Event()

    def look() -> int:
        return sum(map(anonymous, processes()))

    def keep_looking() -> None:
        while not finished.wait(INTERVAL):
            peak.largest = max(peak.largest, look())

    peak.first = look()
    thread = threading.Thread(target=keep_looking)
    thread.start()
    try:
        yield peak
    finally:
        finished.set()
        thread.join()


def anonymous(process: psutil.Process) -> int:
    """Return the anonymous resident memory of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def children(parent: psutil.Process, title: str) -> list[psutil.Process]:
    """Return the processes below one whose command line begins with a title."""
    found = []
    for one in parent.children(recursive=True):
        try:
            if "".join(one.cmdline()).startswith(title):
                found.append(one)
        except psutil.Error:  # it has ended
            continue
    return found
