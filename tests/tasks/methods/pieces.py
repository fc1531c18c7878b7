"""Whole tensors out of what the methods yield piece by piece."""

from collections.abc import Iterable, Sequence

import torch

from sensmerge.tasks.methods.contract import Additive, Method, TaskVector
from sensmerge.tasks.methods.kernels.delta import Whole, pieces
from sensmerge.tasks.methods.kernels.sparsify import Sparsifier


def joined(found: Iterable[tuple[slice, torch.Tensor]], shape: torch.Size) -> torch.Tensor:
    """Put pieces together; they must follow each other and make up the shape."""
    parts = list(found)
    places = [where.start for where, _ in parts] + [shape.numel()]
    assert places == [0, *(where.stop for where, _ in parts)]
    return torch.cat([part for _, part in parts]).view(shape) if parts else torch.empty(shape)


def whole_tensor(base: torch.Tensor, vectors: Sequence[TaskVector], method: Method) -> torch.Tensor:
    return joined(method.merged_pieces(base, vectors), base.shape)


def contribution(base: torch.Tensor, vector: TaskVector, share: float, method: Additive) -> torch.Tensor:
    return joined(method.contribution_pieces(base.reshape(-1), vector, share), base.shape)


def agreed_contributions(base: torch.Tensor, vectors: Sequence[TaskVector], method: Additive) -> list[torch.Tensor]:
    found = list(method.agreed_pieces(base.reshape(-1), vectors))
    columns = range(len(vectors))
    return [joined(((where, parts[k]) for where, parts in found), base.shape) for k in columns]


def vector(delta: torch.Tensor, weight: float = 1.0, expert: str = "expert") -> TaskVector:
    return TaskVector(expert, "tensor", Whole(delta.reshape(-1)), weight)


def sparse(delta: torch.Tensor, sparsify: Sparsifier) -> torch.Tensor:
    """Make a whole task vector sparse."""
    given = Whole(delta.reshape(-1))
    origin = torch.zeros(len(given))
    return joined(((where, sparsify(piece, where)) for where, piece in pieces(given, origin)), delta.shape)
