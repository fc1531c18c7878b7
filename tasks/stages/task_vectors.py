"""Stage task_vectors: how large the changes of each expert are, counted once for all merges that trim them."""

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
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights, by_file
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.identity import Local
from sensmerge.tasks.methods.kernels import loops
from sensmerge.tasks.methods.kernels.delta import Delta, pieces
from sensmerge.tasks.methods.kernels.sparsify import BINS
from sensmerge.tasks.stages.job import Job

TABLE = "task_vector.json"
HISTOGRAMS = "histograms.safetensors"


@dataclass(frozen=True)
class TaskVectorsJob(Job):
    """Measures one expert's task vector."""

    stage = "task_vectors"
    version = 6

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

    def reads(self, part: int | str | None) -> Tensors | None:
        """See `Job`: a piece reads the tensors of its layers, and `finish` none."""
        assert not isinstance(part, str)
        names = [] if part is None else [name for name in self.groups[part] if self.weights.touches(name)]
        models: list[BaseWeights | ExpertWeights] = [self.weights.base, self.weights]
        return by_file(stored for name in names for one in models for stored in one.stored_for(name))

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
            tensors[tensor] = {"changed": False, "max": 0.0}
            if not self.weights.touches(tensor):
                continue
            with noted(f"tensor {tensor} of layer {layer_of(tensor)}"):
                largest, histogram = _measure(self.weights.task_vector(tensor), self.weights.base.read(tensor).view(-1))
            if not math.isfinite(largest):
                delta = self.weights.delta(tensor)
                bad = delta.numel() - int(delta.isfinite().sum())
                raise not_finite(f"experts.{self.name}", self.weights.folder, tensor, bad, delta.numel())
            if largest:
                tensors[tensor] = {"changed": True, "max": largest}
                bins = histogram.nonzero().flatten()
                histograms[tensor] = torch.stack([bins, histogram[bins]])
        save_file(histograms, out / _histograms(part))
        write_json(done, tensors)
        return True

    def finish(self, out: Path) -> dict[str, Any]:
        """Put together what was found in all groups.

        Writes `task_vector.json` (per tensor: changed, largest magnitude) and `histograms.safetensors` (per changed
        tensor: the filled bins of its magnitude histogram and their counts, int64 (2, bins), from which TIES takes
        exact thresholds for any density).

        Returns:
            The number of tensors and of changed ones.
        """
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
        return {"tensors": len(tensors), "changed": sum(entry["changed"] for entry in tensors.values())}


def _measured(group: int) -> str:
    return f".group-{group}.json"


def _histograms(group: int) -> str:
    return f".group-{group}.safetensors"


def _measure(delta: Delta, base: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the largest magnitude (NaN where one is) and the histogram; base flat, in any float dtype."""
    histogram, largest = torch.zeros(BINS, dtype=torch.int64), 0
    for _, piece in pieces(delta, base):
        largest = max(largest, loops.count_bins(piece.numpy(), histogram.numpy()))
    return float(np.int32(largest).view(np.float32)), histogram


def read_histogram(artifact: Path, tensor: str) -> torch.Tensor | None:
    """Return the magnitude histogram of a tensor's task vector from the stage's artifact; None if nothing changed."""
    with safe_open(artifact / HISTOGRAMS, framework="pt") as file:
        if tensor not in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            return None
        bins, counts = file.get_tensor(tensor)
    histogram = torch.zeros(1 << 15, dtype=torch.int64)
    histogram[bins] = counts
    return histogram


def not_finite(key: str, folder: Path, tensor: str, bad: int, count: int) -> InputError:
    """Return the error for weights that are no numbers: `bad` of `count` values of a tensor of the model at a key."""
    return InputError(
        f"{key}: tensor {tensor} of {folder} has {bad} NaN or Inf of {count} values; expected finite weights"
    )
