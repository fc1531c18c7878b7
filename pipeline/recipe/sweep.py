"""Sweeps: one entry of a recipe's merges that stands for several variants, which differ in some settings."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

MOST = 200
"""Variants of one sweep."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")

Kept = Literal["all", "best"]
ALL, BEST = get_args(Kept)

Keep = Annotated[
    Kept,
    Field(
        exclude=True,
        default=ALL,
        description="of a sweep: whose weights stay in the store once all its variants are scored: those of all, or of "
        "the best one; scores stay, and weights that went are made again where a step reads them",
    ),
]

Sweep = Annotated[
    dict[str, list[Any] | dict[str, Any]],
    Field(
        exclude=True,
        default={},
        description="makes several variants of this entry: a list of values for each setting (such as weight or "
        "coefficients.temperature), of which all combinations are made, named as ta-weight-0.4; or settings by name, "
        "of which each name makes a variant, named as ta-NAME",
    ),
]


def expanded(merges: Any) -> Any:
    """Return a recipe's merges with every sweep replaced by its variants, in the order of its values.

    A list of weights is a sweep of them.

    Args:
        merges: as the YAML says them; anything but mappings is left to the schema.

    Raises:
        ValueError: what a sweep says makes no variants, or two of one name; the key is named.
    """
    if not isinstance(merges, dict):
        return merges
    found: dict[Any, Any] = {}
    for name, variant in merges.items():
        is_sweep = _is_sweep(variant)
        for member, settings, _ in _members(name, variant) if is_sweep else [(name, variant, {})]:
            if member in found or (is_sweep and member in merges):
                raise ValueError(f"merges.{name}: there are two variants {member}; rename one of them")
            found[member] = settings
    return found


@dataclass(frozen=True)
class Swept:
    """What a sweep has become."""

    members: Mapping[str, Mapping[str, Any]]
    """the settings in which its variants differ, by variant"""
    keep: str
    """whose weights stay: `all`, or `best`"""


def sweeps_of(merges: Any) -> dict[str, Swept]:
    """Return the sweeps of a recipe by entry; see `expanded`.

    Raises:
        ValueError: as `expanded`, and for a `keep` that there is not.
    """
    found = {}
    for name, variant in merges.items() if isinstance(merges, dict) else ():
        if _is_sweep(variant):
            keep = variant.get("keep", ALL)
            if keep not in get_args(Kept):
                raise ValueError(f"merges.{name}.keep: found {keep!r}; expected {' or '.join(get_args(Kept))}")
            found[name] = Swept({member: chosen for member, _, chosen in _members(name, variant)}, keep)
    return found


def _is_sweep(variant: Any) -> bool:
    return isinstance(variant, dict) and ("sweep" in variant or isinstance(variant.get("weight"), list))


def _members(name: str, variant: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the variants of a sweep: name, entry of the recipe, and which settings the sweep chose for it."""
    key, rest = f"merges.{name}.sweep", dict(variant)
    rest.pop("keep", None)
    sweep = rest.pop("sweep", {})
    if isinstance(rest.get("weight"), list) and isinstance(sweep, dict):
        sweep = {"weight": rest.pop("weight"), **sweep}
    if not isinstance(sweep, dict) or not sweep:
        raise ValueError(f"{key}: expected settings with the list of values of each, as in weight: [0.2, 0.4]")
    if all(isinstance(settings, dict) for settings in sweep.values()):
        for label, settings in sweep.items():
            yield f"{name}-{label}", _with(rest, settings, key), settings
        return
    for setting, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}.{setting}: expected a list of at least one value")
    count = 1
    for values in sweep.values():
        count *= len(values)
    if count > MOST:
        raise ValueError(f"{key}: makes {count} variants; expected at most {MOST}")
    for values in product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        label = "-".join(f"{setting.rpartition('.')[2]}-{_label(value, key)}" for setting, value in chosen.items())
        yield f"{name}-{label}", _with(rest, chosen, key), chosen


def _label(value: Any, key: str) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, list | dict) or not _NAME.fullmatch(text):
        raise ValueError(
            f"{key}: a variant cannot be named after such a value; give the variants names, as in "
            "sweep: {low: {weight: 0.2}, high: {weight: 0.6}}"
        )
    return text


def _with(variant: Mapping[str, Any], settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an entry with settings added; those with dots are inside others."""
    found = copy.deepcopy(dict(variant))
    for setting, value in settings.items():
        *path, last = str(setting).split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}.{setting}: {part} holds a single value, not a mapping")
        if last in inner:
            raise ValueError(f"{key}.{setting}: is set beside the sweep too; set it in one of the two")
        inner[last] = value
    return found
