"""Stage vectors: what leads from a static merge to each expert, so that samples can be answered from there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.artifacts import Artifact, link_file
from sensmerge.tasks.checkpoints.checkpoint import INDEX, open_checkpoint
from sensmerge.tasks.checkpoints.companions import CONFIG, companions
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.weights import HEADS, BaseWeights, ExpertWeights, by_file
from sensmerge.tasks.dynamic.vectors import BASE, Vector, compact
from sensmerge.tasks.dynamic.writing import finite_as, seal, vectors_file, write_vectors
from sensmerge.tasks.identity import Local
from sensmerge.tasks.stages.job import Job


@dataclass(frozen=True)
class VectorsJob(Job):
    """Writes each expert's difference to a static merge, for SE-Merging that starts there."""

    stage = "vectors"
    version = 1

    static: Artifact
    """the static merge, a checkpoint"""
    models: Mapping[str, str]
    """fingerprints of the artifacts of base and experts"""
    base: Local[BaseWeights]
    experts: Local[Mapping[str, ExpertWeights]]
    groups: Local[Sequence[Sequence[str]]]
    """the base's weights in groups of whole layers"""

    def parts(self) -> Sequence[int]:
        """Return the numbers of the groups."""
        return range(len(self.groups))

    def reads(self, part: int | str | None) -> Tensors | None:
        """See `Job`: a piece reads the experts' tensors of its layers, and `finish` none."""
        assert not isinstance(part, str)
        names = [] if part is None else self._mixed(self.groups[part])
        return by_file(one for name in names for expert in self.experts.values() for one in expert.read_for(name))

    def run(self, part: int | str, out: Path) -> bool:
        """Write what leads to each expert in each tensor of a group of layers, in the static merge's dtype.

        A coefficient of 1 gives the expert, up to that dtype's precision. A group that an interrupted run finished is
        left as it is, and False returned. Holds one tensor at a time, of an expert and the merge, in float32, and the
        group's compact vectors.

        Raises:
            InputError: a value that is NaN or Inf, naming the tensor.
        """
        assert isinstance(part, int)
        if vectors_file(out, part).exists():
            return False
        merged = open_checkpoint(self.static.folder)
        found: dict[str, dict[str, Vector]] = {}
        for name in self._mixed(self.groups[part]):
            origin = merged.read(name)
            for key, expert in self.experts.items():
                way = torch.sub(expert.read(name).float(), origin.float())
                vector = compact(finite_as(way, origin.dtype, key, name), origin.dtype)
                if vector is not None:
                    found.setdefault(name, {})[key] = vector
        write_vectors(out, part, found)
        return True

    def _mixed(self, names: Iterable[str]) -> list[str]:
        """Return the tensors that may differ: a calibrated merge changes some that no expert changed."""
        return [name for name in names if name not in self.base.statistics and self.base.info(name).is_floating_point]

    def finish(self, out: Path) -> dict[str, Any]:
        """Complete the folder: the static merge as the checkpoint in `BASE`, per-task heads, the digests of all files.

        Returns:
            What `seal` returns.
        """
        merged = self.static.folder
        weights = {info.file for info in open_checkpoint(merged).tensors.values()}
        beside = [name for name in (INDEX, CONFIG) if (merged / name).is_file()]
        for name in (*weights, *beside, *companions(merged)):
            link_file(merged / name, out / BASE / name)
        for path in (merged / HEADS).rglob("*"):
            if path.is_file():
                link_file(path, out / path.relative_to(merged))
        return seal(out)
