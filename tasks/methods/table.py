"""The table of methods, as the documentation shows it."""

import json
from collections.abc import Callable

from sensmerge.tasks.methods.contract import METHODS, Additive, Method, keys_of


def methods_table() -> str:
    """Return a Markdown table of all methods: what they do, need and go with, and their settings."""
    columns: dict[str, Callable[[type[Method]], str]] = {
        "what it does": _summary,
        "experts": _experts,
        "needs": _needs,
        "settings and defaults": _settings,
        "random": _random,
        "GPU": _gpu,
        "weights, sens coefficients": _weights,
        "application se": _se,
    }
    header = ["method", *columns]
    rows = [[f"`{name}`", *(cell(method) for cell in columns.values())] for name, method in METHODS.items()]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, ["---"] * len(header), *rows))


def _summary(method: type[Method]) -> str:
    return (method.__doc__ or "").strip().partition("\n")[0]


def _experts(method: type[Method]) -> str:
    least, most = method.least_experts, method.most_experts
    return f"{least} or more" if most is None else str(most) if least == most else f"{least} to {most}"


def _needs(method: type[Method]) -> str:
    scope = {
        "elements": "elements, in pieces",
        "tensor": "pieces, after a look through the whole tensor",
        "matrix": "whole tensors",
    }[method.needs]
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


def _weights(method: type[Method]) -> str:
    return f"no: {method.no_weights}" if method.no_weights else "yes"


def _se(method: type[Method]) -> str:
    if method.most_experts == 1:
        return "no: there is one expert"
    if issubclass(method, Additive):
        return "from base or static merge"
    return f"from static merge; not from base: {method.no_se}"
