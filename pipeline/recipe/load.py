"""Reads recipes: YAML, overrides, and one line for what the schema refuses."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sensmerge.pipeline.recipe.mergekit import MERGE_METHOD, is_mergekit, recipe_name, recipe_of
from sensmerge.pipeline.recipe.parse import parse, read_text
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.sweep import sweeps_of
from sensmerge.tasks.errors import InputError, shown

_NAMED = ("experts", "tasks", "merges", "tokens")
"""Keys of mappings whose own keys are names that anybody may choose."""


def read_recipe(path: Path, only_mergekit: bool = False) -> dict[str, Any]:
    """Return what a file says: of a recipe, its YAML; of a configuration of mergekit, that of the recipe it comes to.

    Args:
        path: of the file.
        only_mergekit: whether to refuse a recipe.

    Raises:
        InputError: no such file, no YAML mapping, or what of mergekit's no recipe can say.
    """
    text = read_text(path)
    try:
        data = parse(text)
        if not isinstance(data, dict):
            raise InputError(f"found {type(data).__name__}; expected a mapping with name, base, experts, merges")
        if only_mergekit and not is_mergekit(data):
            raise InputError(
                f"{MERGE_METHOD} is missing; expected a configuration of mergekit, for recipes run as they are"
            )
        return recipe_of(data, recipe_name(path), path.absolute().parent) if is_mergekit(data) else data
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, or a configuration of mergekit, and apply `a.b=value` overrides (values are YAML).

    Raises:
        InputError: as `read_recipe`, and what the schema refuses, naming the key.
    """
    data = read_recipe(path)
    for override in overrides:
        _override(data, override)
    return checked(data, path)


def checked(data: dict[str, Any], path: Path) -> Recipe:
    """Return the recipe that a file's YAML says.

    Raises:
        InputError: what the schema refuses, naming file and key.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_error(error)}{_of_sweep(error, data)}") from error


def _override(data: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise InputError(f"--set {override}: expected a.b=value")
    try:
        found = parse(value)
    except InputError as error:
        raise InputError(f"--set {override}: {error}") from error
    _set(data, keys, found, override)


def _set(target: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    # The longest key that is there first: names of variants may hold dots.
    count = next((n for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in target), 1)
    name, rest = ".".join(keys[:count]), keys[count:]
    if not rest:
        target[name] = value
        return
    if target.get(name) is None:
        target[name] = {}
    if not isinstance(target[name], dict):
        raise InputError(f"--set {override}: {name} holds a single value, not a mapping")
    _set(target[name], rest, value, override)


def _first_error(error: ValidationError) -> str:
    """Return the first of pydantic's findings as one line: key, what was found, what was expected."""
    errors = error.errors()
    first = errors[0]
    if isinstance(first["input"], dict | list) and first["type"].endswith("_type"):
        # One number or a mapping of numbers: of a mapping, what is wrong in it is found after what it is not.
        first = next((one for one in errors[1:] if one["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]), first)
    # Unions put the chosen kind or type into the path; the recipe's own keys have no such part.
    parts = [str(part) for part in first["loc"]]
    key = ".".join(part for position, part in enumerate(parts) if not (position > 0 and _is_tag(parts, position)))
    if first["type"] == "extra_forbidden":
        meant = _meant(parts[-1], _keys_at(first["loc"][:-1]))
        return f"unknown key {key}; {meant + ' ' if meant else ''}see `sensmerge schema` for the keys that exist"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    found = first["input"]
    said = f" (found {shown(found)})" if isinstance(found, str | int | float | bool) else ""
    if first["type"] == "union_tag_invalid":
        found = first["ctx"]["tag"]
    if first["type"] in ("literal_error", "union_tag_invalid"):
        meant = _meant(found, [word for word in re.findall(r"'([^']+)'", message) if word != found])
        said += f"; {meant}" if meant else ""
    return f"{key + ': ' if key else ''}{message}{said}"


def _of_sweep(error: ValidationError, data: Mapping[str, Any]) -> str:
    """Return which sweep of the recipe the variant is of that the first finding is about; empty if it is of none."""
    place = error.errors()[0]["loc"]
    if len(place) < 2 or place[0] != "merges":
        return ""
    entries = [name for name, one in sweeps_of(data["merges"]).items() if place[1] in one.members]
    return f" (merges.{place[1]} comes of merges.{entries[0]})" if entries else ""


def _meant(word: Any, words: Sequence[str]) -> str:
    """Return a question for the word that somebody may have wanted to write; empty if none is like theirs."""
    near = get_close_matches(word, words, 1) if isinstance(word, str) else []
    return f"did you mean {near[0]}?" if near else ""


def _keys_at(place: Sequence[int | str]) -> list[str]:
    """Return the keys that the schema has at a place of a recipe."""
    schema = Recipe.model_json_schema()
    found = list(_alternatives(schema, schema))
    for part in place:
        inner = [one["properties"][part] for one in found if part in one.get("properties", {})]
        for one in () if inner else found:
            inner += [*one.get("patternProperties", {}).values(), one.get("additionalProperties")]
        # Pydantic names the kind of a task or of coefficients in a place, too; recipes do not.
        found = [each for one in inner if isinstance(one, dict) for each in _alternatives(one, schema)] or found
    return sorted({key for one in found for key in one.get("properties", {})})


def _alternatives(one: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a part of a JSON Schema, with all that it refers to and offers to choose from."""
    yield one
    if "$ref" in one:
        yield from _alternatives(schema["$defs"][one["$ref"].removeprefix("#/$defs/")], schema)
    for each in (*one.get("anyOf", ()), *one.get("oneOf", ()), *one.get("allOf", ())):
        yield from _alternatives(each, schema)


def _is_tag(parts: list[str], position: int) -> bool:
    """Return whether a part of an error's path is the kind of coefficients or application, or a type, and no key."""
    part, before = parts[position], parts[position - 1]
    if part == "[key]" or part.startswith(("dict[", "list[", "tagged-union[")) or before.startswith("tagged-union["):
        return True
    if part in ("float", "int", "bool", "str"):  # of what may be something else; an expert may have the name, too
        return position == len(parts) - 1 and not before.startswith("dict[") and before not in _NAMED
    return part in ("uniform", "explicit", "sens", "static", "se") and before in ("coefficients", "application")
