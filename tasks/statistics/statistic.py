"""The contract of statistics: what one sees of a network, what a sample adds, and how its totals are read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

STATISTICS: Registry[Statistic] = Registry("sensmerge.statistics", "sensmerge.tasks.statistics")
TENSORS = "tensors"
"""Entry of the metadata of a file of totals: JSON of the checkpoint's tensors that each total is of."""


@dataclass(frozen=True)
class Statistic(ABC):
    """A sum over the samples of a calibration set, of something that each parameter of a network gives.

    Samples are added in the order of the rows, wherever the network runs. A subclass is a frozen dataclass, with its
    settings as fields, and registered by `@STATISTICS.register(NAME)`.
    """

    version: ClassVar[int] = 1
    """counts up whenever equal inputs give other results than before"""
    hook: ClassVar[Literal["gradients", "inputs"]]
    """what `of` is given: the gradient of each parameter, or the inputs of each linear layer"""
    by: ClassVar[Literal["layer", "tensor"]]
    """`layer`: a number for each layer, the sum over its parameters; `tensor`: a tensor for each one of the checkpoint,
    which may be large: it stays where the network's block is, and goes to a file when that has seen all samples"""
    takes_sparse: ClassVar[bool] = False
    """whether `of` takes gradients of embeddings that are sparse in their rows, which saves memory"""

    @abstractmethod
    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """Return what one sample adds, on any device; for statistics by layer a float64 scalar.

        Args:
            parameter: detached; the weight of a linear layer where inputs are seen.
            seen: the parameter's gradient, of its shape and dtype, used and dropped as soon as backward has it; or
                the inputs of one call of the linear layer, (tokens, in).
        """


def read_layers(artifact: Path, name: str) -> dict[str, float]:
    """Return the mean over samples of a statistic by layer."""
    found: dict[str, float] = read_json(artifact / f"{name}.json")[name]
    return found


def read_tensor(artifact: Path, name: str, tensor: str) -> Tensor | None:
    """Return the sum over samples of a statistic by tensor.

    Args:
        artifact: of the stage statistics.
        name: of the statistic.
        tensor: of the base's checkpoint.

    Returns:
        The sum; None for a tensor that gave none: no linear layer's, say, or of a layer that no sample came to.
    """
    from safetensors import safe_open

    place = read_json(artifact / f"{name}.json")[TENSORS].get(tensor)
    if place is None:
        return None
    with safe_open(artifact / place["file"], framework="pt") as file:
        total: Tensor = file.get_tensor(place["key"])
    return total


def read_tokens(artifact: Path, name: str, tensor: str) -> int:
    """Return how many tokens the total of a tensor is a sum over: of inputs, those that its layer was given.

    Args:
        artifact: of the stage statistics.
        name: of the statistic.
        tensor: of the base's checkpoint; 0 for one that has no total.
    """
    about = read_json(artifact / f"{name}.json")
    place = about[TENSORS].get(tensor)
    return 0 if place is None else int(place.get("tokens", about["tokens"]))


def read_input_dim(artifact: Path, name: str, tensor: str) -> int | None:
    """Return which dimension of a tensor the inputs of its linear layer run along; arguments as in `read_tensor`.

    It is 1 for most, y = W x, and 0 where a layer holds its weight transposed, y = Wᵀ x, as GPT-2's do.

    Returns:
        None for a tensor without a total, and for statistics of gradients.
    """
    found: int | None = read_json(artifact / f"{name}.json")[TENSORS].get(tensor, {}).get("input_dim")
    return found


def index(artifact: Path, name: str) -> dict[str, dict[str, str]]:
    """Return where the totals of a statistic are: tensor → file, and key in the file."""
    from safetensors import safe_open

    found: dict[str, dict[str, str]] = {}
    for path in sorted((artifact / name).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors: Mapping[str, Iterable[str]] = json.loads(file.metadata()[TENSORS])
        for key, several in tensors.items():
            found |= {one: {"file": f"{name}/{path.name}", "key": key} for one in several}
    return found
