"""Numbers that change with depth, or from one part of a block to another: mergekit's gradients and filters."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from sensmerge.tasks.strict import Strict

Gradient = Annotated[list[FiniteFloat], Field(min_length=1)]
"""Numbers at even distances from the first block to the last; in between, on the line from one to the next."""


class Filtered(Strict):
    """A number, or some that change with depth, of the tensors whose names hold a text.

    Of several, the first that fits a tensor counts.
    """

    model_config = ConfigDict(title="numbers by filter")

    filter: str = Field("*", description="text in the names of tensors; *: all of them")
    value: FiniteFloat | Gradient = Field(description="their number, or numbers from the first block to the last")


Varying = Gradient | Annotated[list[Filtered], Field(min_length=1)]
"""Of several filters, the first that fits a tensor counts."""

VARYING: TypeAdapter[Varying] = TypeAdapter(Varying)


def number_at(setting: float | Varying, tensor: str, depth: float) -> float:
    """Return a setting's number for one tensor, as mergekit 0.1.5's `evaluate_setting` does.

    Args:
        setting: a number, numbers by depth, or those of filters.
        tensor: its name.
        depth: of its block, from 0, the first, to 1, the last; 0 outside the blocks.

    Raises:
        ValueError: no filter fits it.
    """
    if not isinstance(setting, list):
        return setting
    if not isinstance(setting[0], Filtered):
        numbers = [one for one in setting if not isinstance(one, Filtered)]
        place = depth * (len(numbers) - 1)
        first = int(place)
        share = place - first
        return (1 - share) * numbers[first] + share * numbers[min(first + 1, len(numbers) - 1)]
    for one in setting:
        if isinstance(one, Filtered) and (one.filter == "*" or one.filter in tensor):
            return number_at(one.value, tensor, depth)
    raise ValueError(f"no filter fits tensor {tensor}; add one for all others last: {{value: NUMBER}}")


def numbers_in(setting: float | Varying) -> Iterator[float]:
    """Yield all numbers that a setting names."""
    if not isinstance(setting, list):
        yield setting
        return
    for one in setting:
        yield from numbers_in(one.value if isinstance(one, Filtered) else one)


def varying_of(value: Any) -> Varying:
    """Read numbers that change with depth, or filters.

    Raises:
        ValueError: it is neither.
    """
    try:
        return VARYING.validate_python(value)
    except ValidationError:
        raise ValueError(
            "expected numbers from the first block to the last, as [0, 0.5, 1], or filters on the names of tensors, as "
            "[{filter: mlp, value: 0.5}, {value: 1}]"
        ) from None
