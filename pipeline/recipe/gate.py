"""How `refresh` chooses the champion."""

from pydantic import Field, FiniteFloat

from sensmerge.tasks.artifacts import canonical
from sensmerge.tasks.strict import Strict

MEAN_NORMALISED = "mean_normalised"


class Gate(Strict):
    """Which variant `refresh` proposes as champion, and how much worse than the current champion it may be."""

    metric: str = Field(
        MEAN_NORMALISED,
        description="metric that chooses the best variant: mean_normalised, or TASK/METRIC such as math/exact_match",
    )
    variants: list[str] | None = Field(
        None,
        min_length=1,
        description="variants that may become champion; default: all static ones. A dynamic one (application se) "
        "must be named here, because servers that load checkpoints cannot load it",
    )
    tolerance: FiniteFloat = Field(
        0.02,
        ge=0,
        description="share of the champion's score that a challenger may lose on a task, measured at the worse end of "
        "the 95 % interval of their difference",
    )

    def text(self) -> str:
        """Return the settings as the one text that two equal gates have."""
        return canonical(self.model_dump())
