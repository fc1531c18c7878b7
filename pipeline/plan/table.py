"""The table of a plan: a row per step, and one for the evaluation of a model on all tasks of which the same is said."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rich.filesize import decimal
from rich.table import Table

from sensmerge.pipeline.recipe.stage import Stage


@dataclass
class StepRow:
    """What is said of a step, or of a model's evaluations."""

    stage: Stage
    name: str
    mark: str
    """RUN, SKIP, SAME or ?"""
    why: str
    reads: int = 0
    """bytes, if it runs"""
    writes: int = 0
    """the same"""


def step_table(title: str, rows: Iterable[StepRow]) -> Table:
    """Return a table of steps: stage, name, whether it runs and why, and the bytes read and written."""
    table = Table(title=title, title_justify="left")
    for column in ("stage", "step", "", "why"):
        table.add_column(column, overflow="fold")
    table.add_column("read", justify="right", overflow="fold")
    table.add_column("write", justify="right", overflow="fold")
    for row in _folded(rows):
        sizes = (decimal(row.reads), decimal(row.writes)) if row.mark == "RUN" else ("", "")
        table.add_row(row.stage, row.name, row.mark, row.why, *sizes)
    return table


def _folded(rows: Iterable[StepRow]) -> list[StepRow]:
    """Return rows with evaluations of one model that say the same put together, named `MODEL: TASK, …`."""
    found: list[StepRow] = []
    models: dict[tuple[str, str, str], StepRow] = {}
    for row in rows:
        model, _, task = row.name.partition("/")
        if row.stage != "evaluate" or not task:
            found.append(row)
            continue
        why = row.why.removesuffix(f"/{task}")  # as another model's on the task
        first = models.get((model, row.mark, why))
        if first is None:
            one = replace(row, name=f"{model}: {task}", why=why)
            models[model, row.mark, why] = one
            found.append(one)
        else:
            first.name += f", {task}"
            first.reads += row.reads
            first.writes += row.writes
    return found
