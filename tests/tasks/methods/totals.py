"""Artifacts of the stage statistics, written by hand."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sensmerge.tasks.artifacts import Artifact, write_json
from sensmerge.tasks.statistics.gram import packed
from sensmerge.tasks.statistics.statistic import TENSORS


def write_totals(
    folder: Path,
    name: str,
    totals: Mapping[str, torch.Tensor],
    count: int = 1,
    input_dims: Mapping[str, int] = {},
    samples: int | None = None,
) -> Artifact:
    """Write the totals of a statistic by tensor, each over `count` tokens and `samples`, or else as many samples.

    Args:
        folder: of the artifact; it may hold another statistic's already.
        name: of the statistic.
        totals: by tensor.
        count: how many tokens and samples they are sums over.
        input_dims: the dimension that inputs run along, of tensors where it is not 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: packed([total.float()]) if name == "gram" else total.float() for key, total in totals.items()}
    save_file({key: total.contiguous() for key, total in stored.items()}, folder / f"{name}.safetensors")
    places = {
        key: {"file": f"{name}.safetensors", "key": key, "input_dim": input_dims.get(key, 1), "tokens": count}
        for key in totals
    }
    write_json(folder / f"{name}.json", {TENSORS: places, "samples": samples or count, "tokens": count})
    return Artifact(folder.name, folder)
