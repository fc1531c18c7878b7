"""A fine-tune as a LoRA adapter: of each linear weight's task vector, the nearest matrix of low rank."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.kernels.low_rank import LowRankMatrix, distance, nearest
from sensmerge.tasks.networks.adapted import AdaptedNetwork
from sensmerge.tasks.networks.adapter_files import (
    PREFIX,
    AdapterForm,
    config_of,
    factor_tensors,
)
from sensmerge.tasks.networks.expert import Expert

AT_ONCE = 4
"""Weights that are worked on side by side, at most; each needs several times its size in float64."""


@dataclass(frozen=True)
class ExtractedPart:
    """What becomes of one tensor that a fine-tune changed."""

    norm: float
    """Frobenius norm of the task vector"""
    error: float
    """Frobenius norm of what the adapter lacks of it"""
    rank: int = 0
    """of its factors; 0 where it has none"""
    why: str = ""
    """why there are no factors of it"""


@dataclass(frozen=True)
class Extracted:
    """An adapter, and what it holds of a fine-tune."""

    tensors: Mapping[str, Tensor]
    """by peft's names"""
    config: Mapping[str, Any]
    parts: Mapping[str, ExtractedPart]
    """by tensor of the base, those that the fine-tune changed"""

    @property
    def error(self) -> float:
        """Norm of what the adapter lacks, relative to that of the whole task vector."""
        return math.hypot(*(part.error for part in self.parts.values())) / self._norm

    def share(self, part: ExtractedPart) -> float:
        """Return a part's share of the squared norm of the whole task vector."""
        return (part.norm / self._norm) ** 2

    @cached_property
    def _norm(self) -> float:
        return math.hypot(*(part.norm for part in self.parts.values()))


def extract(
    expert: Expert,
    rank: float,
    base: tuple[str, str | None],
    whole: bool = False,
    advance: Callable[[str, ExtractedPart], None] = lambda name, part: None,
) -> Extracted:
    """Return the adapter that comes nearest to a fine-tune.

    Memory: the adapter, and for each of `AT_ONCE` weights several times its size in float64. The result does not depend
    on how many are worked on at once.

    Args:
        expert: the fine-tune.
        rank: of the factors; below 1, the share of the squared norm of each weight's task vector that is kept.
        base: what the adapter's config calls the base (id or folder), and its commit.
        whole: whether other modules that changed are stored whole, as far as peft can load them.
        advance: told every tensor that is done, in order.

    Raises:
        InputError: a tensor with NaN or Inf; no weight of a linear layer has changed.
    """
    network = AdaptedNetwork(expert.base)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, ExtractedPart] = {}
    ranks: dict[str, int] = {}
    names = [name for name in expert.base.weights if expert.touches(name)]
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _part(expert, name, rank, network), names)
        for name, (part, factors) in zip(names, found, strict=True):
            if part.norm == 0:
                continue
            parts[name] = part
            if factors is not None:
                module = network.module(name)
                tensors |= factor_tensors(module, factors)
                ranks[module] = factors.rank
            advance(name, part)
    if not ranks:
        raise InputError(f"{expert.folder}: changes no weight of a linear layer; an adapter would hold nothing of it")
    modules = _modules_to_store(parts, network, list(ranks)) if whole else {}
    stored = {name: tensor for names in modules.values() for name, tensor in names.items()}
    tensors |= {f"{PREFIX}{name}": expert.read(tensor).contiguous() for name, tensor in stored.items()}
    for tensor in parts.keys() & stored.values():
        parts[tensor] = ExtractedPart(parts[tensor].norm, 0.0, why="stored whole")
    copies = {alias: name for alias, name in network.tied.items() if name in stored}  # peft asks for all of their names
    tied = {f"{PREFIX}{alias}": tensors[f"{PREFIX}{name}"].clone() for alias, name in copies.items()}
    form = AdapterForm(*base, network.task_type, tuple(modules), bool(tied))
    return Extracted(tensors | tied, config_of(ranks, form), parts)


def _part(
    expert: Expert, name: str, rank: float, network: AdaptedNetwork
) -> tuple[ExtractedPart, LowRankMatrix | None]:
    """Return what becomes of a tensor, and its factors if it has some."""
    torch.set_num_threads(1)  # sums must not depend on how many threads share them
    delta = expert.delta(name).double()
    norm = float(torch.linalg.vector_norm(delta))
    if not math.isfinite(norm):
        raise InputError(f"tensor {name}: {expert.folder} or the base has NaN or Inf in it; expected finite numbers")
    why = network.why_not(name)
    if why or norm == 0:
        return ExtractedPart(norm, norm, why=why), None
    matrix = delta.T if network.is_transposed(name) else delta
    factors = nearest(matrix, rank)
    return ExtractedPart(norm, distance(matrix, factors), factors.rank), factors


def _modules_to_store(
    parts: Mapping[str, ExtractedPart], network: AdaptedNetwork, adapted: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return the modules that are stored whole, each with its tensors by their names in the network."""
    found = (network.whole_module(tensor, adapted) for tensor, part in parts.items() if part.why)
    return dict(one for one in found if one is not None)
