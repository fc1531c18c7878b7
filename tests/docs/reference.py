"""The reference of the recipe, in Markdown, from its JSON Schema."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Node = Mapping[str, Any]
"""A schema, or a part of one."""
BOUNDS = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
DISCRIMINATORS = ("kind", "method")
MOST_PATHS = 5
"""A mapping that may stand in more places is called by its name, and not by all of them."""


@dataclass
class _Section:
    """What one mapping of a recipe may hold."""

    node: Node
    paths: list[str] = field(default_factory=list)
    """where a recipe has such a mapping"""

    @property
    def title(self) -> str:
        if len(self.paths) > MOST_PATHS:
            return str(self.node["title"])
        return ", ".join(f"`{path}`" for path in self.paths)

    @property
    def anchor(self) -> str:
        """What GitHub makes of the title."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")


def reference(schema: Node) -> str:
    """Return a section for every mapping of a recipe, outermost first, with a table of its keys."""
    sections = _sections(schema)
    return "\n\n".join(_section(one, sections, schema) for one in sections.values())


def _sections(schema: Node) -> dict[str, _Section]:
    """Return the mappings of a schema by the names of their definitions, breadth first."""
    sections = {"": _Section(schema, ["recipe"])}
    waiting = [("", "")]
    while waiting:
        name, path = waiting.pop(0)
        for key, node in sections[name].node.get("properties", {}).items():
            for below, inner in _definitions(node, f"{path}.{key}".lstrip("."), schema):
                known = inner in sections
                section = sections.setdefault(inner, _Section(schema["$defs"][inner]))
                if below not in section.paths:
                    section.paths.append(below)
                if not known:
                    waiting.append((inner, below.partition(" ")[0]))
    return sections


def _definitions(node: Node, path: str, schema: Node) -> Iterator[tuple[str, str]]:
    """Yield where, and by which name, a value refers to definitions of mappings."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if "properties" in schema["$defs"][name]:
            yield path + _kind(schema["$defs"][name]), name
    for one in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _definitions(one, path, schema)
    if inner := _inner(node):
        yield from _definitions(inner, f"{path}.{'STAGE' if path == 'resources' else 'NAME'}", schema)
    if "items" in node:
        yield from _definitions(node["items"], path, schema)


def _inner(node: Node) -> Node | None:
    """Return the schema of the values of a mapping whose keys are names."""
    values = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
    return next((one for one in values if isinstance(one, Mapping)), None)


def _kind(node: Node) -> str:
    """Return what tells one mapping from the others that may stand in its place."""
    for key in DISCRIMINATORS:
        if "const" in node["properties"].get(key, {}):
            return f" with {key}: {node['properties'][key]['const']}"
    return ""


def _section(section: _Section, sections: Mapping[str, _Section], schema: Node) -> str:
    node = section.node
    lines = [f"### {section.title}", "", node.get("description", ""), ""]
    if node["properties"]:
        lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in node["properties"].items():
        is_required = key in node.get("required", ())
        cells = [
            f"`{key}`",
            _values(value, sections, schema),
            "required" if is_required else _default(value, schema),
            value.get("description", ""),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).rstrip()


def _values(node: Node, sections: Mapping[str, _Section], schema: Node) -> str:
    """Say which values a key takes."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if name in sections:
            inner = _kind(schema["$defs"][name]).removeprefix(" with ")
            if len(sections[name].paths) > MOST_PATHS:
                inner = sections[name].title
            return f"[{inner or 'mapping'}](#{sections[name].anchor})"
        return _values(schema["$defs"][name], sections, schema)
    choices = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if choices:
        said = [_values(one, sections, schema) for one in choices if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(said))
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{one}`" for one in node["enum"])
    match node.get("type"):
        case "object":
            inner = _inner(node)
            of = _values(inner, sections, schema) if inner else "anything"
            names = _values(node["propertyNames"], sections, schema) if "enum" in node.get("propertyNames", {}) else ""
            return f"{names or 'name'} → {f'({of})' if ' or ' in of and inner and 'anyOf' in inner else of}"
        case "array":
            return f"list of {_values(node['items'], sections, schema)}"
        case "integer" | "number" as kind:
            bounds = [f"{sign} {node[key]:,}" for key, sign in BOUNDS.items() if key in node]
            return " ".join(["whole number" if kind == "integer" else "number", ", ".join(bounds)]).strip()
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text"
    return "anything"


def _default(node: Node, schema: Node) -> str:
    """Say what a key that is left out stands for; nothing where its meaning says so."""
    value = node.get("default")
    if value is None or value == {}:
        return ""
    if isinstance(value, Mapping):
        kinds = [f"`{key}: {value[key]}`" for key in DISCRIMINATORS if key in value]
        return (
            kinds[0] if kinds else ", ".join(f"`{key}: {inner}`" for key, inner in value.items() if inner is not None)
        )
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
