"""Whether what a dynamic model's folder says fits what it holds: a seal of its own does not make a manifest true."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.dynamic.router import Rule, Statistics
from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Sparse, Vector
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.endings import OWN_HEADS

_NEEDED = {
    "nearest": set[str](),
    "centroid": {"centroids"},
    "discriminant": {"centroids", "discriminants"},
    "shift": {"mean", "std"},
    "alignment": {"mean", "std"},
}
"""Statistics of a rule, by its score."""


def check_heads(folder: Path, experts: Sequence[str], head: str) -> None:
    """Check that heads are here of all experts that a manifest names, or of none, and only for a network that has them.

    Args:
        folder: of the dynamic model.
        experts: names, as the manifest has them.
        head: what its network ends in.

    Raises:
        InputError: they are of others.
    """
    heads = {path.name for path in (folder / HEADS).glob("*/")}
    if heads and (head not in OWN_HEADS or heads != set(experts)):
        raise InputError(
            f"{folder}: its manifest names the experts {', '.join(experts)} of a {head} network, but heads are here of "
            f"{', '.join(sorted(heads))}; copy the folder again"
        )


def check_vectors(
    folder: Path, experts: Sequence[str], vectors: Mapping[str, Mapping[str, Vector]], base: Base
) -> None:
    """Check that task vectors are of the experts that a manifest names, and have the shapes of their base's tensors.

    Args:
        folder: of the dynamic model.
        experts: names, as the manifest has them.
        vectors: name of a tensor → expert → task vector.
        base: the base.

    Raises:
        InputError: one is of something else.
    """
    known = set(base.weights)
    for tensor, by_expert in vectors.items():
        for expert, vector in by_expert.items():
            if expert not in experts or tensor not in known:
                what = f"expert {expert}" if expert not in experts else f"tensor {tensor}"
                raise InputError(f"{folder}: holds a task vector of {what}, which the model lacks; copy it again")
            if not _fits(vector, base.info(tensor).shape):
                raise InputError(
                    f"{folder}: the task vector of {expert} for {tensor} has another shape than the base's tensor, "
                    f"{base.info(tensor).shape}; copy the folder again"
                )


def _fits(vector: Vector, shape: tuple[int, ...]) -> bool:
    match vector:
        case Dense(values):
            return tuple(values.shape) == shape
        case LowRank(first, second):
            return (*second.shape[:1], *first.shape[1:]) == shape and second.shape[1:] == first.shape[:1]
        case Sparse(mask, values, own):
            elements = torch.Size(own).numel()
            bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1 if mask.dtype == torch.uint8 else mask
            return own == shape and len(mask) == (elements + 7) // 8 and int(bits.sum()) == len(values)


def read_statistics(path: Path, rule: Rule, experts: int, width: int) -> Statistics:
    """Return the statistics of a rule.

    Args:
        path: their file.
        rule: the rule.
        experts: how many there are.
        width: of the hidden states.

    Raises:
        InputError: the file cannot be read, or holds others than the rule takes.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable file of statistics ({error}); copy the folder again") from error
    space = found["discriminants"].shape[-1:] if "discriminants" in found else (width,)
    shapes = {"centroids": (experts, *space), "discriminants": (width, *space), "mean": (experts,), "std": (experts,)}
    if found.keys() != _NEEDED[rule.score]:
        raise InputError(f"{path}: holds {', '.join(found) or 'nothing'}, which is not what score {rule.score} takes")
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(
                f"{path}: {name} has the shape {tuple(tensor.shape)}; expected finite numbers, {shapes[name]}, of the "
                f"{experts} experts that the manifest names; copy the folder again"
            )
    return Statistics(**found)
