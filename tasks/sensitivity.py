"""Stage sensitivity: how much each layer of an expert matters to the expert's own task."""

from pathlib import Path
from typing import Any

import torch

from tasks.artifacts import write_json
from tasks.datasets import ClassificationTask, Row, RowTask, calibration_batch
from tasks.errors import InputError
from tasks.models.expert import load_network, open_base, open_expert
from tasks.models.layers import layer_of
from tasks.models.networks import load_tokenizer

VERSION = 1


def sensitivity(
    base: Path,
    expert: Path,
    name: str,
    task: RowTask,
    rows: list[Row],
    tokenizer: Path,
    dtype: str,
    device: str,
    out: Path,
) -> dict[str, Any]:
    """Measure s[layer] = mean over samples x of Σ_{p in layer} |p · ∂L(x)/∂p|, one sample at a time (DESIGN §5).

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
        out: folder for `sensitivity.json`: sensitivity by layer, number of samples and tokens.

    Raises:
        InputError: a loss or a sensitivity that is not finite.
    """
    opened = open_expert(expert, open_base(base), f"experts.{name}")
    classifies = isinstance(task, ClassificationTask)
    network = load_network(
        opened,
        "classification" if classifies else "causal_lm",
        getattr(torch, dtype),
        device,
        head_of=opened if opened.head else None,
    )
    reader = load_tokenizer(tokenizer)
    trunk = {opened.base.network_name(tensor): tensor for tensor in opened.base.weights}
    totals: dict[str, torch.Tensor] = {}
    for parameter_name, parameter in network.named_parameters():
        tensor = trunk.get(opened.base.network_name(parameter_name))
        parameter.requires_grad_(tensor is not None)
        if tensor is not None:
            layer = layer_of(tensor)
            totals.setdefault(layer, torch.zeros((), dtype=torch.float64, device=device))
            parameter.register_post_accumulate_grad_hook(_accumulate(totals[layer]))
    tokens = 0
    for number, row in enumerate(rows):
        batch = calibration_batch(
            task, row, reader, f"row {number} of tasks.{name}.calibration", opened.config.label2id
        )
        tokens += batch["input_ids"].numel()
        loss = network(**{key: value.to(device) for key, value in batch.items()}).loss
        if not bool(loss.isfinite()):
            raise InputError(
                f"tasks.{name}.calibration: the loss of experts.{name} on row {number} is {loss.item()}; "
                "expected a finite number (try dtype: float32)"
            )
        loss.backward()
    result = {layer: float(total) / len(rows) for layer, total in totals.items()}
    if not all(value < float("inf") for value in result.values()):
        raise InputError(f"experts.{name}: sensitivity is not finite; try dtype: float32")
    write_json(out / "sensitivity.json", {"sensitivity": result, "samples": len(rows), "tokens": tokens})
    return {"samples": len(rows), "tokens": tokens}


def _accumulate(total: torch.Tensor) -> Any:
    def hook(parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        # In float32: a product of two float16 numbers underflows, and a float64 sum of a large tensor is slow.
        total.add_((parameter.detach().float() * parameter.grad.float()).abs_().sum())
        parameter.grad = None

    return hook
