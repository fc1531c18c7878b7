"""The table of methods, as the documentation shows it."""

import json

from sensmerge.tasks.methods.contract import METHODS, Additive, Method, keys_of


def methods_table() -> str:
    """Return a Markdown table of all methods: what they do and need, their settings, and where se can start from."""
    header = ["method", "what it does", "needs", "settings and defaults", "random", "GPU", "application se"]
    cells = (_summary, _needs, _settings, _random, _gpu, _se)
    rows = [[f"`{name}`", *(cell(method) for cell in cells)] for name, method in METHODS.items()]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, ["---"] * len(header), *rows))


def _summary(method: type[Method]) -> str:
    return (method.__doc__ or "").strip().partition("\n")[0]


def _needs(method: type[Method]) -> str:
    scope = {"elements": "elements, in pieces", "matrix": "whole tensors"}[method.needs]
    return ", ".join([scope, *(f"the statistic `{name}` of each expert" for name in method.statistics)])


def _settings(method: type[Method]) -> str:
    found = []
    for key, schema in method.model_json_schema()["properties"].items():
        if key != "method":
            found.append(f"`{key}: {json.dumps(schema['default'])}`" if "default" in schema else f"`{key}` (required)")
    return ", ".join(found) or "–"


def _random(method: type[Method]) -> str:
    return "yes, from `seed`" if "seed" in keys_of(method) else "no"


def _gpu(method: type[Method]) -> str:
    return "yes" if "cuda" in method.devices else "no"


def _se(method: type[Method]) -> str:
    return "from base or static merge" if issubclass(method, Additive) else "from static merge"
