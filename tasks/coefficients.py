"""How much of each expert, in each layer: from sensitivities and cross-task distances to the weights of a merge."""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from sensmerge.tasks.strict import Strict

PerExpert = dict[str, float]
Weights = dict[str, PerExpert]
"""weights[layer][expert]"""


class UniformCoefficients(Strict):
    """Every expert has the variant's `weight` in every layer."""

    kind: Literal["uniform"] = "uniform"


class ExplicitCoefficients(Strict):
    """Your own numbers; each is multiplied by the variant's `weight`."""

    kind: Literal["explicit"]
    weights: dict[str, FiniteFloat | dict[str, FiniteFloat]] = Field(
        description="expert → number, or expert → {layer pattern: number}; the last matching pattern wins"
    )


class SensCoefficients(Strict):
    """Sens-Merging (arXiv 2502.12420): σ = softmax over experts of (α · τ / temperature) in each layer."""

    kind: Literal["sens"]
    temperature: FiniteFloat = Field(1.0, gt=0, description="T; large values approach uniform coefficients")
    direction: Literal["distance", "similarity"] = Field(
        "distance", description="whether τ comes from the cross-task distances g themselves or from 1 / (1 + g)"
    )


Coefficients = Annotated[
    UniformCoefficients | ExplicitCoefficients | SensCoefficients,
    Field(discriminator="kind"),
]


class Lines(Strict):
    """LiNeS (arXiv 2410.17146): a factor on all weights that grows evenly from the first block to the last."""

    first: FiniteFloat = Field(ge=0, description="factor in the first block and in what comes before the blocks")
    last: FiniteFloat = Field(1.0, ge=0, description="factor in the last block and in what comes after the blocks")

    def at(self, depth: float) -> float:
        """Return the factor at a depth between 0, the first block, and 1, the last."""
        return self.first + depth * (self.last - self.first)


def alpha(sensitivity: PerExpert) -> PerExpert:
    """Return α: one expert's sensitivities by layer, divided by their L2 norm. All zero stays zero."""
    norm = math.hypot(*sensitivity.values())
    return {layer: value / norm if norm else 0.0 for layer, value in sensitivity.items()}


def tau(distances: Mapping[str, Mapping[str, float]], direction: str) -> PerExpert:
    """Return τ: row sums of g (`distance`) or of 1 / (1 + g) (`similarity`), divided by their sum.

    Experts that all agree on every sample (g = 0 everywhere) share τ evenly.
    """
    rows = {
        i: sum(g if direction == "distance" else 1 / (1 + g) for j, g in row.items() if j != i)
        for i, row in distances.items()
    }
    total = sum(rows.values())
    return {i: row / total if total else 1 / len(rows) for i, row in rows.items()}


def sigma(
    alphas: Mapping[str, PerExpert], taus: PerExpert, temperature: float, layers: Iterable[str]
) -> dict[str, PerExpert]:
    """Return σ[layer][expert] = softmax over experts of α[expert][layer] · τ[expert] / T.

    A layer that an expert's network does not have (another head) counts as α = 0.
    """
    table = {}
    for layer in layers:
        products = {expert: alphas[expert].get(layer, 0.0) * taus[expert] for expert in alphas}
        largest = max(products.values())
        exponents = {expert: math.exp((product - largest) / temperature) for expert, product in products.items()}
        total = sum(exponents.values())
        table[layer] = {expert: value / total for expert, value in exponents.items()}
    return table


def sens_weights(sigmas: Mapping[str, PerExpert], weight: float) -> Weights:
    """Return the weights weight · K · σ, which average to `weight` over the K experts of each layer."""
    return {layer: {expert: weight * len(row) * s for expert, s in row.items()} for layer, row in sigmas.items()}


def plain_weights(
    coefficients: UniformCoefficients | ExplicitCoefficients,
    weight: float,
    layers: Iterable[str],
    experts: Iterable[str],
) -> Weights:
    """Return the weights of uniform or explicit coefficients in every layer."""
    names = list(experts)
    if isinstance(coefficients, UniformCoefficients):
        return {layer: dict.fromkeys(names, weight) for layer in layers}
    return {layer: {name: weight * _explicit(coefficients.weights[name], layer) for name in names} for layer in layers}


def _explicit(setting: float | dict[str, float], layer: str) -> float:
    if not isinstance(setting, dict):
        return setting
    return [number for pattern, number in setting.items() if matches(pattern, layer)][-1]


def matches(pattern: str, layer: str) -> bool:
    """Return whether a layer pattern of explicit coefficients (`*`, `?`, `[12]` as in a shell) covers a layer."""
    return fnmatch.fnmatchcase(layer, pattern)


def scaled(weights: Weights, lines: Lines, depths: Mapping[str, float]) -> Weights:
    """Return weights times the factor of each layer, whose depth is between 0 and 1."""
    return {
        layer: {expert: weight * lines.at(depths[layer]) for expert, weight in row.items()}
        for layer, row in weights.items()
    }
