"""What a recipe says of settings that are tuned."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FiniteFloat, WithJsonSchema

from sensmerge.tasks.methods.contract import Method
from sensmerge.tasks.methods.settings import LARGEST_WEIGHT, WEIGHT, VariantSettings, combinations

AUTO = "auto"
MOST_CANDIDATES = 10_000
"""of a variant; each answers all rows to tune on"""


def _listed(tune: Any) -> Any:
    for key, candidates in tune.items() if isinstance(tune, dict) else ():
        if candidates != AUTO and not (isinstance(candidates, list) and candidates):
            raise ValueError(f"{key}: found {candidates}; expected a list of numbers to try")
    return {} if tune is None else tune


Tune = Annotated[dict[str, Literal["auto"] | list[FiniteFloat]], BeforeValidator(_listed)]
"""the values to try of each setting, by its key"""
_WEIGHT = {"type": "number", "minimum": -LARGEST_WEIGHT, "maximum": LARGEST_WEIGHT}
Weight = Annotated[
    float,
    WithJsonSchema({"anyOf": [_WEIGHT, {"const": AUTO}, {"type": "array", "items": _WEIGHT, "minItems": 1}]}),
]
"""a weight; `auto` says that it is tuned, see `with_auto_weight`, and a list is a sweep, see `expanded`"""


def with_auto_weight(variant: Any) -> Any:
    """Return what a recipe says of a variant with `tune: {weight: auto}` in place of `weight: auto`.

    Raises:
        ValueError: it says both.
    """
    if not isinstance(variant, dict) or variant.get(WEIGHT) != AUTO:
        return variant
    tune = variant.get("tune") or {}
    if not isinstance(tune, dict) or WEIGHT in tune:
        raise ValueError("weight: auto stands for tune: {weight: auto}; leave one of them out")
    return {key: value for key, value in variant.items() if key != WEIGHT} | {"tune": {WEIGHT: AUTO, **tune}}


def grid_of(tune: Mapping[str, Any], method: Method) -> dict[str, list[float]]:
    """Return the values to try of each setting, ascending; `auto` stands for the weights that the method names."""
    found = {key: method.weights if values == AUTO else values for key, values in tune.items()}
    return {key: sorted(set(map(float, values))) for key, values in found.items()}


def check_tune(tune: Mapping[str, Any], settings: VariantSettings) -> None:
    """Check what is tuned of a variant.

    Args:
        tune: the values to try, by key.
        settings: of the variant.

    Raises:
        ValueError: a setting that the variant does not have or that is no number, a value that it refuses, or a weight
            that makes no difference.
    """
    for key, values in tune.items():
        try:
            settings.value(key)
            if values == AUTO and key != WEIGHT:
                raise ValueError(f"found auto; expected a list of numbers, for only {WEIGHT} has usual ones")
            for value in grid_of(tune, settings.method)[key]:
                settings.having({key: value})
        except ValueError as error:
            raise ValueError(f"tune.{key}: {error}") from None
    count = math.prod(map(len, grid_of(tune, settings.method).values()))
    if count > MOST_CANDIDATES:
        raise ValueError(f"tune: {count:,} combinations; expected at most {MOST_CANDIDATES:,}: give fewer values")
    for values in combinations(grid_of(tune, settings.method), None):
        try:
            settings.having(values)
        except ValueError as error:
            raise ValueError(f"tune: {', '.join(f'{key} {one:g}' for key, one in values.items())}: {error}") from None
    if WEIGHT in tune and not settings.depends_on_weight:
        others = "set normalize: false, or leave it out" if hasattr(settings.method, "normalize") else "leave it out"
        raise ValueError(
            f"tune.weight: {settings.method.name} with these settings gives the same merge for every weight; {others}"
        )
