"""What a classifier's head reads of a trunk's output: mostly so little that it is kept, as trunks outlast heads."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensmerge.tasks.networks.blocks import Batch, TrunkOutput, to_device
from sensmerge.tasks.networks.heads import DetachedHead

HeadInput = Mapping[str, Tensor]
"""`places` (n, 2): sample and position of the hidden states that are read; `hidden` (n, width): these; `pooled`
(B, width) of a trunk with a pooler. On the CPU."""


def head_input(head: DetachedHead, output: TrunkOutput, batch: Batch) -> HeadInput:
    """Return what a head reads of a trunk's output: the hidden states on which its logits have a gradient.

    That is one position of a sample, or none beside the pooled output, or all where the head takes their mean: the
    same for all weights, but not for all configs (`computation_digest`). Of a sample on which no logit depends (all
    units of the head are off) everything is kept.

    Args:
        head: of the task.
        output: what the trunk gave for the batch, see `trunk_output`.
        batch: what the trunk was given.
    """
    device = str(head.network.device)
    output, batch = to_device(output, device), to_device(batch, device)
    with torch.enable_grad():
        hidden = output["hidden"].detach().requires_grad_()
        logits = head.logits(hidden, output.get("pooled"), batch)
        # Different weights, lest the gradients of two classes cancel out.
        weighted = logits @ torch.linspace(1, 2, logits.shape[-1], device=device)
        (gradient,) = torch.autograd.grad(weighted.sum(), hidden, allow_unused=True)
    if gradient is None:  # the pooled output is all that is read
        read = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=device)
    else:
        read = gradient.ne(0).any(-1)
        read |= ~read.any(1, keepdim=True)
    kept = {"places": read.nonzero(), "hidden": output["hidden"][read]}
    if "pooled" in output:
        kept["pooled"] = output["pooled"]
    return {key: tensor.detach().cpu().contiguous() for key, tensor in kept.items()}


def is_little(kept: HeadInput, batch: Batch) -> bool:
    """Return whether a head reads so little, one position of each sample, that it is kept."""
    return len(kept["places"]) <= len(next(iter(batch.values())))


def logits_of(head: DetachedHead, kept: HeadInput, batch: Batch) -> Tensor:
    """Return the logits, float32, (B, classes), of a head that is given what `head_input` kept for the batch."""
    device = str(head.network.device)
    kept, batch = to_device(dict(kept), device), to_device(batch, device)
    count = len(next(iter(batch.values())))
    # Of pictures, no input has as many positions as the trunk gives: none behind the last that is read counts.
    length = batch["input_ids"].shape[1] if "input_ids" in batch else max(kept["places"][:, 1].tolist(), default=0) + 1
    hidden = kept["hidden"].new_zeros(count, length, *kept["hidden"].shape[1:])
    hidden[kept["places"][:, 0], kept["places"][:, 1]] = kept["hidden"]
    with torch.no_grad():
        return head.logits(hidden, kept.get("pooled"), batch).cpu()


def save_head_inputs(inputs: Mapping[int, HeadInput], fingerprint: str, file: Path) -> None:
    """Write what a head reads, by the number of the batch; `fingerprint` says of which trunk and samples."""
    tensors = {f"{number}.{key}": tensor for number, one in inputs.items() for key, tensor in one.items()}
    save_file(tensors, file, metadata={"fingerprint": fingerprint})


def load_head_inputs(file: Path) -> dict[int, HeadInput]:
    """Read what `save_head_inputs` wrote."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        number, key = name.split(".")
        found.setdefault(int(number), {})[key] = tensor
    return dict(found)


def fingerprint_of(file: Path) -> str:
    """Return the fingerprint that `save_head_inputs` wrote into a file."""
    with safe_open(file, "pt") as opened:
        return str(opened.metadata()["fingerprint"])
