"""What is said of tasks with few rows: nothing refuses them, and little can be learnt from them."""

from collections.abc import Mapping

from sensmerge.pipeline.plan.rows import TaskRows
from sensmerge.pipeline.plan.step import Split

FEW_SCORED = 30
"""Evaluation rows from which on nothing is said: an interval of an accuracy near 0.9 is then some 0.2 wide."""
FEW_CALIBRATING = 16
"""Calibration rows from which on nothing is said."""


def few_rows(data: Mapping[str, TaskRows]) -> list[str]:
    """Return a line for each use of rows of which some tasks have few."""
    lines = []
    if scored := _few(data, "evaluation", FEW_SCORED):
        lines.append(
            f"few rows: {scored}; with fewer than {FEW_SCORED}, 95 % intervals are so wide that they hardly tell which "
            "variant is the best, and the gate of `refresh` passes next to nothing; give more"
        )
    if calibrating := _few(data, "calibration", FEW_CALIBRATING):
        lines.append(
            f"few rows: {calibrating}; what is measured on fewer than {FEW_CALIBRATING} depends on which they are; "
            "give more, such as 64"
        )
    return lines


def _few(data: Mapping[str, TaskRows], split: Split, enough: int) -> str:
    counts = {name: len(getattr(one, split)) for name, one in data.items()}
    return ", ".join(f"tasks.{name}.{split} has {count}" for name, count in counts.items() if 0 < count < enough)
