"""The weights of a base and its experts by one set of tensor names, as far as merging needs them.

Small and picklable, and read without transformers: what reaches a worker is where each tensor lies, not how that was
found out (`tasks.models.expert`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from tasks.methods.delta import Delta, Difference, Unchanged, Whole
from tasks.models.checkpoint import DTYPES, Checkpoint, TensorInfo, tensor_bytes
from tasks.models.layers import group_by_layer

GROUP_BYTES = 64 * 2**20
"""Layers are worked on in groups of about this size: enough groups to keep workers busy, few enough to schedule."""
HEADS = "heads"
"""Folder beside a merged trunk: a folder per expert with its head."""
HEAD_WEIGHTS = "head.safetensors"


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of the model that all experts were fine-tuned from; merged models have the same ones."""

    checkpoint: Checkpoint
    weights: tuple[str, ...]
    """tensors that are merged, in network order; tied names once"""
    buffers: tuple[str, ...]
    """other tensors of the checkpoint (position ids, old causal masks), copied as they are"""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of one tensor."""
        return self.checkpoint.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of one tensor."""
        return DTYPES[self.info(name).dtype]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype; its pages are read when it is used."""
        return self.checkpoint.read(name)


@dataclass(frozen=True)
class LowRank:
    """One tensor's task vector in factors: scaling · (second @ first), transposed where the module stores it so."""

    first: str
    """name of lora_A (r × in) or lora_embedding_A (r × vocabulary) in the adapter"""
    second: str
    """name of lora_B (out × r) or lora_embedding_B (width × r)"""
    scaling: float
    transpose: bool


@dataclass(frozen=True)
class ExpertWeights:
    """The tensors of one expert, by the base's tensor names."""

    base: BaseWeights
    source: Checkpoint
    """the expert's own: a whole checkpoint, or a LoRA adapter"""
    own: Mapping[str, str]
    """base's name → name in `source` of each tensor stored whole"""
    low_rank: Mapping[str, LowRank]
    """base's name → factors of each adapted tensor"""
    head: Mapping[str, str]
    """parameter name → name in `source` of each tensor that the base lacks or has in another shape"""

    @property
    def folder(self) -> Path:
        """Folder of the expert."""
        return self.source.folder

    def touches(self, name: str) -> bool:
        """Return whether the expert stores anything for this tensor; if not, its task vector is zero."""
        return name in self.own or name in self.low_rank

    def task_vector(self, name: str) -> Delta:
        """Return the task vector of one tensor, to be worked out piece by piece."""
        if name in self.own:
            return Difference(self.source.read(self.own[name]).view(-1))
        return Whole(self.delta(name).view(-1)) if name in self.low_rank else Unchanged(self.base.info(name).numel)

    def content(self, name: str) -> str:
        """Return a digest of all that a tensor's task vector comes from: what the base and the expert store for it."""
        digest = xxhash.xxh3_128()
        stored = [(self.base.checkpoint, name)]
        if name in self.own:
            stored.append((self.source, self.own[name]))
        elif name in self.low_rank:
            factors = self.low_rank[name]
            stored += [(self.source, factors.first), (self.source, factors.second)]
            digest.update(f"{factors.scaling!r} {factors.transpose}".encode())
        for checkpoint, tensor in stored:
            info = checkpoint.tensors[tensor]
            digest.update(f"{info.dtype} {info.shape}".encode())
            digest.update(tensor_bytes(checkpoint.read(tensor)))
        return digest.hexdigest()

    def delta(self, name: str) -> torch.Tensor:
        """Return the task vector of one tensor, expert − base, in float32 and the tensor's shape.

        Of an adapted tensor it is peft's `get_delta_weight` in full precision.
        """
        factors = self.factors(name)
        if factors is not None:
            first, second, scaling = factors
            return (second @ first) * scaling
        base = self.base.read(name).float()
        return self.source.read(self.own[name]).float() - base if name in self.own else torch.zeros_like(base)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return an adapted tensor's task vector as first (r, columns), second (rows, r) and scaling; else None.

        scaling · second @ first has the tensor's own orientation; the factors are float32.
        """
        entry = self.low_rank.get(name)
        if entry is None:
            return None
        first, second = self.source.read(entry.first).float(), self.source.read(entry.second).float()
        return (second.T, first.T, entry.scaling) if entry.transpose else (first, second, entry.scaling)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the expert: as stored, or base + low-rank task vector in float32."""
        if name in self.own:
            return self.source.read(self.own[name])
        if name in self.low_rank:
            return self.base.read(name).float() + self.delta(name)
        return self.base.read(name)

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the expert's head by parameter name."""
        return {name: self.source.read(stored) for name, stored in self.head.items()}


def layer_groups(base: BaseWeights, group_bytes: int = GROUP_BYTES) -> tuple[tuple[str, ...], ...]:
    """Split the base's weights into groups of whole layers of at least `group_bytes` (the last may be smaller)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for names in group_by_layer(base.weights).values():
        if filled >= group_bytes:
            groups.append([])
            filled = 0
        groups[-1] += names
        filled += sum(base.info(name).nbytes for name in names)
    return tuple(tuple(group) for group in groups)
