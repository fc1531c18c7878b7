"""Merge methods: pure functions on tensors, with the semantics, defaults and corner cases of mergekit 0.1.5.

Four published methods are rows of one table: how a task vector is made sparse × whether signs must agree × defaults.
To add another of that family, add a row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tasks.methods.consensus import sign_agreement
from tasks.methods.sparsify import CHUNK, drop_at_random, magnitude_histogram, match_l1_norm, trim_by_magnitude


@dataclass(frozen=True)
class TaskVector:
    """One expert's task vector of one tensor, and what sparsifying needs to know of it."""

    delta: torch.Tensor
    """expert − base, float32"""
    weight: float
    density: float = 1.0
    mask_key: str = ""
    """names the stream of random numbers for DARE"""
    histogram: torch.Tensor | None = None
    """`magnitude_histogram` of delta where it is known already"""


Sparsifier = Callable[[TaskVector], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """One row of the table; the defaults are mergekit's."""

    sparsify: Sparsifier | None
    """how elements of each task vector are set to zero; None keeps all"""
    consensus: bool
    """keep only elements that agree with the sign of their weighted sum (TIES, arXiv 2306.01708)"""
    normalize: bool
    """default of `normalize`: divide by the sum of the weights (under consensus, of the weights that agree)"""
    rescale: bool
    """default of `rescale`: give each sparse task vector the L1 norm it had before"""


def _trim(vector: TaskVector) -> torch.Tensor:
    known = vector.histogram
    histogram = magnitude_histogram(vector.delta) if known is None else known
    return trim_by_magnitude(vector.delta, vector.density, histogram)


def _drop(vector: TaskVector) -> torch.Tensor:
    return drop_at_random(vector.delta, vector.density, vector.mask_key)


METHODS: dict[str, Method] = {
    "task_arithmetic": Method(None, consensus=False, normalize=False, rescale=False),
    "ties": Method(_trim, consensus=True, normalize=True, rescale=False),
    "dare_linear": Method(_drop, consensus=False, normalize=False, rescale=True),
    "dare_ties": Method(_drop, consensus=True, normalize=False, rescale=True),
}


@dataclass(frozen=True)
class Settings:
    """A method and its settings that all experts share, under mergekit's names."""

    method: str
    normalize: bool
    rescale: bool
    lambda_: float = 1.0
    """factor of the whole mixed task vector"""


def merge_tensor(base: torch.Tensor, vectors: Sequence[TaskVector], settings: Settings) -> torch.Tensor:
    """Merge one tensor: base (float32) and K task vectors of its shape → merged tensor, float32.

    Semantics of mergekit 0.1.5 `GeneralizedTaskArithmeticMerge` and `linear_merge`. Memory: K sparse task vectors and
    the merged tensor beside what is given.
    """
    method = METHODS.get(settings.method)
    deltas = [_sparse(vector, method, settings.rescale) for vector in vectors]
    mix = _mixed if method else _linear
    weights = [vector.weight for vector in vectors]
    merged = torch.empty(base.shape, device=base.device)
    # From here on no element needs another one.
    chunks = (torch.split(tensor.reshape(-1), CHUNK) for tensor in (merged, base, *deltas))
    for out, origin, *parts in zip(*chunks, strict=True):
        out.copy_(mix(origin, parts, weights, settings))
    return merged


def _sparse(vector: TaskVector, method: Method | None, rescale: bool) -> torch.Tensor:
    if method is None or method.sparsify is None or vector.density >= 1:
        return vector.delta
    sparse = method.sparsify(vector)
    return match_l1_norm(sparse, vector.delta) if rescale else sparse


def has_consensus(settings: Settings) -> bool:
    """Return whether what one expert adds depends on the others, element by element."""
    method = METHODS.get(settings.method)
    return method is not None and method.consensus


def keeps_low_rank(settings: Settings, density: float) -> bool:
    """Return whether an expert adds a multiple of its whole task vector: nothing set to zero, no consensus."""
    method = METHODS.get(settings.method)
    return method is None or not (method.consensus or (method.sparsify is not None and density < 1))


def shares(weights: Sequence[float], settings: Settings) -> list[float]:
    """Return the factor that each expert's (sparse) task vector has in a merge without consensus."""
    total, linear = sum(weights), settings.method == "linear"
    # As in `merge_tensor`: mergekit leaves weights that sum to 0 undivided, but those of linear.
    divisor = total if settings.normalize and abs(total) >= 1e-8 else math.nan if linear and settings.normalize else 1.0
    return [weight / divisor * (1.0 if linear else settings.lambda_) for weight in weights]


def static_coefficient(settings: Settings, weight: float, experts: int) -> float:
    """Return the factor that every expert's task vector has under uniform coefficients: λ, or 1 / K if normalised."""
    return shares([weight] * experts, settings)[0]


def contribution(vector: TaskVector, share: float, settings: Settings) -> torch.Tensor:
    """Return what one expert adds to one tensor in a merge without consensus, float32; `share` is from `shares`."""
    return _sparse(vector, METHODS.get(settings.method), settings.rescale) * share


def agreed_contributions(vectors: Sequence[TaskVector], settings: Settings) -> list[torch.Tensor]:
    """Return what each expert adds to one tensor under consensus, float32: base + their sum is `merge_tensor`'s result.

    Signs are elected, and sums divided, with the weights given, so each part is the same for every input. Up to
    rounding, for the sum is divided part by part.
    """
    method = METHODS[settings.method]
    parts = [_sparse(vector, method, settings.rescale).clone() for vector in vectors]
    weights = [vector.weight for vector in vectors]
    for chunk in zip(*(torch.split(part.view(-1), CHUNK) for part in parts), strict=True):
        scaled = [delta * weight for delta, weight in zip(chunk, weights, strict=True)]
        agreement = sign_agreement(scaled)
        divisor = torch.zeros_like(scaled[0])
        for weight, agrees in zip(weights, agreement, strict=True):
            divisor += weight * agrees
        divisor[divisor == 0] = 1
        for out, delta, agrees in zip(chunk, scaled, agreement, strict=True):
            out.copy_(delta * agrees * settings.lambda_)
            if settings.normalize:
                out /= divisor
    return parts


def _mixed(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float], settings: Settings
) -> torch.Tensor:
    """Return base + the weighted sum or, under consensus, the disjoint sum of sparse task vectors."""
    scaled = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    mixed = torch.zeros_like(base)
    divisor: torch.Tensor | float
    if METHODS[settings.method].consensus:
        divisor = torch.zeros_like(base)
        for weight, delta, agrees in zip(weights, scaled, sign_agreement(scaled), strict=True):
            mixed += delta * agrees
            divisor += weight * agrees
        divisor[divisor == 0] = 1
    else:
        for delta in scaled:
            mixed += delta
        divisor = 1.0 if abs(sum(weights)) < 1e-8 else sum(weights)
    if settings.normalize:
        mixed /= divisor
    return base + mixed * settings.lambda_


def _linear(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float], settings: Settings
) -> torch.Tensor:
    """Return the weighted mean (normalize) or sum of the experts themselves (model soup, arXiv 2203.05482)."""
    merged = torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        merged += (base + delta) * weight
    return merged / sum(weights) if settings.normalize else merged
