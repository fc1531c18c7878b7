"""What people read of the rows that models were scored on: a table for each model and task, of bounded size."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.results import records_of
from sensmerge.tasks.kinds.kind import RowTask

MOST_ROWS = 1000
"""Of a table; the same ones of every model."""
MOST_TEXT = 2000
"""Characters of a text in a table."""


@dataclass(frozen=True)
class Answers:
    """A table of what a model answered."""

    rows: list[dict[str, Any]]
    """by the name of the column; see `table_row`"""
    scored: int
    """on how many rows the model was scored, in all"""

    @property
    def cut(self) -> str | None:
        """Say which rows these are; None if they are all."""
        return f"the first {len(self.rows)} of {self.scored} rows" if len(self.rows) < self.scored else None


def answers(plan: Plan) -> dict[str, dict[str, Answers]]:
    """Return what every model answered, by task."""
    found: dict[str, dict[str, Answers]] = {}
    for model, by_task in records_of(plan).items():
        for name, records in by_task.items():
            one = plan.inputs.data[name]
            if isinstance(one.task, RowTask):
                labels, pairs = plan.labels(name, one), zip(one.evaluation, records, strict=True)
                table = [one.task.table_row(row, record, labels) for row, record in islice(pairs, MOST_ROWS)]
                if all(table):
                    found.setdefault(model, {})[name] = Answers([*map(_readable, table)], len(records))
    return found


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: shortened(value) if isinstance(value, str) else value for column, value in row.items()}


def shortened(text: str) -> str:
    """Return a text whose middle is left out if it is long, and how much that was."""
    left_out, half = len(text) - MOST_TEXT, MOST_TEXT // 2
    return text if left_out <= 0 else f"{text[:half]} [… {left_out} characters …] {text[-half:]}"
