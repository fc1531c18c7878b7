"""The base of every schema that a recipe is made of."""

import json
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Strict(BaseModel):
    """A schema in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def mapping(example: str) -> BeforeValidator:
    """Return what refuses all but a mapping: a key without a value would be left out in silence.

    Args:
        example: some settings, for the message.
    """

    def check(value: Any) -> Any:
        if isinstance(value, dict | Strict):
            return value
        raise ValueError(f"found {json.dumps(value)}; expected {{}} for the defaults, or settings such as {example}")

    return BeforeValidator(check)
