"""What a recipe says of calibrating a merged model to its experts' features."""

from typing import Annotated

from pydantic import Field, FiniteFloat

from sensmerge.tasks.strict import Strict, mapping


class FeatureCalibration(Strict):
    """Calibrated features (FeatCal, arXiv 2605.13030): the merge is fitted, block after block, to its experts."""

    ridge: FiniteFloat = Field(
        0.05, ge=1e-6, description="how strongly weights are held to the anchor, against normalised inputs"
    )
    rho: FiniteFloat = Field(
        2.2, description="ρ: the anchor is base + ρ · (merge − base); 1 is the merge itself, above 1 beyond it"
    )
    alpha: FiniteFloat = Field(
        0.25,
        ge=0,
        le=1,
        description="α: share of the expert's own inputs in the inputs whose outputs are the target; the rest are the "
        "merge's",
    )


CalibrationSettings = Annotated[FeatureCalibration | None, mapping("{ridge: 0.1}")]
"""A key that is left out where nothing is calibrated."""
