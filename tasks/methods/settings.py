"""The settings of a variant that its weights depend on, and candidates for some of them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from sensmerge.tasks.coefficients import Coefficients, SensCoefficients, UniformCoefficients
from sensmerge.tasks.methods.contract import METHODS, Method, keys_of
from sensmerge.tasks.varying import Varying, number_at, numbers_in, varying_of

WEIGHT, TEMPERATURE = "weight", "temperature"
LARGEST_WEIGHT = 10
"""of either sign"""
WIDENED = 2
"""How many candidates are added at the end of a grid that the best one lies at."""

Values = Mapping[str, Any]
"""some settings by the keys that a recipe's `tune` has for them"""


@dataclass(frozen=True)
class VariantSettings:
    """What says how a variant combines its experts."""

    method: Method
    weight: float
    coefficients: Coefficients

    def value(self, key: str) -> Any:
        """Return a setting by its key.

        Raises:
            ValueError: there is no such setting, or it is no number that can be tuned.
        """
        keys = keys_of(type(self.method))
        if key == WEIGHT:
            return self.weight
        if key in keys and key != "seed":  # which random masks are best on a few rows is chance
            found = getattr(self.method, keys[key])
            if not isinstance(found, bool | str):
                return found
        elif key == TEMPERATURE and isinstance(self.coefficients, SensCoefficients):
            return self.coefficients.temperature
        raise ValueError(f"found {key}; expected some of {', '.join(self._tunable())}")

    def _tunable(self) -> list[str]:
        settings = type(self.method).model_fields
        numbers = [
            key
            for key, name in keys_of(type(self.method)).items()
            if key != "seed" and not isinstance(settings[name].get_default(call_default_factory=True), bool | str)
        ]
        sens = isinstance(self.coefficients, SensCoefficients)
        return [*([WEIGHT] if self.depends_on_weight else []), *numbers, *([TEMPERATURE] if sens else [])]

    @property
    def depends_on_weight(self) -> bool:
        """Whether a common factor of all weights makes a difference."""
        return self.method.depends_on_weight()

    def check_weights_used(self) -> None:
        """Check that there are no weights where the method has none.

        Raises:
            ValueError: it has none, and the settings say what they are.
        """
        if not self.method.no_weights:
            return
        for key, is_given in (
            (WEIGHT, self.weight != 1),
            ("coefficients", not isinstance(self.coefficients, UniformCoefficients)),
        ):
            if is_given:
                raise ValueError(
                    f"{key} has no meaning for method {self.method.name}: {self.method.no_weights}; leave it out"
                )

    def having(self, values: Values) -> "VariantSettings":
        """Return these settings with some others.

        Raises:
            ValueError: a value that the setting refuses.
        """
        found = self
        for key, value in values.items():
            try:
                found = found._with(key, value)
            except ValidationError as error:
                reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                raise ValueError(f"found {value}; {reason[:1].lower()}{reason[1:]}") from None
        return found

    def _with(self, key: str, value: Any) -> "VariantSettings":
        if key == WEIGHT:
            if abs(value) > LARGEST_WEIGHT:
                raise ValueError(f"found {value:g}; expected a number from {-LARGEST_WEIGHT} to {LARGEST_WEIGHT}")
            return replace(self, weight=value)
        keys = keys_of(type(self.method))
        if key not in keys:
            settings = self.coefficients.model_dump() | {key: value}
            return replace(self, coefficients=type(self.coefficients).model_validate(settings))
        whole = isinstance(getattr(self.method, keys[key]), int) and isinstance(value, float) and value.is_integer()
        settings = self.method.model_dump(by_alias=True) | {key: int(value) if whole else value}
        return replace(self, method=type(self.method).model_validate(settings))


VaryingSetting = Varying | dict[str, float | Varying]
"""A setting that changes from tensor to tensor: for all experts, or some of them"""


def varying_settings(settings: Mapping[str, Any]) -> dict[str, VaryingSetting]:
    """Return those of a method's settings that change from tensor to tensor, by key.

    Args:
        settings: `method`, and its settings by key. A list is one of these where the method takes a number.

    Raises:
        ValueError: one is no list of numbers or filters.
    """
    found: dict[str, VaryingSetting] = {}
    for key, value in settings.items():
        if not _is_number(settings.get("method"), key):
            continue
        inner = value.values() if isinstance(value, dict) else [value]
        if not any(isinstance(one, list) for one in inner):
            continue
        try:
            found[key] = (
                {k: varying_of(one) if isinstance(one, list) else one for k, one in value.items()}
                if isinstance(value, dict)
                else varying_of(value)
            )
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return found


def _is_number(method: Any, key: str) -> bool:
    """Return whether a setting of a method is a number, or a number for each expert; no lists of its own."""
    if not isinstance(method, str) or method not in METHODS:
        return False
    name = keys_of(METHODS[method]).get(key)
    return name is not None and _names_number(METHODS[method].model_fields[name].annotation)


def _names_number(annotation: Any) -> bool:
    if get_origin(annotation) in (list, tuple, set, frozenset):
        return False
    return annotation in (int, float) or any(_names_number(one) for one in get_args(annotation))


def varied(method: Method, varying: Mapping[str, VaryingSetting], tensor: str, depth: float) -> Method:
    """Return a method with the settings that it has for one tensor; `depth` as in `number_at`.

    Raises:
        ValueError: no filter fits the tensor.
    """
    found: dict[str, Any] = {}
    for key, setting in varying.items():
        try:
            found[key] = _at(setting, tensor, depth)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return type(method).model_validate(method.model_dump(by_alias=True) | found)


def _at(setting: VaryingSetting, tensor: str, depth: float) -> float | dict[str, float]:
    if isinstance(setting, dict):
        return {key: number_at(one, tensor, depth) for key, one in setting.items()}
    return number_at(setting, tensor, depth)


def samples_of(setting: VaryingSetting) -> Iterator[float | dict[str, float]]:
    """Yield values of a setting that hold every number that it names, each of them of a form that a method takes."""
    if not isinstance(setting, dict):
        yield from numbers_in(setting)
        return
    numbers = {key: list(numbers_in(one)) for key, one in setting.items()}
    for place in range(max(map(len, numbers.values()))):
        yield {key: some[min(place, len(some) - 1)] for key, some in numbers.items()}


def combinations(grid: Mapping[str, Sequence[float]], default: Values | None) -> list[Values]:
    """Return every combination of candidates (key → its candidates), and the default if it is none of them."""
    found: list[Values] = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return found if default is None or default in found else [*found, default]


def beyond(settings: VariantSettings, values: Sequence[float], best: float, key: str) -> list[float]:
    """Return further candidates where the best one is at the end of a grid, as far as the setting takes them.

    They go on as the grid ends: by the ratio of its last two where all are above 0, else by their difference; never
    below 0 where no candidate is.

    Args:
        settings: those of the variant.
        values: the grid, ascending.
        best: the best of it.
        key: of the setting.
    """
    if len(values) < 2 or best not in (values[0], values[-1]):
        return []
    near, last = (values[1], values[0]) if best == values[0] else (values[-2], values[-1])
    found = []
    for number in range(1, WIDENED + 1):
        step = last * (last / near) ** number if values[0] > 0 else last + number * (last - near)
        value = float(f"{step:.3g}")
        if values[0] >= 0 > value:
            break  # a grid of none below 0 has them on purpose
        try:
            settings.having({key: value})
        except ValueError:
            break
        found.append(value)
    return found
