"""Stage sensitivity: how much each layer of an expert matters to the expert's own task."""

import math
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.networks.journeys import Sensitivity
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.rows.source import Row

VERSION = 4


def sensitivity(
    base: Path,
    expert: Path,
    name: str,
    task: RowTask,
    rows: list[Row],
    tokenizer: Path,
    dtype: str,
    device: str,
    placement: Placement,
    out: Path,
    base_config: bool = False,
) -> dict[str, Any]:
    """Measure s[layer] = mean over samples x of Σ_{p in layer} |p · ∂L(x)/∂p|, one sample at a time.

    L is the loss of the expert on its own sample; tied parameters count once; per-task heads are no layer. A gradient
    is used and dropped as soon as backward has it, so no more than one tensor's gradient is held.

    Args:
        base: folder of the base.
        expert: folder of the expert.
        name: the expert's name.
        task: how rows become samples and losses.
        rows: the calibration set.
        tokenizer: folder of the tokenizer that all models share.
        dtype: torch name of the network's dtype; sums are float64.
        device: torch device.
        placement: where the network runs; it changes no number.
        out: folder for `sensitivity.json`: sensitivity by layer, number of samples and tokens.
        base_config: whether the expert runs with the base's settings where its own config differs.

    Raises:
        InputError: a loss or a sensitivity that is not finite.
    """
    source = Source(base, expert, f"experts.{name}", task.head, getattr(torch, dtype), device, base_config)
    reader, label2id = load_tokenizer(tokenizer), source.expert.config.label2id
    batches = [
        task.calibration_batch(row, reader, f"row {number} of tasks.{name}.calibration", label2id)
        for number, row in enumerate(rows)
    ]

    def check(number: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"tasks.{name}.calibration: the loss of experts.{name} on row {number} is {loss}; "
                "expected a finite number (try dtype: float32)"
            )

    samples: dict[int, Sensitivity] = {}
    with open_runner(source, placement, out) as runner:
        samples.update(runner.sensitivities(batches, check))
    # In the order of the rows, so that the sums do not depend on which sample was done first.
    sums = [samples[number].sums for number in range(len(rows))]
    layers = [layer for layer in group_by_layer(source.expert.base.weights) if layer in sums[0]]
    result = {layer: sum(one[layer] for one in sums) / len(rows) for layer in layers}
    if not all(math.isfinite(value) for value in result.values()):
        raise InputError(f"experts.{name}: sensitivity is not finite; try dtype: float32")
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    write_json(out / "sensitivity.json", {"sensitivity": result, "samples": len(rows), "tokens": tokens})
    return {"samples": len(rows), "tokens": tokens}
