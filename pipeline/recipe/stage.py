"""The stages of the workflow; workers read it, so it imports nothing."""

from typing import Literal

Stage = Literal[
    "download", "task_vectors", "statistics", "cross_task", "tune", "merge", "calibrate", "route", "evaluate"
]
