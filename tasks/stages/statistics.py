"""Stage statistics: what is accumulated over an expert's own calibration set, such as its layers' sensitivity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.artifacts import Artifact, write_json
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.networks.journeys import Measured
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.readers import load_reader
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.stages.calibration import CalibrationSet
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.statistics.statistic import TENSORS, Statistic, index

WITHOUT = "without"
"""Entry of the JSON of a statistic by tensor: tensors of two and more dimensions that have no total."""


@dataclass(frozen=True)
class StatisticsJob(Job):
    """Measures a set of statistics of one expert, in one pass over its calibration set."""

    stage = "statistics"
    version = 1
    resumes = True

    base: Artifact
    expert: Artifact
    base_config: bool
    """whether the expert runs with the base's settings where its own config differs"""
    statistics: Mapping[str, Statistic]
    """by name"""
    calibration: CalibrationSet
    tokenizer: Artifact
    """that reads the calibration set"""
    dtype: str
    """torch name of the network's dtype; sums are float64"""
    name: Local[str]
    """of the expert, for messages"""
    device: Local[str]
    """torch device"""
    placement: Local[Placement]
    """where the network runs"""
    planned: Local[PlannedModels] = NONE
    """those that it reads"""

    def reads(self, part: int | str | None) -> Tensors | None:
        """See `Job`: headers at first, and then what is read of the expert, where it is."""
        folders = (self.base.folder, self.expert.folder)
        return dict.fromkeys(folders, ()) if self.planned.of(*folders).listings else None

    def finish(self, out: Path) -> dict[str, Any]:
        """Run the network over one sample at a time.

        Writes `NAME.json` for each statistic: by layer the mean over samples, tied parameters counted once and per-task
        heads, which are no layer, left out; by tensor the places of the totals, in files beside, and the matrices
        without one; the number of samples and tokens.

        Returns:
            The number of samples and tokens.

        Raises:
            InputError: a loss or a mean that is not finite.
        """
        base, expert = self.base.folder, self.expert.folder
        dtype, key = getattr(torch, self.dtype), f"experts.{self.name}"
        models = self.planned.of(base, expert)
        source = Source(base, expert, key, self.calibration.head, dtype, self.device, self.base_config, models)
        reader = load_reader(self.tokenizer.folder, self.calibration.task.reads)
        batches = list(self.calibration.samples(self.name, reader, source.expert.config.label2id))
        samples: dict[int, Measured] = {}
        with open_runner(source, self.placement, out, self.statistics) as runner:
            samples.update(runner.run(batches, self._check))
        tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
        about = {"samples": len(batches), "tokens": tokens}
        for name, statistic in self.statistics.items():
            if statistic.by == "tensor":
                found = index(out, name)
                matrices = [one for one in source.expert.base.weights if len(source.expert.base.info(one).shape) > 1]
                lacking = [one for one in matrices if one not in found]
                write_json(out / f"{name}.json", about | {TENSORS: found, WITHOUT: lacking})
                continue
            # In the order of the rows, so that the sums do not depend on which sample was done first.
            sums = [samples[number].sums[name] for number in range(len(batches))]
            layers = [layer for layer in group_by_layer(source.expert.base.weights) if layer in sums[0]]
            means = {layer: sum(one[layer] for one in sums) / len(batches) for layer in layers}
            if not all(math.isfinite(value) for value in means.values()):
                raise InputError(f"{key}: {name} is not finite; try dtype: float32")
            write_json(out / f"{name}.json", {name: means} | about)
        return about

    def _check(self, number: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"tasks.{self.name}.calibration: the loss of experts.{self.name} on row {number} is {loss}; "
                "expected a finite number (try dtype: float32)"
            )
