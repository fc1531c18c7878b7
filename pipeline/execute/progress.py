"""What a terminal shows of work under way."""

from collections.abc import Callable, Iterator
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


@contextmanager
def progress(console: Console, total: int, what: str) -> Iterator[Callable[[str | None], None]]:
    """Show a bar of what is finished, and the lines said with it; without a terminal only the lines."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(what, total=total)
        finished = 0

        def advance(line: str | None) -> None:
            nonlocal finished
            finished += 1
            if line is not None:
                shown.console.print(f"[{finished}/{total}] {line}", highlight=False, markup=False, soft_wrap=True)
            shown.advance(bar)

        yield advance


@contextmanager
def byte_progress(console: Console, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar of the bytes that are read, and the time left; nothing without a terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda size: shown.advance(bar, size)
