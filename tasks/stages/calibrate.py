"""Stage calibrate: a merged model is fitted, block after block, to the features of its experts (FeatCal)."""

import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensmerge.tasks.artifacts import Artifact, write_json
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.planned import CheckpointPlan, CheckpointWriter, preallocate
from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.features import FeatureCalibration
from sensmerge.tasks.identity import Local
from sensmerge.tasks.networks.readers import load_reader
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.walk import Traveller, Walk
from sensmerge.tasks.stages.calibration import CalibrationSet, reader_of
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.variant import COEFFICIENTS
from sensmerge.tasks.stages.written import about, marker, plan_merged, verified, write_tensor

_WALK, _STATES, _OUTSIDE = "walk", ".states", "outside"


@dataclass(frozen=True, kw_only=True)
class CalibrateJob(Job):
    """Calibrates a merged checkpoint, and writes it as another one."""

    stage = "calibrate"
    version = 1

    merged: Artifact
    base: Artifact
    experts: Mapping[str, Artifact]
    base_config: Set[str]
    """experts that run with the base's settings where their own config differs"""
    calibration: Mapping[str, CalibrationSet]
    """by expert"""
    tokenizer: Artifact | Mapping[str, Artifact]
    """that all models share, or by task where its expert reads it with its own"""
    settings: FeatureCalibration
    dtype: str
    """torch name of the networks' dtype; sums and solutions are float64"""
    merge: Local[MergeJob]
    """what made `merged`: the files of the calibrated checkpoint are laid out alike"""
    name: Local[str]
    """of the variant, for messages"""
    device: Local[str]
    """torch device"""

    def parts(self) -> list[str]:
        """Return the one piece: blocks depend on those before them."""
        return [_WALK]

    def run(self, part: int | str, out: Path) -> bool:
        """Walk through the blocks and write each as soon as it is solved, with as many tasks at once as torch threads.

        Blocks that an earlier, interrupted run finished are left as they are; False is returned if all are.

        Raises:
            InputError: a network that cannot be run in parts, a row that makes no sample, or a weight that is NaN or
                Inf.
        """
        workers = torch.get_num_threads() if self.device == "cpu" else 1
        torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
        plan, merged = self._plan(), self.merged.folder
        walk = self._walk(workers)
        place = _reached(walk, out)
        if place == walk.blocks:
            return False
        preallocate(plan, out)
        walk.enter(merged, None if place else out / _STATES / "0")
        with CheckpointWriter(plan, out) as writer:
            if not (out / marker(_OUTSIDE)).exists():
                inside = {name for block in range(walk.blocks) for name in walk.tensors(block)}
                rest = [name for name in plan.tensors if name not in inside]
                write_json(out / marker(_OUTSIDE), self._write(rest, {}, writer, "outside"))
            for block in range(place, walk.blocks):
                folders = [out / _STATES / str(number) for number in (block, block + 1)]
                with noted(f"block {block}"):
                    solved = walk.solve(block, merged, folders)
                    entries = self._write(walk.tensors(block), solved, writer)
                    if block + 1 < walk.blocks:
                        walk.advance(block, out, folders)
                write_json(out / marker(block), entries)
                shutil.rmtree(folders[0])
        return True

    def finish(self, out: Path) -> dict[str, Any]:
        """Verify what was written, and put beside it what lies beside the merged model's weights.

        Returns:
            What `about` says; `calibrated`: how many tensors were solved; `kept`: how many weights in blocks have the
            merged values; `first_kept`: the name of the first of them.

        Raises:
            OSError: a tensor on disk is not what was written; all is calibrated again when the step runs again.
        """
        markers = [out / marker(_OUTSIDE), *sorted(out.glob(marker("[0-9]*")))]
        plan = self._plan()
        tensors = verified(plan, markers, out)
        self.merge.write_companions(out, self.merge.out_dtype)
        if (self.merged.folder / HEADS).is_dir():
            shutil.copytree(self.merged.folder / HEADS, out / HEADS, dirs_exist_ok=True)
        shutil.copyfile(self.merged.folder / COEFFICIENTS, out / COEFFICIENTS)
        shutil.rmtree(out / _STATES, ignore_errors=True)
        for one in markers:
            one.unlink()
        weights = set(self.merge.base.weights)
        kept = [name for name, entry in tensors.items() if entry["how"] == "kept" and name in weights]
        calibrated = [name for name, entry in tensors.items() if entry["how"] == "solved"]
        return about(plan, tensors) | {"calibrated": len(calibrated), "kept": len(kept), "first_kept": kept[:1]}

    def _plan(self) -> CheckpointPlan:
        return plan_merged(self.merge.base, self.merge.out_dtype, self.merge.shard_size)

    def _walk(self, workers: int) -> Walk:
        travellers = []
        for name, expert in self.experts.items():
            calibration = self.calibration[name]
            source = Source(
                self.base.folder,
                expert.folder,
                f"experts.{name}",
                calibration.head,
                getattr(torch, self.dtype),
                self.device,
                name in self.base_config,
            )
            reader = load_reader(reader_of(self.tokenizer, name).folder, calibration.task.reads)
            batches = list(calibration.samples(name, reader, source.expert.config.label2id))
            travellers.append(Traveller(name, source, batches, calibration.task.has_own_head))
        return Walk(travellers, self.settings, workers)

    def _write(
        self, names: Sequence[str], solved: Mapping[str, Tensor], writer: CheckpointWriter, other: str = "kept"
    ) -> dict[str, Any]:
        """Write tensors, those that are not solved as the merged model has them, and return what a marker says."""
        merged, plan, entries = open_checkpoint(self.merged.folder), self._plan(), {}
        for name in names:
            values = (solved[name].cpu() if name in solved else merged.read(name)).reshape(-1)
            dtype = plan.tensors[name].dtype
            digest, is_finite = write_tensor(writer, name, [(slice(0, len(values)), values)], dtype)
            if name in solved and not is_finite:
                raise InputError(
                    f"merges.{self.name}.calibrate: tensor {name} has NaN or Inf as {dtype}; set another out_dtype, or "
                    "a larger ridge"
                )
            writer.begin_flush(name)
            entries[name] = {"blake3": digest, "how": "solved" if name in solved else other}
        return entries


def _reached(walk: Walk, out: Path) -> int:
    """Return the first block that is not done; all are done again where what it needs of those before is gone."""
    markers = [out / marker(block) for block in range(walk.blocks)]
    place = next((number for number, one in enumerate(markers) if not one.exists()), walk.blocks)
    is_whole = (out / marker(_OUTSIDE)).exists()
    if place and not (is_whole and (place == walk.blocks or walk.are_before(out / _STATES / str(place)))):
        for one in markers:
            one.unlink(missing_ok=True)
        return 0
    return place
