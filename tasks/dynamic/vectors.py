"""Task vectors of single tensors in the form that takes the least memory: dense, sparse or low-rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import embedding

from sensmerge.tasks.errors import InputError


@dataclass(frozen=True)
class Dense:
    """A task vector with all its elements."""

    values: Tensor
    """of the weight's shape"""

    def dense(self) -> Tensor:
        """Return the whole task vector in the weight's shape."""
        return self.values

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows of a two-dimensional task vector, (*indices.shape, columns)."""
        return embedding(indices, self.values)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Dense":
        """Return the task vector on a device, in a dtype."""
        return Dense(self.values.to(device, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes


@dataclass(frozen=True)
class Sparse:
    """A task vector with its non-zero elements only."""

    mask: Tensor
    """uint8 (⌈elements / 8⌉,): bit i % 8 of byte i // 8, counted from the lowest, is set where element i is not zero"""
    values: Tensor
    """(number of set bits,), in the order of the elements"""
    shape: tuple[int, ...]
    """of the weight"""

    def dense(self) -> Tensor:
        """Return the whole task vector in the weight's shape: a new tensor."""
        return self.values.new_zeros(self.shape).masked_scatter_(self._kept, self.values)

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows of a two-dimensional task vector, (*indices.shape, columns), without the others."""
        columns = self.shape[1]
        element = indices.unsqueeze(-1) * columns + torch.arange(columns, device=indices.device)
        kept = (self.mask[element >> 3] >> (element & 7)) & 1
        # The first value of a row follows those of all rows before it; where nothing is kept the place means nothing.
        place = self._starts[indices].unsqueeze(-1) + kept.cumsum(-1) - 1
        return torch.where(kept.bool(), self.values[place], 0)

    @property
    def _kept(self) -> Tensor:
        """Whether each element is stored, bool, in the weight's shape."""
        bits = (self.mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=self.mask.device)) & 1
        return bits.view(torch.bool).flatten()[: math.prod(self.shape)].view(self.shape)

    @cached_property
    def _starts(self) -> Tensor:
        """Number of values before each row, (rows,)."""
        counts = self._kept.sum(1)
        return counts.cumsum(0) - counts

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Sparse":
        """Return the task vector on a device, its values in a dtype."""
        return Sparse(self.mask.to(device), self.values.to(device, dtype), self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.mask.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LowRank:
    """The task vector second @ first, in the weight's own orientation."""

    first: Tensor
    """(rank, columns)"""
    second: Tensor
    """(rows, rank)"""

    def dense(self) -> Tensor:
        """Return the whole task vector, (rows, columns): a new tensor."""
        return self.second @ self.first

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "LowRank":
        """Return the task vector on a device, its factors in a dtype."""
        return LowRank(self.first.to(device, dtype), self.second.to(device, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.first.nbytes + self.second.nbytes


Vector = Dense | Sparse | LowRank


def compact(delta: Tensor, dtype: torch.dtype) -> Dense | Sparse | None:
    """Return a task vector in the form that takes fewer bytes, dense where both take the same.

    Args:
        delta: any shape and float dtype.
        dtype: what its elements are rounded to.

    Returns:
        None if all elements are zero.
    """
    delta = delta.to(dtype)
    kept = delta != 0
    count = int(kept.count_nonzero())
    if count == 0:
        return None
    if (delta.numel() + 7) // 8 + count * dtype.itemsize >= delta.nbytes:
        return Dense(delta.contiguous())
    bits = kept.flatten().view(torch.uint8)
    mask = bits.new_zeros((delta.numel() + 7) // 8)
    for place in range(8):
        column = bits[place::8]
        mask[: len(column)] |= column << place
    return Sparse(mask, delta[kept], tuple(delta.shape))


def save_vectors(vectors: Mapping[str, Mapping[str, Vector]], path: Path) -> None:
    """Write task vectors to one safetensors file; equal task vectors give equal bytes.

    Its keys are `tensor/expert/part`, with the parts `values` (dense), `mask`, `values` and `shape` (sparse), or
    `first` and `second` (low-rank).

    Args:
        vectors: tensor name → expert → task vector; names without "/".
        path: the file.
    """
    parts: dict[str, Tensor] = {}
    for tensor, by_expert in vectors.items():
        for expert, vector in by_expert.items():
            assert "/" not in tensor + expert, f"{tensor}, {expert}: names of tensors and experts have no /"
            for part, value in _parts(vector).items():
                parts[f"{tensor}/{expert}/{part}"] = value.contiguous()
    save_file(parts, path)


def load_vectors(path: Path, device: str = "cpu") -> dict[str, dict[str, Vector]]:
    """Read the task vectors that `save_vectors` wrote: tensor name → expert → task vector, both sorted by name.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        stored = load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable file of task vectors ({error}); run the recipe again") from error
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    vectors: dict[str, dict[str, Vector]] = {}
    try:
        for key in sorted(stored):
            tensor, expert, part = key.split("/")
            parts.setdefault((tensor, expert), {})[part] = stored[key]
        for (tensor, expert), found in parts.items():
            vectors.setdefault(tensor, {})[expert] = _vector(found)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: not a file of task vectors ({error}); run the recipe again") from error
    return vectors


def _parts(vector: Vector) -> dict[str, Tensor]:
    match vector:
        case Dense(values):
            return {"values": values}
        case Sparse(mask, values, shape):
            return {"mask": mask, "values": values, "shape": torch.tensor(shape, dtype=torch.int64)}
        case LowRank(first, second):
            return {"first": first, "second": second}


def _vector(parts: Mapping[str, Tensor]) -> Vector:
    if "mask" in parts:
        return Sparse(parts["mask"], parts["values"], tuple(parts["shape"].tolist()))
    if "first" in parts:
        return LowRank(parts["first"], parts["second"])
    return Dense(parts["values"])


BASE = "base"
"""Folder of the base as a checkpoint. The merge's own folder has no `config.json`, so that no loader of checkpoints
takes the base for the merge."""


VECTORS = "vectors"
"""Folder of the compact task vectors: a file per group of layers."""
