"""The weights of a base and its experts by one set of tensor names, as far as merging needs them.

Small and picklable, and read without transformers: what reaches a worker is where each tensor lies, not how that was
found out (`tasks.networks.expert`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import xxhash

from sensmerge.tasks.checkpoints.checkpoint import DTYPES, Checkpoint, tensor_bytes
from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.views import VIEWS
from sensmerge.tasks.methods.kernels.delta import Delta, Difference, Unchanged, Whole, pieces

GROUP_BYTES = 64 * 2**20
"""Layers are worked on in groups of about this size: enough groups to keep workers busy, few enough to schedule."""
HEADS = "heads"
"""Folder beside a merged trunk: a folder per expert with its head."""
HEAD_WEIGHTS = "head.safetensors"


PIECE = 2**19
"""Elements that are looked at at a time: they stay in the processor's cache."""


@dataclass(frozen=True)
class Examined:
    """What there is to know of a tensor before it is merged."""

    content: str
    """digest of all that is stored for it"""
    bad: int
    """how many of these values are NaN or infinite"""
    count: int
    """of all values"""


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of the model that all experts were fine-tuned from; merged models have the same ones."""

    checkpoint: Checkpoint
    weights: tuple[str, ...]
    """tensors that are merged, in network order; tied names once"""
    buffers: tuple[str, ...]
    """other tensors of the checkpoint (position ids, old causal masks), copied as they are"""
    statistics: frozenset[str] = frozenset()
    """those of the weights that are no parameters but buffers (running means): merged models have the experts' mean"""
    stored: Mapping[str, str] = field(default_factory=dict)
    """name of a tensor → its name in the checkpoint, where that is another"""
    untied: bool = False
    """whether its config ties parameters that merged models hold apart"""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in the checkpoint."""
        return self.stored.get(name, name)

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of one tensor."""
        return self.checkpoint.tensors[self.stored_name(name)]

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of one tensor."""
        return DTYPES[self.info(name).dtype]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype; its pages are read when it is used."""
        return self.checkpoint.read(self.stored_name(name))

    def stored_for(self, name: str) -> Iterator[tuple[Checkpoint, str]]:
        """Yield what is read for a tensor."""
        yield self.checkpoint, self.stored_name(name)

    def read_for(self, name: str) -> Iterator[tuple[Checkpoint, str]]:
        """Yield the same: see `ExpertWeights`."""
        yield from self.stored_for(name)

    def examined(self, name: str) -> Examined:
        """Read through one tensor."""
        return _examined("", [(self.checkpoint, self.stored_name(name))])

    def only_weights(self) -> "BaseWeights":
        """Return what merging needs to know, without open files."""
        return BaseWeights(
            replace(self.checkpoint), self.weights, self.buffers, self.statistics, self.stored, self.untied
        )


@dataclass(frozen=True)
class LoraFactors:
    """One tensor's task vector in factors: scaling · (second @ first), transposed where the module stores it so."""

    first: str
    """name of lora_A (r × in) or lora_embedding_A (r × vocabulary) in the adapter"""
    second: str
    """name of lora_B (out × r) or lora_embedding_B (width × r)"""
    scaling: float
    transpose: bool


@dataclass(frozen=True)
class View:
    """A part of a contiguous tensor, as `torch.as_strided` takes it; in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor, which shares its memory if that is contiguous."""
        return tensor.contiguous().as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Piece:
    """What an expert stores for a part of a tensor: of mixtures, the base may hold experts stacked, or one by one."""

    source: str | LoraFactors
    """name of a tensor of the expert's own checkpoint, or factors in it"""
    taken: View | None = None
    """the part of the expert's tensor that is meant; None is all of it"""
    inside: View | None = None
    """the part of the base's tensor that it stands for; None is all of it"""


