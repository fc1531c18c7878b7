"""Merge methods: pure functions on tensors, with the semantics, defaults and corner cases of mergekit 0.1.5.

Four published methods are rows of one table: how a task vector is made sparse × whether signs must agree × defaults.
To add another of that family, add a row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensmerge.tasks.methods import kernels
from sensmerge.tasks.methods.consensus import agreeing, agreeing_weight, disjoint_sum
from sensmerge.tasks.methods.delta import Delta, chunks
from sensmerge.tasks.methods.sparsify import Drop, Rescaled, Sparsifier, Trim, drop_all, histogram_of
from sensmerge.tasks.methods.stored import add


@dataclass(frozen=True)
class TaskVector:
    """One expert's task vector of one tensor, and what sparsifying needs to know of it."""

    delta: Delta
    """expert − base"""
    weight: float
    density: float = 1.0
    mask_key: str = ""
    """names the stream of random numbers for DARE"""
    histogram: Tensor | None = None
    """`magnitude_histogram` of delta where it is known already"""


@dataclass(frozen=True)
class Method:
    """One row of the table; the defaults are mergekit's."""

    sparsify: Callable[[TaskVector, Tensor], Sparsifier] | None
    """from a task vector and the base's tensor (flat), what sets elements to zero; None keeps all"""
    consensus: bool
    """keep only elements that agree with the sign of their weighted sum (TIES, arXiv 2306.01708)"""
    normalize: bool
    """default of `normalize`: divide by the sum of the weights (under consensus, of the weights that agree)"""
    rescale: bool
    """default of `rescale`: give each sparse task vector the L1 norm it had before"""


def _trim(vector: TaskVector, base: Tensor) -> Sparsifier:
    known = vector.histogram
    histogram = histogram_of(vector.delta, base) if known is None else known
    return Trim.of(vector.delta, base, vector.density, histogram)


def _drop(vector: TaskVector, base: Tensor) -> Sparsifier:
    return Drop(vector.mask_key, vector.density)


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


def merged_pieces(base: Tensor, vectors: Sequence[TaskVector], settings: Settings) -> Iterator[tuple[slice, Tensor]]:
    """Merge one tensor piece by piece: yield which elements, and their merged values, float32.

    Semantics of mergekit 0.1.5 `GeneralizedTaskArithmeticMerge` and `linear_merge`. Before the first piece, trimming
    and rescaling look through each task vector once (trimming once more where it gets no histogram). Memory: some
    pieces of `CHUNK` elements, and what `Trim.of` says.

    Args:
        base: the base's tensor, flat, in any float dtype.
        vectors: the experts' task vectors.
        settings: the method.
    """
    mix = _linear if settings.method == "linear" else _mixed
    weights = [vector.weight for vector in vectors]
    for where, parts in _sparse_pieces(base, vectors, settings):
        yield where, mix(base[where], parts, weights, settings)


def _sparse_pieces(base: Tensor, vectors: Sequence[TaskVector], settings: Settings) -> Iterator[tuple[slice, Tensor]]:
    """Yield which elements, and every (sparse) task vector's (experts × elements), float32; the caller's own."""
    sparsifiers = [_sparsifier(vector, base, settings) for vector in vectors]
    for where in chunks(len(base)):
        origin = base[where]
        parts = torch.empty(len(vectors), len(origin), device=base.device)
        for part, vector, sparsify in zip(parts, vectors, sparsifiers, strict=True):
            vector.delta.fill(part, where, origin)
            if sparsify:
                sparsify(part, where)
        yield where, parts


def _sparsifier(vector: TaskVector, base: Tensor, settings: Settings) -> Sparsifier | None:
    method = METHODS.get(settings.method)
    if method is None or method.sparsify is None or vector.density >= 1 or not len(base):
        return None
    if vector.density <= 0:
        return drop_all
    sparsify = method.sparsify(vector, base)
    return Rescaled.of(vector.delta, base, sparsify) if settings.rescale else sparsify


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
    # As in `merged_pieces`: mergekit leaves weights that sum to 0 undivided, but those of linear.
    divisor = total if settings.normalize and abs(total) >= 1e-8 else math.nan if linear and settings.normalize else 1.0
    return [weight / divisor * (1.0 if linear else settings.lambda_) for weight in weights]


def static_coefficient(settings: Settings, weight: float, experts: int) -> float:
    """Return the factor that every expert's task vector has under uniform coefficients: λ, or 1 / K if normalised."""
    return shares([weight] * experts, settings)[0]


def contribution_pieces(
    base: Tensor, vector: TaskVector, share: float, settings: Settings
) -> Iterator[tuple[slice, Tensor]]:
    """Yield what one expert adds to one tensor in a merge without consensus, float32; `share` is from `shares`."""
    for where, (part,) in _sparse_pieces(base, [vector], settings):
        yield where, part.mul_(share)


def agreed_pieces(
    base: Tensor, vectors: Sequence[TaskVector], settings: Settings
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield what each expert adds to one tensor under consensus, float32: base + their sum is the merged tensor.

    Signs are elected, and sums divided, with the weights given, so each part is the same for every input. Up to
    rounding, for the sum is divided part by part.
    """
    weights = [vector.weight for vector in vectors]
    for where, parts in _sparse_pieces(base, vectors, settings):
        sign, magnitudes = agreeing(parts, weights)
        if settings.normalize:
            sign /= agreeing_weight(magnitudes, weights)
        if settings.lambda_ != 1:
            sign *= settings.lambda_
        yield where, [magnitude.mul_(sign) for magnitude in magnitudes]


def _mixed(base: Tensor, parts: Tensor, weights: Sequence[float], settings: Settings) -> Tensor:
    """Return base + the weighted sum or, under consensus, the disjoint sum of sparse task vectors."""
    if METHODS[settings.method].consensus:
        mixed = disjoint_sum(parts, weights, settings.normalize)
    else:
        mixed = _weighted_sum(parts, weights)
        if settings.normalize and abs(sum(weights)) >= 1e-8:
            mixed /= sum(weights)
    if settings.lambda_ != 1:
        mixed *= settings.lambda_
    return add(mixed, base)


def _weighted_sum(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of task vectors (experts × elements), flat; on a GPU they are changed."""
    if parts.is_cpu:
        mixed = torch.empty_like(parts[0])
        kernels.weighted_sum(parts.numpy(), np.array(weights, np.float32), mixed.numpy())
        return mixed
    for part, weight in zip(parts, weights, strict=True):
        part.mul_(weight)
    return sum(parts[1:], start=parts[0])


def _linear(base: Tensor, parts: Tensor, weights: Sequence[float], settings: Settings) -> Tensor:
    """Return the weighted mean (normalize) or sum of the experts themselves (model soup, arXiv 2203.05482)."""
    merged = _weighted_sum(parts.add_(base.float()), weights)
    return merged / sum(weights) if settings.normalize else merged
