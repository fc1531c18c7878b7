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
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.kernels.low_rank import LowRankMatrix, distance, nearest
from sensmerge.tasks.networks.adapter_files import (
    PREFIX,
    AdapterForm,
    config_of,
    factor_tensors,
    is_linear,
    takes_more,
    task_type_of,
)
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import skeleton

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


@dataclass(frozen=True)
class _Network:
    """The network that peft loads an adapter of the base into, and the base's tensors in it."""

    base: Base

    @cached_property
    def network(self) -> Any:
        return skeleton(self.base.config, None, self.base.folder)

    @cached_property
    def modules(self) -> dict[str, Any]:
        return dict(self.network.named_modules())

    @cached_property
    def places(self) -> dict[str, str]:
        """Name of each tensor in the network, less those that are stored in another form."""
        names, by_key = self.base.names, self.base.by_key()
        found = {by_key.get(names.key(name)): name for name in self.network.state_dict()}
        return {tensor: name for tensor, name in found.items() if tensor is not None}

    def why_not(self, tensor: str) -> str:
        """Say why there can be no factors of a tensor; "" if there can be."""
        module, _, parameter = self.places.get(tensor, "").rpartition(".")
        if parameter != "weight" or not is_linear(self.modules[module]):
            return "it is not the weight of a linear layer"
        other = takes_more(module, self.modules)
        return f"peft would adapt {other} by its name, too" if other else ""

    def whole_module(self, tensor: str, adapted: Sequence[str]) -> tuple[str, dict[str, str]] | None:
        """Return the module that peft can store whole for a tensor, and its tensors by their names in the network.

        Returns:
            None where it cannot: the module has parts of its own, factors, or a tensor that the base stores otherwise.
        """
        module = self.places.get(tensor, "").rpartition(".")[0]
        if not module or module in adapted or takes_more(module, self.modules):
            return None
        if any(self.modules[module].children()):
            return None
        stored = {name: one for one, name in self.places.items() if name.rpartition(".")[0] == module}
        expected = {f"{module}.{name}" for name in self.modules[module].state_dict()}
        return (module, stored) if stored.keys() == expected else None


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
    network = _Network(expert.base)
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
                module = network.places[name].rpartition(".")[0]
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
    tied = _tied_copies(tensors, expert.base)
    form = AdapterForm(*base, task_type_of(network.network), tuple(modules), bool(tied))
    return Extracted(tensors | tied, config_of(ranks, form), parts)


def _tied_copies(tensors: Mapping[str, Tensor], base: Base) -> dict[str, Tensor]:
    """Return what is stored whole under the other names of tied parameters, too: peft asks for all of them."""
    names = base.names
    tied = {f"{PREFIX}{names.spelled(one)}": f"{PREFIX}{names.spelled(key)}" for one, key in names.tied.items()}
    return {one: tensors[name].clone() for one, name in tied.items() if name in tensors}


def _part(expert: Expert, name: str, rank: float, network: _Network) -> tuple[ExtractedPart, LowRankMatrix | None]:
    """Return what becomes of a tensor, and its factors if it has some."""
    torch.set_num_threads(1)  # sums must not depend on how many threads share them
    delta = expert.delta(name).double()
    norm = float(torch.linalg.vector_norm(delta))
    if not math.isfinite(norm):
        raise InputError(f"tensor {name}: {expert.folder} or the base has NaN or Inf in it; expected finite numbers")
    why = network.why_not(name)
    if why or norm == 0:
        return ExtractedPart(norm, norm, why=why), None
    matrix = delta.T if isinstance(network.modules[network.places[name].rpartition(".")[0]], Conv1D) else delta
    factors = nearest(matrix, rank)
    return ExtractedPart(norm, distance(matrix, factors), factors.rank), factors


def _modules_to_store(
    parts: Mapping[str, ExtractedPart], network: _Network, adapted: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return the modules that are stored whole, each with its tensors by their names in the network."""
    found = (network.whole_module(tensor, adapted) for tensor, part in parts.items() if part.why)
    return dict(one for one in found if one is not None)