@dataclass(frozen=True)
class ExpertWeights:
    """The tensors of one expert, by the base's tensor names."""

    base: BaseWeights
    source: Checkpoint
    """the expert's own: a whole checkpoint, or a LoRA adapter"""
    own: Mapping[str, str]
    """base's name → name in `source` of each tensor stored whole"""
    low_rank: Mapping[str, LoraFactors]
    """base's name → factors of each adapted tensor; of one that is stored whole too, they come on top"""
    head: Mapping[str, str]
    """parameter name → name in `source` of each tensor of a head that stays the expert's own"""
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    """base's name → what stands for its parts, of tensors that base and expert stack differently"""

    @property
    def folder(self) -> Path:
        """Folder of the expert."""
        return self.source.folder

    def only_weights(self, base: BaseWeights) -> "ExpertWeights":
        """Return what merging needs to know, without open files; `base` is its base's `only_weights`."""
        return ExpertWeights(base, replace(self.source), self.own, self.low_rank, self.head, self.pieces)

    def touches(self, name: str) -> bool:
        """Return whether the expert stores anything for this tensor; if not, its task vector is zero."""
        return name in self.own or name in self.low_rank or name in self.pieces

    def stored_for(self, name: str) -> Iterator[tuple[Checkpoint, str]]:
        """Yield what of the expert's own is read for a tensor."""
        for source in (
            self.own.get(name),
            self.low_rank.get(name),
            *(piece.source for piece in self.pieces.get(name, ())),
        ):
            match source:
                case str():
                    yield self.source, source
                case LoraFactors():
                    yield from ((self.source, source.first), (self.source, source.second))

    def read_for(self, name: str) -> Iterator[tuple[Checkpoint, str]]:
        """Yield what is read for the expert's own tensor, of the base too where that counts."""
        if not (self.touches(name) and self.is_whole(name)):
            yield from self.base.stored_for(name)
        yield from self.stored_for(name)

    def is_whole(self, name: str) -> bool:
        """Return whether the expert stores the values of a tensor, and no factors of its task vector."""
        if name in self.pieces:
            return all(isinstance(piece.source, str) for piece in self.pieces[name])
        return name in self.own and name not in self.low_rank

    def task_vector(self, name: str) -> Delta:
        """Return the task vector of one tensor, to be worked out piece by piece."""
        if self.is_whole(name):
            return Difference(self.read(name).reshape(-1))
        return Whole(self.delta(name).view(-1)) if self.touches(name) else Unchanged(self.base.info(name).numel)

    def changes(self, name: str) -> bool:
        """Return whether the expert's tensor differs from the base's; factors that are not 0 do not cancel out."""
        parts = [piece.source for piece in self.pieces.get(name, ())]
        if name in self.low_rank:
            parts.append(self.low_rank[name])
        if any(self._adds(one) for one in parts if isinstance(one, LoraFactors)):
            return True
        if name not in self.own and not any(isinstance(one, str) for one in parts):
            return False
        stored = self.read(name) if self.is_whole(name) else self.source.read(self.own[name])
        base = self.base.read(name).view(-1)
        return any(bool(piece.any()) for _, piece in pieces(Difference(stored.reshape(-1)), base))

    def _adds(self, entry: LoraFactors) -> bool:
        first, second, scaling = self._factors(entry)
        return bool((first.any(1) & second.any(0)).any()) and scaling != 0

    def examined(self, name: str) -> Examined:
        """Read through all that the expert stores for a tensor; its task vector comes from that and the base's."""
        stored, how = [], []
        if name in self.own:
            stored.append((self.source, self.own[name]))
        for part in (*self.pieces.get(name, ()), *([Piece(self.low_rank[name])] if name in self.low_rank else [])):
            how.append(repr((part.taken, part.inside)))
            if isinstance(part.source, str):
                stored += [] if (self.source, part.source) in stored else [(self.source, part.source)]
            else:
                stored += [(self.source, part.source.first), (self.source, part.source.second)]
                how.append(f"{part.source.scaling!r} {part.source.transpose}")
        return _examined(" ".join(how), stored)

    def delta(self, name: str) -> torch.Tensor:
        """Return the task vector of one tensor, expert − base, in float32 and the tensor's shape.

        Of an adapted tensor it is peft's `get_delta_weight` in full precision.
        """
        if self.is_whole(name):
            return self.read(name).float() - self.base.read(name).float()
        if name in self.pieces:
            delta = torch.zeros(self.base.info(name).shape)
            for piece in self.pieces[name]:
                assert isinstance(piece.source, LoraFactors), "the pieces of one tensor are of one kind"
                part = delta if piece.inside is None else piece.inside.of(delta)
                part.copy_(self._product(piece.source))
            return delta
        if name in self.low_rank:
            product = self._product(self.low_rank[name])
            if name not in self.own:
                return product
            return product.add_(self.source.read(self.own[name]).float() - self.base.read(name).float())
        return torch.zeros(self.base.info(name).shape)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return an adapted tensor's task vector as first (r, columns), second (rows, r) and scaling; else None.

        scaling · second @ first has the tensor's own orientation; the factors are float32.
        """
        if name in self.own or name not in self.low_rank:
            return None
        return self._factors(self.low_rank[name])

    def _factors(self, entry: LoraFactors) -> tuple[torch.Tensor, torch.Tensor, float]:
        first, second = self.source.read(entry.first).float(), self.source.read(entry.second).float()
        return (second.T, first.T, entry.scaling) if entry.transpose else (first, second, entry.scaling)

    def _product(self, entry: LoraFactors) -> torch.Tensor:
        first, second, scaling = self._factors(entry)
        return (second @ first) * scaling

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the expert: as stored, or base + low-rank task vector in float32."""
        if not self.touches(name):
            return self.base.read(name)
        if not self.is_whole(name):
            return self.base.read(name).float() + self.delta(name)
        if name not in self.pieces:
            return self.source.read(self.own[name])
        found = [(piece, self.source.read(str(piece.source))) for piece in self.pieces[name]]
        parts = [(piece, tensor if piece.taken is None else piece.taken.of(tensor)) for piece, tensor in found]
        if parts[0][0].inside is None:
            return parts[0][1].contiguous()
        whole = torch.empty(self.base.info(name).shape, dtype=parts[0][1].dtype)
        for piece, part in parts:
            assert piece.inside is not None, "one of several pieces stands for a part"
            piece.inside.of(whole).copy_(part)
        return whole

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the expert's head by parameter name."""
        return {name: self.source.read(stored) for name, stored in self.head.items()}


