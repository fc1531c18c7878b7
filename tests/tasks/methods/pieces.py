"""Whole tensors out of what the methods yield piece by piece."""

from collections.abc import Iterable, Sequence

import torch

from sensmerge.tasks.methods.arithmetic import Settings, TaskVector, agreed_pieces, contribution_pieces, merged_pieces
from sensmerge.tasks.methods.delta import Whole, pieces
from sensmerge.tasks.methods.sparsify import Sparsifier


def joined(found: Iterable[tuple[slice, torch.Tensor]], shape: torch.Size) -> torch.Tensor:
    """Put pieces together; they must follow each other and make up the shape."""
    parts = list(found)
    places = [where.start for where, _ in parts] + [shape.numel()]
    assert places == [0, *(where.stop for where, _ in parts)]
    return torch.cat([part for _, part in parts]).view(shape) if parts else torch.empty(shape)


def whole_tensor(base: torch.Tensor, vectors: Sequence[TaskVector], settings: Settings) -> torch.Tensor:
    return joined(merged_pieces(base.reshape(-1), vectors, settings), base.shape)


def contribution(base: torch.Tensor, vector: TaskVector, share: float, settings: Settings) -> torch.Tensor:
    return joined(contribution_pieces(base.reshape(-1), vector, share, settings), base.shape)


def agreed_contributions(base: torch.Tensor, vectors: Sequence[TaskVector], settings: Settings) -> list[torch.Tensor]:
    found = list(agreed_pieces(base.reshape(-1), vectors, settings))
    columns = range(len(vectors))
    return [joined(((where, parts[k]) for where, parts in found), base.shape) for k in columns]


def vector(delta: torch.Tensor, weight: float = 1.0, density: float = 1.0, mask_key: str = "") -> TaskVector:
    return TaskVector(Whole(delta.reshape(-1)), weight, density, mask_key)


def sparse(delta: torch.Tensor, sparsify: Sparsifier) -> torch.Tensor:
    """Make a whole task vector sparse."""
    given = Whole(delta.reshape(-1))
    origin = torch.zeros(len(given))
    return joined(((where, sparsify(piece, where)) for where, piece in pieces(given, origin)), delta.shape)
