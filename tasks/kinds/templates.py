"""Templates of texts: `Question: {question}` with the fields of a row."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from sensmerge.tasks.errors import InputError


def template_fields(template: str) -> list[str]:
    """Names of the fields in a template, in order.

    A template is text with `{field}` as in `str.format`, but only plain names: no attribute, index, conversion or
    format, so a template cannot reach beyond the row. `{{` and `}}` are braces. Raises InputError for anything else.
    """
    return [field for _, field in _parts(template) if field is not None]


def render(template: str, row: Mapping[str, Any]) -> str:
    """The template with its fields replaced by the row's texts and whole numbers (see `checks.check_fields`)."""
    return "".join(text + ("" if field is None else str(row[field])) for text, field in _parts(template))


def _parts(template: str) -> list[tuple[str, str | None]]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; double a literal brace") from None
    for _, field, form, conversion in parts:
        if field is not None and (not field or set(field) & set(".[]") or form or conversion):
            raise InputError(f"template {template!r}: only plain {{field}} is allowed; double a literal brace")
    return [(text, field) for text, field, _, _ in parts]
