"""What a field of a row may hold, and what messages call what it holds instead."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.rows.source import Row


class NamedField(NamedTuple):
    """A field of a row that a setting of the task names."""

    name: str
    setting: str
    is_text: bool
    """whether the model reads it"""


def check_fields(fields: Sequence[NamedField], row: Row, settings: str, where: str) -> None:
    """Check that a row has all fields that a task names, and a text or a whole number where the model reads it.

    Args:
        fields: that the task names.
        row: the row.
        settings: where the recipe has the task (`tasks.math`).
        where: names the row in messages.

    Raises:
        InputError: names setting, row and field.
    """
    for field, setting, text in fields:
        named = f"{settings}.{setting} names field {field!r}"
        if field not in row:
            raise InputError(f"{named}, {where} has {', '.join(map(repr, row)) or 'no field'}")
        if row[field] is None:
            raise InputError(f"{named}, which is null in {where}; leave the row out, or write a text")
        if text and not is_text(row[field]):
            raise InputError(
                f"{named}, which is {_described(row[field])} in {where}; expected a text or a whole number: "
                "write it into the row as the text that the model is to read"
            )
        if isinstance(row[field], str) and not is_unicode(row[field]):
            raise InputError(f"{named}, which has half a surrogate pair in {where}; repair the text, or leave it out")


def is_text(value: Any) -> bool:
    """Whether a value has one text that a model can read: JSON's `true` is not Python's `True`."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def is_unicode(text: str) -> bool:
    """Whether a text has none of the halves of characters that JSON can spell and no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def whole_number(value: Any) -> int | None:
    """A number of a class or a choice, given as such or as its decimal text (all that a CSV file has); else None."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 10 and str(int(value)) == value:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number_of(value: Any) -> float | None:
    """A number, given as such or as its text; None for anything else, and for what is not finite."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_number(value: Any, named: str) -> None:
    """Raise InputError if a value is no finite number; `named` says which setting names it, in which row."""
    if number_of(value) is None:
        raise InputError(f"{named} is {shown(value)}; expected a finite number")


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    names = {dict: "an object", list: "a list", float: f"the number {value!r} without a text of its own"}
    return names.get(type(value), f"a {type(value).__name__} ({value})")
