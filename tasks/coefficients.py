"""How much of each expert, in each layer: from sensitivities and cross-task distances to the weights of a merge."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from sensmerge.tasks.strict import Strict
from sensmerge.tasks.varying import Varying, number_at

PerExpert = dict[str, float]
Weights = dict[str, PerExpert]
"""weights[layer][expert]; of tensors that differ from others of their layer, weights[tensor][expert]"""


class UniformCoefficients(Strict):
    """Every expert has the variant's `weight` in every layer."""

    kind: Literal["uniform"] = "uniform"


class ExplicitCoefficients(Strict):
    """Your own numbers; each is multiplied by the variant's `weight`."""

    kind: Literal["explicit"]
    weights: dict[str, FiniteFloat | dict[str, FiniteFloat] | Varying] = Field(
        description="expert → number; or → {layer pattern: number}, of which the last that matches wins; or → numbers "
        "from the first block to the last, or filters on names of tensors, as in mergekit"
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
    layers: Mapping[str, Sequence[str]],
    depths: Mapping[str, float],
    experts: Iterable[str],
) -> Weights:
    """Return the weights of uniform or explicit coefficients: a row per layer, or per tensor where those differ.

    Args:
        coefficients: how much of each expert.
        weight: that multiplies them.
        layers: the tensors of each layer.
        depths: of the layers: from 0, the first block, to 1, the last; 0 outside the blocks.
        experts: their names.

    Raises:
        ValueError: no filter fits a tensor.
    """
    names = list(experts)
    if isinstance(coefficients, UniformCoefficients):
        return {layer: dict.fromkeys(names, weight) for layer in layers}
    settings = {name: coefficients.weights[name] for name in names}

    def row(layer: str, tensor: str) -> PerExpert:
        return {name: weight * _explicit(one, layer, tensor, depths[layer]) for name, one in settings.items()}

    found: Weights = {}
    for layer, tensors in layers.items():
        rows = {tensor: row(layer, tensor) for tensor in tensors}
        first = rows[tensors[0]]
        found |= {layer: first} if all(one == first for one in rows.values()) else rows
    return found


def row_of(weights: Weights, tensor: str, layer: str) -> PerExpert:
    """Return the experts' weights of one tensor: its own row, or its layer's."""
    return weights[tensor] if tensor in weights else weights[layer]


def _explicit(setting: float | dict[str, float] | Varying, layer: str, tensor: str, depth: float) -> float:
    if not isinstance(setting, dict):
        return number_at(setting, tensor, depth)
    return [number for pattern, number in setting.items() if matches(pattern, layer)][-1]


def matches(pattern: str, layer: str) -> bool:
    """Return whether a layer pattern of explicit coefficients (`*`, `?`, `[12]` as in a shell) covers a layer."""
    return fnmatch.fnmatchcase(layer, pattern)


def scaled(weights: Weights, lines: Lines, depths: Mapping[str, float]) -> Weights:
    """Return weights times the factor of each row, whose depth is between 0 and 1."""
    factors = {key: lines.at(depths[key]) for key in weights}
    return {key: {expert: weight * factors[key] for expert, weight in row.items()} for key, row in weights.items()}
