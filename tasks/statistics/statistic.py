"""The contract of statistics: what one sees of a network, what a sample adds, and how its totals are read."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

STATISTICS: Registry[Statistic] = Registry("sensmerge.statistics", "sensmerge.tasks.statistics")
TENSORS = "tensors"
"""Entry of the metadata of a file of totals: JSON of the checkpoint's tensors that each total is of, and about them."""


@dataclass(frozen=True)
class Statistic(ABC):
    """A sum over the samples of a calibration set, of something that each parameter of a network gives.

    Samples are added in the order of the rows, wherever the network runs. A subclass is a frozen dataclass, with its
    settings as fields, and registered by `@STATISTICS.register(NAME)`. `of` is all that it must say; one whose totals
    by tensor are large may add them up and store them in a way of its own (`total` and what follows it).
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
    inputs_alone: ClassVar[bool] = False
    """whether `of` looks at inputs and not at the weight: then layers that are given the same ones share a total"""

    @abstractmethod
    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """Return what one sample adds, on any device; for statistics by layer a float64 scalar.

        Args:
            parameter: detached; the weight of a linear layer where inputs are seen.
            seen: the parameter's gradient, of its shape and dtype, used and dropped as soon as backward has it; or
                the inputs of one call of the linear layer, (tokens, in).
        """

    def total(self) -> Total:
        """Return what adds up a total by tensor, still empty."""
        return Total(self)

    @classmethod
    def restored(cls, stored: Tensor) -> Tensor:
        """Return the sum of what `of` returns, from what `Total.stored` has stored of it."""
        return stored

    def held_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes that a total takes at most while it is added up; inputs are the weight's last dimension."""
        return self.stored_bytes(shape)

    def stored_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes that a total takes in its file at most: here those of float32 in the weight's shape."""
        return 4 * math.prod(shape)


class Total:
    """Adds up a statistic for one tensor, sample after sample; here as a plain sum, in the dtype of what is added."""

    def __init__(self, statistic: Statistic) -> None:
        """Begin with nothing."""
        self._statistic = statistic
        self._sum: Tensor | None = None

    def add(self, parameter: Tensor, seen: Tensor) -> None:
        """Add what a sample gives; arguments as in `Statistic.of`, and not kept."""
        found = self._statistic.of(parameter, seen)
        if self._sum is not None:
            self._sum.add_(found)
        else:
            self._sum = found.to_dense() if found.is_sparse else found.clone()  # `of` may return what it was given

    def stored(self) -> Tensor:
        """Return what is to be stored, after the last sample; of nothing else than what has been added."""
        assert self._sum is not None, "a total begins with a sample"
        return self._sum


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

    place = _places(artifact, name)[TENSORS].get(tensor)
    if place is None:
        return None
    with safe_open(artifact / place["file"], framework="pt") as file:
        stored: Tensor = file.get_tensor(place["key"])
    return STATISTICS[name].restored(stored) if name in STATISTICS else stored


def read_tokens(artifact: Path, name: str, tensor: str) -> int:
    """Return how many tokens the total of a tensor is a sum over: of inputs, those that its layer was given.

    Args:
        artifact: of the stage statistics.
        name: of the statistic.
        tensor: of the base's checkpoint; 0 for one that has no total.
    """
    about = _places(artifact, name)
    place = about[TENSORS].get(tensor)
    return 0 if place is None else int(place.get("tokens", about["tokens"]))


def read_input_dim(artifact: Path, name: str, tensor: str) -> int | None:
    """Return which dimension of a tensor the inputs of its linear layer run along; arguments as in `read_tensor`.

    It is 1 for most, y = W x, and 0 where a layer holds its weight transposed, y = Wᵀ x, as GPT-2's do.

    Returns:
        None for a tensor without a total, and for statistics of gradients.
    """
    found: int | None = _places(artifact, name)[TENSORS].get(tensor, {}).get("input_dim")
    return found


def _places(artifact: Path, name: str) -> Mapping[str, Any]:
    path = artifact / f"{name}.json"
    about = path.stat()
    return _read_once(path, (about.st_ino, about.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_once(path: Path, _: tuple[int, int]) -> Mapping[str, Any]:
    """Methods ask for one tensor after the other, and a large model has thousands."""
    found: Mapping[str, Any] = read_json(path)
    return found


def index(artifact: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return where the totals of a statistic are: tensor → file, key in the file, and what is known about it."""
    from safetensors import safe_open

    found: dict[str, dict[str, Any]] = {}
    for path in sorted((artifact / name).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors: Mapping[str, Mapping[str, Mapping[str, Any]]] = json.loads(file.metadata()[TENSORS])
        for key, several in tensors.items():
            found |= {one: {"file": f"{name}/{path.name}", "key": key, **about} for one, about in several.items()}
    return found