def _examined(how: str, stored: Sequence[tuple[Checkpoint, str]]) -> Examined:
    """Read through stored tensors, once; `how` says what becomes of them."""
    digest, bad, count = xxhash.xxh3_128(how.encode()), 0, 0
    for checkpoint, name in stored:
        info = checkpoint.tensors[name]
        digest.update(f"{info.dtype} {info.shape}".encode())
        for piece in torch.split(checkpoint.read(name).reshape(-1), PIECE):
            digest.update(tensor_bytes(piece))
            # Most sums are finite, and then all values are; where one is not, they may be all the same.
            if info.is_floating_point and not bool(piece.sum().isfinite()):
                bad += len(piece) - int(piece.isfinite().sum())
        count += info.numel
    return Examined(digest.hexdigest(), bad, count)


def by_file(stored: Iterable[tuple[Checkpoint, str]]) -> Tensors | None:
    """Return stored tensors, and the scales of those in fp8, by file; None if a folder that stands for a model has one.

    What such a folder has is put together of tensors of any models.
    """
    found: dict[Path, set[str]] = {}
    for checkpoint, name in stored:
        if checkpoint.folder.parent.name == VIEWS:
            return None
        found.setdefault(checkpoint.folder / checkpoint.tensors[name].file, set()).add(name)
        scale = checkpoint.scales.get(name)
        if scale is not None and scale.name:
            found.setdefault(checkpoint.folder / scale.file, set()).add(scale.name)
    return found


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
