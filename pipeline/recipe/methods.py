"""What the JSON Schema of recipes says of the settings of methods."""

import json

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue

from sensmerge.tasks.methods.contract import METHODS


def method_properties(handler: GetJsonSchemaHandler) -> dict[str, JsonSchemaValue]:
    """Return the JSON schemas of `method` and of the settings of all methods, by key."""
    found: dict[str, dict[str, JsonSchemaValue]] = {}
    for name, method in METHODS.items():
        for key, schema in handler.resolve_ref_schema(handler(method.__pydantic_core_schema__))["properties"].items():
            found.setdefault(key, {})[name] = schema
    properties: dict[str, JsonSchemaValue] = {"method": {"enum": list(METHODS), "description": "merge method"}}
    for key, by_method in found.items():
        if key != "method":
            properties[key] = _shared_property(by_method)
    return properties


def _shared_property(by_method: dict[str, JsonSchemaValue]) -> JsonSchemaValue:
    """Return the JSON schema of a setting that some methods have; say which, and what it is to each if that differs."""
    first, types = next(iter(by_method.values())), list[JsonSchemaValue]()
    defaults: dict[str, list[str]] = {}
    meanings: dict[str, list[str]] = {}
    for name, one in by_method.items():
        meanings.setdefault(one.get("description", ""), []).append(name)
        kind = {key: value for key, value in one.items() if key not in ("default", "description", "title")}
        types += [] if kind in types else [kind]
        default = f"default: {json.dumps(one['default'])}" if "default" in one else "required"
        defaults.setdefault(default, []).append(name)
    said = [text for text in meanings if text]
    if len(meanings) > 1:
        said = [f"{text} ({', '.join(names)})" for text, names in meanings.items()]
    elif len(by_method) < len(METHODS):
        said += [f"only for {', '.join(by_method)}"]
    if len(defaults) > 1:
        said += [f"{default} for {', '.join(names)}" for default, names in defaults.items()]
    kept = {
        key: first[key] for key in ("default", "title") if key in first and (key != "default" or len(defaults) == 1)
    }
    return kept | (types[0] if len(types) == 1 else {"anyOf": types}) | {"description": "; ".join(said)}
