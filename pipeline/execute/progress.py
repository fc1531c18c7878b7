"""What a terminal shows of work under way."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SAY_AGAIN = 30.0
"""Seconds after which a line says what is at work, where no line came meanwhile and no terminal shows it."""
MOST_SHOWN = 3
"""Works that are named; of the others only the number is said."""


class Shown:
    """A bar of what is finished and the names of what is at work, or lines instead where there is no terminal."""

    def __init__(self, bar: Progress, total: int, what: str) -> None:
        """Begin a bar of `total` things, which are called `what`."""
        self._bar, self._task, self._total = bar, bar.add_task(what, total=total), total
        self._finished, self._said = 0, time.monotonic()

    def advance(self, line: str | None) -> None:
        """Count one more that is finished; say a line with it, if there is one."""
        self._finished += 1
        if line is not None:
            self._say(f"[{self._finished}/{self._total}] {line}")
        self._bar.advance(self._task)

    def at_work(self, names: Sequence[str], waiting: int = 0) -> None:
        """Show what is at work, at least every `SAY_AGAIN` seconds if this is called as often.

        Args:
            names: of what is at work.
            waiting: how many others wait for a worker.
        """
        more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
        said = [", ".join(names[:MOST_SHOWN]) + more] if names else []
        said += [f"{waiting} waiting for a worker"] if waiting else []
        if self._bar.console.is_terminal:
            self._bar.update(self._task, description="; ".join(said))
        elif said and time.monotonic() - self._said >= SAY_AGAIN:
            self._say(f"at work: {'; '.join(said)}" if names else said[0])

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(console: Console, total: int, what: str) -> Iterator[Shown]:
    """Show what is finished and at work of so many."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Shown(bar, total, what)


@contextmanager
def byte_progress(console: Console, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar of the bytes that are read, and the time left; nothing without a terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda size: shown.advance(bar, size)
