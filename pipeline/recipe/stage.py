"""The stages of the workflow; workers read it, so it imports nothing."""

from typing import Literal

Stage = Literal[
    "download",
    "heads",
    "task_vectors",
    "statistics",
    "cross_task",
    "tune",
    "merge",
    "calibrate",
    "vectors",
    "route",
    "evaluate",
]
