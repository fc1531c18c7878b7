"""What is said of few rows."""

from typing import Any

from sensmerge.pipeline.plan.few import few_rows
from sensmerge.pipeline.plan.rows import TaskRows


def test_tasks_with_few_rows_are_named_with_their_number() -> None:
    task: Any = None
    data = {
        "math": TaskRows(task, [{}] * 64, [{}] * 3),
        "code": TaskRows(task, [{}] * 15, [{}] * 29),
        "chat": TaskRows(task, [{}] * 16, [{}] * 30),
        "lm": TaskRows(task, [], []),  # it has its own
    }
    scored, calibrating = few_rows(data)
    assert scored.startswith(
        "few rows: tasks.math.evaluation has 3, tasks.code.evaluation has 29; with fewer than 30, "
    )
    assert calibrating.startswith("few rows: tasks.code.calibration has 15; what is measured on fewer than 16 ")
    assert few_rows({"chat": data["chat"]}) == []
