"""Stage task_vectors: what each expert changed, tensor by tensor, and whether its weights are numbers at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sensmerge.tasks.artifacts import read_json, write_json
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.checkpoints.weights import ExpertWeights
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.identity import Local
from sensmerge.tasks.methods.kernels import loops
from sensmerge.tasks.methods.kernels.delta import BLOCK, Delta, pieces
from sensmerge.tasks.methods.kernels.sparsify import BINS
from sensmerge.tasks.stages.job import Job

TABLE = "task_vector.json"
HISTOGRAMS = "histograms.safetensors"


@dataclass(frozen=True)
class TaskVectorsJob(Job):
    """Measures one expert's task vector."""

    stage = "task_vectors"
    version = 5

    base: str
    """fingerprint of the base's artifact"""
    expert: str
    """fingerprint of the expert's artifact"""
    untied: bool
    """whether another expert unties the base, so that this one's vectors have tensors more"""
    name: Local[str]
    """of the expert, for messages"""
    weights: Local[ExpertWeights]
    groups: Local[Sequence[Sequence[str]]]
    """the base's weights in groups of whole layers"""

    def parts(self) -> Sequence[int]:
        """Return the numbers of the groups."""
        return range(len(self.groups))

    def run(self, part: int | str, out: Path) -> bool:
        """Measure one group of layers, in one pass, piece by piece.

        A group that an earlier, interrupted run finished is left as it is, and False returned.

        Raises:
            InputError: NaN or Inf in the expert, naming the tensor.
        """
        assert isinstance(part, int)
        done = out / _measured(part)
        if done.exists():
            return False
        torch.set_num_threads(1)  # sums must not depend on how many threads share them
        tensors: dict[str, dict[str, Any]] = {}
        histograms: dict[str, torch.Tensor] = {}
        for tensor in self.groups[part]:
            content = {"content": self.weights.content(tensor)}
            tensors[tensor] = {"changed": False, "l1": 0.0, "l2": 0.0, "max": 0.0} | content
            if not self.weights.touches(tensor):
                continue
            with noted(f"tensor {tensor} of layer {layer_of(tensor)}"):
                entry, histogram = _measure(self.weights.task_vector(tensor), self.weights.base.read(tensor).view(-1))
            if not math.isfinite(entry["max"]):
                raise _not_finite(self.weights.delta(tensor), tensor, self.weights, self.name)
            if entry["max"]:
                tensors[tensor] = {"changed": True} | entry | content
                bins = histogram.nonzero().flatten()
                histograms[tensor] = torch.stack([bins, histogram[bins]])
        save_file(histograms, out / _histograms(part))
        write_json(done, tensors)
        return True

    def finish(self, out: Path) -> dict[str, Any]:
        """Put together what was found in all groups.

        Writes `task_vector.json` (per tensor: changed, L1 and L2 norm, largest magnitude, and `content`, the digest of
        what they come from) and `histograms.safetensors` (per changed tensor: the filled bins of its magnitude
        histogram and their counts, int64 (2, bins), from which TIES takes exact thresholds for any density).

        Returns:
            The number of tensors and of changed ones, and the L2 norm of the whole task vector.

        Raises:
            InputError: NaN or Inf in the expert's head, naming the tensor.
        """
        for tensor, values in self.weights.head_tensors().items():
            if not bool(values.isfinite().all()):
                raise _not_finite(values, tensor, self.weights, self.name)
        tensors: dict[str, dict[str, Any]] = {}
        histograms: dict[str, torch.Tensor] = {}
        for group in self.parts():
            tensors |= read_json(out / _measured(group))
            histograms |= load_file(out / _histograms(group))
        save_file(histograms, out / HISTOGRAMS)
        write_json(out / TABLE, tensors)
        for group in self.parts():
            (out / _measured(group)).unlink()
            (out / _histograms(group)).unlink()
        total = math.hypot(*(entry["l2"] for entry in tensors.values()))
        return {"tensors": len(tensors), "changed": sum(entry["changed"] for entry in tensors.values()), "l2": total}


def _measured(group: int) -> str:
    return f".group-{group}.json"


def _histograms(group: int) -> str:
    return f".group-{group}.safetensors"


def _measure(delta: Delta, base: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Return L1 and L2 norm, largest magnitude (NaN where one is) and histogram; base flat, in any float dtype."""
    histogram = torch.zeros(BINS, dtype=torch.int64)
    sums: list[float] = []
    norms: list[float] = []
    largest = 0
    for _, piece in pieces(delta, base):
        largest = max(largest, loops.count_bins(piece.numpy(), histogram.numpy()))
        for block in torch.split(piece, BLOCK):
            sums.append(float(torch.linalg.vector_norm(block, 1)))
            norms.append(_norm(block))
    entry = {"l1": math.fsum(sums), "l2": math.hypot(*norms), "max": float(np.int32(largest).view(np.float32))}
    return entry, histogram


def _norm(block: torch.Tensor) -> float:
    """Return the L2 norm; in float64, which is slow, only where float32 cannot hold the squares."""
    norm = float(torch.linalg.vector_norm(block))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(block, dtype=torch.float64))


def read_histogram(artifact: Path, tensor: str) -> torch.Tensor | None:
    """Return the magnitude histogram of a tensor's task vector from the stage's artifact; None if nothing changed."""
    with safe_open(artifact / HISTOGRAMS, framework="pt") as file:
        if tensor not in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            return None
        bins, counts = file.get_tensor(tensor)
    histogram = torch.zeros(1 << 15, dtype=torch.int64)
    histogram[bins] = counts
    return histogram


def _not_finite(values: torch.Tensor, tensor: str, expert: ExpertWeights, name: str) -> InputError:
    bad = values.numel() - int(values.isfinite().sum())
    return InputError(
        f"experts.{name}: tensor {tensor} of {expert.folder} has {bad} NaN or Inf of {values.numel()} values "
        "(expert or base); expected finite weights"
    )
