"""What a recipe says of SE-Merging."""

from typing import Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from sensmerge.tasks.strict import Strict

ScoreName = Literal["nearest", "shift", "alignment", "centroid", "discriminant"]


PoolName = Literal["cls", "mean", "last"]


MetricName = Literal["l2", "cosine"]


OriginName = Literal["base", "static"]


class SeApplication(Strict):
    """SE-Merging (arXiv 2506.18135): coefficients for each input sample, from the experts that it resembles."""

    kind: Literal["se"]
    score: Literal["auto", "nearest", "shift", "alignment", "centroid", "discriminant"] = Field(
        "auto",
        description="rule that measures how much a sample resembles an expert; auto: the cheapest of the best rules",
    )
    layer: Literal["auto"] | int = Field(
        "auto", description="number of the block whose output is compared, counted from 1"
    )
    pool: Literal["auto", "cls", "mean", "last"] = Field(
        "auto", description="which part of the block's output is compared: first token, mean over tokens or last token"
    )
    metric: MetricName = Field(
        "l2", description="distance between two pooled hidden states (not for alignment and discriminant)"
    )
    temperature: FiniteFloat = Field(
        0.05, gt=0, description="T; large values approach the static merge, small ones a single expert"
    )
    origin: OriginName | None = Field(
        None,
        description="weights that task vectors start from. base: the base, and T → ∞ gives each expert its share in "
        "the static merge; static: the static merge, and T → ∞ is that merge itself. Default: base where the method "
        "merges by adding up task vectors and nothing is tuned or calibrated, otherwise static",
    )
    mass: FiniteFloat | None = Field(
        None,
        gt=0,
        description="sum of a sample's coefficients; the static merge's if left out. With origin static: coefficient "
        "of an expert that a sample resembles alone, 1 if left out",
    )
    fallback: float = Field(
        0.8,
        ge=0,
        le=1,
        description="lowest held-out accuracy on the calibration sets (lower end of its interval) at which a route is "
        "followed fully; below it, coefficients are pulled towards those of the static merge; 0: never",
    )

    @field_validator("layer", mode="before")
    @classmethod
    def _layer(cls, value: object) -> object:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise ValueError("expected auto, or the number of a block")

    @model_validator(mode="after")
    def _check(self) -> "SeApplication":
        own = {"alignment": "a cosine", "discriminant": "a Euclidean distance"}
        if self.score in own and "metric" in self.model_fields_set:
            raise ValueError(f"metric has no meaning for score {self.score}, which is {own[self.score]}; leave it out")
        return self
