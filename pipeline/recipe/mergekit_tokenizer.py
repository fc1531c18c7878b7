"""What a configuration of mergekit says of the tokenizer, as a recipe has it."""

from collections.abc import Callable, Mapping
from typing import Any

from sensmerge.tasks.errors import InputError, shown

Named = Callable[[Any, str], str]
"""Returns the recipe's name of a model, as mergekit names it, at a place that messages name."""
_KEYS = ("source", "pad_to_multiple_of", "tokens")


def tokenizer_of(data: Mapping[str, Any], named: Named) -> dict[str, Any]:
    """Return the recipe's `tokenizer`; mergekit takes that of the base where nothing is said.

    Where something is, mergekit leaves no rows without a token but those that it is asked for.

    Args:
        data: the configuration.
        named: names a model.

    Raises:
        InputError: what no recipe can say; names the key and a way out.
    """
    source, settings, where = data.get("tokenizer_source"), data.get("tokenizer"), "tokenizer_source"
    found: dict[str, Any] = {}
    if settings is not None:
        if source is not None:
            raise InputError("tokenizer_source: stands beside tokenizer; leave it out")
        if not isinstance(settings, dict):
            raise InputError(f"tokenizer: found {shown(settings)}; expected a mapping")
        for key in settings.keys() - set(_KEYS):
            raise InputError(f"tokenizer.{key}: unknown key; expected {', '.join(_KEYS)}")
        source, where = settings.get("source", "union"), "tokenizer.source"
        tokens = settings.get("tokens") or {}
        if not isinstance(tokens, dict):
            raise InputError(f"tokenizer.tokens: found {shown(tokens)}; expected a mapping")
        if tokens:
            found["tokens"] = {
                str(token): _token(one, f"tokenizer.tokens.{token}", named) for token, one in tokens.items()
            }
        found["pad_to_multiple_of"] = settings.get("pad_to_multiple_of")
    if source is None:
        found = {"source": "base"}
    else:
        found = {
            **found,
            "source": source if source in ("base", "union") else named(source, where),
            "pad_to_multiple_of": found.get("pad_to_multiple_of") or 1,
        }
    template = data.get("chat_template")
    return found if not template else {**found, "chat_template": _template(template)}


def _token(value: Any, where: str, named: Named) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() - {"source", "force"} or value.get("source") is None:
        raise InputError(f"{where}: found {shown(value)}; expected {{source: …, force: true or false}}")
    source, found = value["source"], dict[str, Any]()
    if not isinstance(source, dict) or "kind" not in source:
        found["source"] = named(source, f"{where}.source")
    elif "model" in source:
        found["source"] = {**source, "model": named(source["model"], f"{where}.source.model")}
    else:
        found["source"] = source
    return {**found, "force": True} if value.get("force") else found


def _template(value: Any) -> str:
    if value == "auto" or (isinstance(value, str) and "{" in value):
        return str(value)
    raise InputError(
        f"chat_template: found {shown(value)}; expected auto or a Jinja template: write the template that mergekit has "
        "under that name"
    )
