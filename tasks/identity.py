"""What a step's result depends on, derived from the fields of its job: the canonical JSON that fingerprints hash."""

import dataclasses
import math
from collections.abc import Mapping, Set
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import BaseModel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Only:
    """Marks a setting that changes the results of one use only: `Annotated[int, Only("evaluation")]`."""

    use: str


@dataclasses.dataclass(frozen=True)
class For:
    """Marks a field of which only the settings count that one use has (see `Only`)."""

    use: str


@dataclasses.dataclass(frozen=True)
class _Local:
    """Marks a field that changes no result. A value, not an object: marks travel to workers with their classes."""


_LOCAL = _Local()
Local = Annotated[T, _LOCAL]
"""A field that changes no result: a path, a device, how work is shared out. `Local[Path]`"""


@dataclasses.dataclass(frozen=True)
class _Added:
    """Marks a field that its class did not have at first. A value, as `_Local` is."""


_ADDED = _Added()
Added = Annotated[T, _ADDED]
"""A field that came later and changes nothing where it is None: results of before stay known. `Added[str | None]`"""


def identity(value: Any, use: str | None = None, where: str = "") -> Any:
    """Return the JSON form of a value by which it is the same on every machine and in every run.

    Fields that are marked as local are left out, and those marked as added where they are None. Numbers, texts, None,
    sequences, mappings with texts as keys (their order counts), sets, dataclasses and pydantic models have such a form;
    of the last two, a class variable `version` counts too from 2 on.

    Args:
        value: the value.
        use: of the settings that change results of one use only, those of this one count; None: all of them.
        where: names the value in messages.

    Raises:
        TypeError: a value without such a form, such as a path or a tensor: a fault of the job that holds it.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case tuple() | list():
            return [identity(one, use, f"{where}[{number}]") for number, one in enumerate(value)]
        case Set():
            return sorted(identity(one, use, where) for one in value)
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: identity(one, use, f"{where}.{key}") for key, one in value.items()}
        case _ if isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            # A class whose meaning may change says which version of it this is. The first adds nothing, so that
            # champions that were scored before classes had versions stay comparable.
            version = getattr(type(value), "version", 1)
            found: dict[str, Any] = {} if version == 1 else {"version": version}
            for name, marks in _marks(type(value)).items():
                inner = next((mark.use for mark in marks if isinstance(mark, For)), use)
                only = next((mark.use for mark in marks if isinstance(mark, Only)), None)
                field = getattr(value, name)
                is_left_out = _LOCAL in marks or (_ADDED in marks and field is None)
                if not is_left_out and (only is None or use is None or only == use):
                    found[name] = identity(field, inner, f"{where}.{name}")
            return found
    raise TypeError(
        f"{where.lstrip('.') or 'value'}: {value!r} has no stable form; mark the field as Local if it changes no result"
    )


@cache
def _marks(schema: type) -> dict[str, tuple[Any, ...]]:
    """Return the marks of every field of a dataclass or pydantic model."""
    if issubclass(schema, BaseModel):
        return {name: tuple(info.metadata) for name, info in schema.model_fields.items()}
    assert dataclasses.is_dataclass(schema)
    hints = get_type_hints(schema, include_extras=True)
    return {one.name: getattr(hints[one.name], "__metadata__", ()) for one in dataclasses.fields(schema)}
