"""How near an expert's weights are to its base's, as far as a few values of both tell."""

import statistics

import torch

from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, FilesNeeded
from sensmerge.tasks.checkpoints.weights import ExpertWeights

MATRICES = 8
"""How many tensors are looked at, at most."""
VALUES = 2**16
"""How many of their values, at most; they lie side by side, so that a disk is asked for little."""
LEAST = 2**10
"""Values of a tensor that is looked at: of fewer, two that have nothing to do with each other may look alike."""


def kinship(expert: ExpertWeights) -> tuple[float, int] | None:
    """Return the median cosine of values of an expert with the base's, over some matrices, and of how many.

    It is near 1 for a fine-tune of the base and near 0 for networks that were trained from different starts. Vectors
    are left out: those of norms are all near 1, in any network.

    Returns:
        None where nothing can be compared: an adapter has no values of its own, files may not be here yet, and what is
        put together of rows or of fp8 values is not looked at.
    """
    names = [name for name in expert.base.weights if _is_comparable(expert, name)]
    found = []
    for name in names[:: max(1, len(names) // MATRICES)][:MATRICES]:
        cosine = _cosine(expert, name)
        if cosine is not None:
            found.append(cosine)
    return (statistics.median(found), len(found)) if found else None


def _is_comparable(expert: ExpertWeights, name: str) -> bool:
    base, info = expert.base, expert.base.info(name)
    if name not in expert.own or name in expert.low_rank or name in expert.pieces or name in base.statistics:
        return False
    if len(info.shape) < 2 or info.numel < LEAST or not info.is_floating_point:
        return False
    return _is_plain(base.checkpoint, base.stored_name(name)) and _is_plain(expert.source, expert.own[name])


def _is_plain(checkpoint: Checkpoint, name: str) -> bool:
    return name not in checkpoint.gathered and name not in checkpoint.scales


def _cosine(expert: ExpertWeights, name: str) -> float | None:
    """Return the cosine of values in the middle of a tensor; None where a file is not here, or all of them are 0."""
    try:
        expert.base.checkpoint.require(expert.base.stored_name(name))
        expert.source.require(expert.own[name])
    except FilesNeeded:
        return None
    ours, theirs = (_middle(one) for one in (expert.read(name), expert.base.read(name)))
    norms = float(ours.norm() * theirs.norm())
    return float(ours @ theirs) / norms if 0 < norms < float("inf") else None


def _middle(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    start = max(0, (len(flat) - VALUES) // 2)
    return flat[start : start + VALUES].double()
