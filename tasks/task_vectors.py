"""Stage task_vectors: what each expert changed, tensor by tensor, and whether its weights are numbers at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.artifacts import write_json
from tasks.errors import InputError
from tasks.methods.sparsify import magnitude_histogram
from tasks.models.expert import Expert, open_base, open_expert

VERSION = 1


def task_vectors(base: Path, expert: Path, name: str, out: Path) -> dict[str, Any]:
    """Measure the task vector of one expert in one pass, a tensor at a time.

    Writes `task_vector.json` (per tensor: changed, L1 and L2 norm, largest magnitude) and `histograms.safetensors`
    (per changed tensor: the filled bins of its `magnitude_histogram` and their counts, int64 (2, bins), from which TIES
    takes exact thresholds for any density).

    Returns:
        The number of tensors and of changed ones, and the L2 norm of the whole task vector.

    Raises:
        InputError: NaN or Inf in the expert, naming the tensor.
    """
    opened = open_expert(expert, open_base(base), f"experts.{name}")
    tensors: dict[str, dict[str, Any]] = {}
    histograms: dict[str, torch.Tensor] = {}
    for tensor in opened.base.weights:
        delta = _checked_delta(opened, tensor, name)
        changed = delta is not None and bool(delta.count_nonzero())
        tensors[tensor] = {"changed": changed, "l1": 0.0, "l2": 0.0, "max": 0.0}
        if delta is not None and changed:
            magnitude = delta.abs()
            tensors[tensor] |= {
                "l1": float(magnitude.sum(dtype=torch.float64)),
                "l2": float(torch.linalg.vector_norm(delta, dtype=torch.float64)),
                "max": float(magnitude.max()),
            }
            histogram = magnitude_histogram(delta)
            bins = histogram.nonzero().flatten()
            histograms[tensor] = torch.stack([bins, histogram[bins]])
    for tensor, values in opened.head_tensors().items():
        _check_finite(values, tensor, opened, name)
    save_file(histograms, out / "histograms.safetensors")
    write_json(out / "task_vector.json", tensors)
    total = sum(entry["l2"] ** 2 for entry in tensors.values()) ** 0.5
    return {"tensors": len(tensors), "changed": sum(entry["changed"] for entry in tensors.values()), "l2": total}


def read_histogram(artifact: Path, tensor: str) -> torch.Tensor | None:
    """Return the `magnitude_histogram` of a tensor's task vector from the stage's artifact; None if nothing changed."""
    with safe_open(artifact / "histograms.safetensors", framework="pt") as file:
        if tensor not in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            return None
        bins, counts = file.get_tensor(tensor)
    histogram = torch.zeros(1 << 15, dtype=torch.int64)
    histogram[bins] = counts
    return histogram


def _checked_delta(expert: Expert, tensor: str, name: str) -> torch.Tensor | None:
    if not expert.touches(tensor):
        return None
    delta = expert.delta(tensor)
    _check_finite(delta, tensor, expert, name)
    return delta


def _check_finite(values: torch.Tensor, tensor: str, expert: Expert, name: str) -> None:
    if not bool(values.isfinite().all()):
        bad = values.numel() - int(values.isfinite().sum())
        raise InputError(
            f"experts.{name}: tensor {tensor} of {expert.folder} has {bad} NaN or Inf of {values.numel()} values "
            "(expert or base); expected finite weights"
        )
