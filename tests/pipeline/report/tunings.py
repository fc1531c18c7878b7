"""A tuned variant, as a report has it."""

from typing import Any

from sensmerge.pipeline.report.report import TriedInfo, TuningInfo
from sensmerge.tasks.kinds.scores import Score


def around(value: float, width: float = 0.1, n: int = 80) -> Score:
    return Score(value, n, value - width, value + width)


def tuning(**changes: Any) -> TuningInfo:
    """Weights and densities of two tasks; weight 0.5 and density 0.2 are the best."""
    tried = [
        TriedInfo(
            values={"weight": weight, "density": density},
            mean=around(1 - abs(weight - 0.5) - density / 10),
            behind=around(abs(weight - 0.5) + (density - 0.2) / 10, width=0.05),
            tasks={"math": around(0.9 - weight / 10), "code": around(weight)},
        )
        for weight in (0.3, 0.5, 1.0)
        for density in (0.2, 1.0)
    ]
    best = {"weight": 0.5, "density": 0.2}
    settings = {
        "split": "tuning",
        "tried": tried,
        "chosen": best,
        "best": best,
        "default": None,
        "metrics": {"math": "exact_match", "code": "accuracy"},
        "notes": ["weight 0.5 was the best and at the end of the grid, so 1 came into it too"],
    }
    return TuningInfo(**(settings | changes))
