"""The messages and tools of a row, as data sets have them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.kinds.checks import is_unicode
from sensmerge.tasks.strict import Strict


class MessageTemplate(Strict):
    """One message of every row."""

    role: str = Field(min_length=1, description="who speaks: system, user, assistant, …, as the chat template has it")
    content: str = Field(description="template of what is said; {field} is a field of the row")


def read_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return messages as chat templates read them.

    Keys that are null are left out. Arguments of tools that are called may be given as JSON text, as OpenAI has them;
    templates read them as objects.

    Args:
        value: a list of objects with role and content, or its JSON text.
        where: names row and field in messages.

    Raises:
        InputError: anything else, which it names.
    """
    found = _parsed(value)
    if not isinstance(found, list) or not found:
        raise InputError(f"{where} is {shown(value)}, expected a list of messages: [{{role: user, content: …}}, …]")
    return [_message(one, f"{where}[{place}]") for place, one in enumerate(found)]


def read_tools(value: Any, where: str) -> list[Any] | None:
    """Return the tools of a row: JSON schemas, None where there are none; arguments and errors as `read_messages`."""
    found = _parsed(value)
    if found is None or found in ([], ""):  # a CSV file has nothing else to say that there are none
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{where} is {shown(value)}, expected a list of JSON schemas of functions, or null")
    _check_unicode(found, where)
    return found


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {shown(value)}, expected an object with role and content")
    message = {key: one for key, one in value.items() if one is not None}
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if role is None and content is None:
        raise InputError(f"{where} has {', '.join(map(repr, value)) or 'no field'}; expected role and content")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where}.role is {shown(role)}, expected a text: system, user, assistant, tool, …")
    if calls is not None:
        if not isinstance(calls, list):
            raise InputError(f"{where}.tool_calls is {shown(calls)}, expected a list of calls")
        message["tool_calls"] = [_call(one, f"{where}.tool_calls[{place}]") for place, one in enumerate(calls)]
    if not isinstance(content, str) and not (content is None and calls):
        raise InputError(f"{where}.content is {shown(content)}, expected a text")
    _check_unicode(message, where)
    return message


def _call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} is {shown(value)}, expected an object with a function's name and arguments")
    arguments = _parsed(function.get("arguments", {}))
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: arguments are {shown(function['arguments'])}, expected an object or its JSON text")
    function = {**function, "arguments": arguments}
    return {**value, "function": function} if "function" in value else function


def _parsed(value: Any) -> Any:
    """Return what a JSON text says; anything else, and a text that is none, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _check_unicode(value: Mapping[str, Any] | Sequence[Any], where: str) -> None:
    if not is_unicode(json.dumps(value, ensure_ascii=False, default=str)):
        raise InputError(f"{where} has half a surrogate pair; repair the text, or leave the row out")
