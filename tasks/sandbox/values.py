"""Values that two processes exchange without trust: only plain ones, rebuilt by their reader."""

import builtins
import datetime
from collections import deque, namedtuple
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_NAMED: Any = namedtuple
"""It takes nothing but names: none of another's code can be in them."""
_MANY: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
_TEXTS: dict[str, Callable[[str], Any]] = {
    "Decimal": Decimal,
    "Fraction": Fraction,
    "float": float,
    "complex": complex,
    "bytes": bytes.fromhex,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
}


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a value as JSON. Of one that is not plain, `refer` gives what stands for it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", int.__format__(value, "x")]
    if isinstance(value, datetime.date | datetime.time):
        kind = next(one for one in (datetime.datetime, datetime.date, datetime.time) if isinstance(value, one))
        return [kind.__name__, value.isoformat()]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, float | complex | Decimal | Fraction):
        number: Any = next(one for one in (float, complex, Decimal, Fraction) if isinstance(value, one))
        return [number.__name__, number.__str__(value)]
    if isinstance(value, dict):
        return ["dict", *([encode(key, refer), encode(one, refer)] for key, one in dict.items(value))]
    if isinstance(value, tuple) and hasattr(type(value), "_fields") and hasattr(type(value), "_make"):
        named: Any = type(value)
        return [
            "namedtuple",
            named.__name__,
            list(named._fields),
            *(encode(one, refer) for one in tuple.__iter__(value)),
        ]
    if isinstance(value, list | tuple | set | frozenset | deque):
        many: Any = next(one for one in (list, tuple, set, frozenset, deque) if isinstance(value, one))
        return [many.__name__, *(encode(one, refer) for one in many.__iter__(value))]
    if isinstance(value, type) and value.__module__ == "builtins":
        return ["type", value.__name__]
    return ["object", refer(value)]


def decode(value: Any, resolve: Callable[[Any], Any]) -> Any:
    """Return the value that `encode` wrote; `resolve` is the inverse of `refer`.

    Only plain values are made here, so whatever the other side wrote, none of its code runs. Raises ValueError for what
    is no such value.
    """
    if not isinstance(value, list):
        return value
    name, *parts = value
    if name == "object":
        return resolve(parts[0])
    if name == "type" and isinstance(getattr(builtins, parts[0], None), type):
        return getattr(builtins, parts[0])
    if name == "int":
        return int(parts[0], 16)
    if name == "dict":
        return {decode(key, resolve): decode(one, resolve) for key, one in parts}
    if name == "namedtuple":
        title, fields, *values = parts
        return _NAMED(title, fields)._make(decode(one, resolve) for one in values)
    if name in _TEXTS:
        return _TEXTS[name](parts[0])
    if name in _MANY:
        return _MANY[name]([decode(one, resolve) for one in parts])
    raise ValueError(f"no value is called {name!r}")
