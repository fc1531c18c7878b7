"""Stage heads: the head of a vision tower that has none, made of the names of its task's classes by a text tower."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.zero_shot import ZeroShot
from sensmerge.tasks.networks.towers import HEAD, class_rows
from sensmerge.tasks.networks.zero_shot import CLASSES
from sensmerge.tasks.stages.job import Job


@dataclass(frozen=True)
class HeadsJob(Job):
    """Makes the head of one expert. Merged models have it: on a GPU, it would have other bits."""

    stage = "heads"
    version = 1

    text_tower: Artifact
    """a whole CLIP"""
    zero_shot: ZeroShot
    """of the expert's task"""
    tower: Local[str]
    """name of the model that the text tower is of"""
    name: Local[str]
    """of the expert, for messages"""

    def finish(self, out: Path) -> dict[str, Any]:
        """Write `HEAD`: a row for every class, float32.

        Returns:
            How many classes there are.

        Raises:
            InputError: a row that is not finite.
        """
        torch.set_num_threads(1)  # sums must not depend on how many threads share them
        classes, templates = self.zero_shot.classes, self.zero_shot.templates
        rows = class_rows(self.text_tower.folder, classes, templates)
        for name, row in zip(classes, rows, strict=True):
            if not bool(row.isfinite().all()):
                raise InputError(
                    f"tasks.{self.name}.zero_shot.classes: the text tower of {self.text_tower.folder} gives NaN or "
                    f"infinity for {name!r}; get its files again"
                )
        out.mkdir(parents=True, exist_ok=True)
        save_file({CLASSES: rows.contiguous()}, out / HEAD, metadata={"format": "pt"})
        return {"classes": len(classes)}
