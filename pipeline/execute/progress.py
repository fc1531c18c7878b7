"""What a terminal shows of work under way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


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
