"""Stage cross_task: how far the experts' logits lie apart on each other's calibration sets."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.artifacts import write_json
from tasks.datasets import ClassificationTask, Row, RowSet, calibration_batch
from tasks.errors import InputError
from tasks.models.expert import Expert, load_network, open_base, open_expert
from tasks.models.heads import DetachedHead
from tasks.models.networks import load_tokenizer

VERSION = 1
CHUNK_TOKENS = 256
"""Logits exist for this many tokens of one sample at a time."""


def cross_task(
    base: Path,
    experts: Mapping[str, Path],
    calibration: Mapping[str, RowSet],
    tokenizer: Path,
    dtype: str,
    device: str,
    out: Path,
) -> dict[str, Any]:
    """Measure g[i][j] = mean over samples of D_j of the mean over tokens of ‖logits_i − logits_j‖₂ (DESIGN §5).

    Every expert's trunk runs once over every calibration set (K² passes); what it hands to its head is kept on disk.
    Then the heads run over that, side by side, `CHUNK_TOKENS` tokens at a time. Memory: one network, K heads and, per
    head, one chunk of logits. On a classification task every trunk is followed by the head of the task's own expert.

    Returns:
        The largest and smallest distance; `distances.json` in `out` has them all.

    Raises:
        InputError: logits that are not finite.
    """
    opened_base = open_base(base)
    opened = {name: open_expert(folder, opened_base, f"experts.{name}") for name, folder in experts.items()}
    reader = load_tokenizer(tokenizer)
    torch_dtype = getattr(torch, dtype)
    batches: dict[str, list[dict[str, torch.Tensor]]] = {
        name: [
            _inputs(one, row, reader, f"row {i} of tasks.{name}.calibration", opened[name], device)
            for i, row in enumerate(one.rows)
        ]
        for name, one in calibration.items()
    }
    heads: dict[str, DetachedHead] = {}
    with tempfile.TemporaryDirectory(dir=out) as scratch, torch.inference_mode():
        for i, expert in opened.items():
            kind = "classification" if isinstance(calibration[i].task, ClassificationTask) else "causal_lm"
            network = load_network(expert, kind, torch_dtype, device, head_of=expert if expert.head else None)
            for j in opened:
                for number, batch in enumerate(batches[j]):
                    save_file(_trunk_output(network.base_model, batch), _kept(scratch, i, j, number))
            heads[i] = DetachedHead(network)
        distances: dict[str, dict[str, float]] = {i: {} for i in opened}
        for j in opened:
            own_head = isinstance(calibration[j].task, ClassificationTask)
            sums = _compare(j, opened, heads, own_head, batches[j], scratch, device)
            for i in opened:
                distances[i][j] = sums[i] / len(batches[j])
                if not math.isfinite(distances[i][j]):
                    raise InputError(
                        f"tasks.{j}.calibration: the distance of experts.{i} from experts.{j} is {distances[i][j]}; "
                        "expected a finite number (try dtype: float32)"
                    )
    write_json(out / "distances.json", distances)
    apart = [g for i, row in distances.items() for j, g in row.items() if i != j]
    return {"min": min(apart), "max": max(apart)}


def _inputs(one: RowSet, row: Row, tokenizer: Any, where: str, expert: Expert, device: str) -> dict[str, torch.Tensor]:
    batch = calibration_batch(one.task, row, tokenizer, where, expert.config.label2id)
    return {key: value.to(device) for key, value in batch.items() if key != "labels"}


def _kept(scratch: str, i: str, j: str, number: int) -> Path:
    return Path(scratch) / f"{i}-on-{j}-{number}.safetensors"


def _trunk_output(trunk: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output = trunk(**batch)
    kept = {"hidden": output.last_hidden_state, "pooled": getattr(output, "pooler_output", None)}
    return {key: tensor.cpu().contiguous() for key, tensor in kept.items() if tensor is not None}


def _compare(
    j: str,
    experts: Mapping[str, Expert],
    heads: Mapping[str, DetachedHead],
    own_head: bool,
    batches: list[dict[str, torch.Tensor]],
    scratch: str,
    device: str,
) -> dict[str, float]:
    """Return, per expert i, the sum over samples of D_j of the mean over tokens of ‖logits_i − logits_j‖₂."""
    sums = dict.fromkeys(experts, 0.0)
    for number, batch in enumerate(batches):
        kept = {i: load_file(_kept(scratch, i, j, number), device=device) for i in experts}
        length = kept[j]["hidden"].shape[1]
        step = length if own_head else CHUNK_TOKENS
        norms: dict[str, list[torch.Tensor]] = {i: [] for i in experts}
        for start in range(0, length, step):
            chunk = slice(start, start + step)
            reference = _logits(heads[j], kept[j], chunk, batch)
            for i in experts:
                if i != j:
                    logits = _logits(heads[j if own_head else i], kept[i], chunk, batch)
                    norms[i].append((logits - reference).norm(dim=-1).double().flatten())
        for i, parts in norms.items():
            sums[i] += float(torch.cat(parts).mean()) if parts else 0.0
    return sums


def _logits(
    head: DetachedHead, kept: Mapping[str, torch.Tensor], chunk: slice, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the head's logits, float32, for a chunk of what the trunk gave."""
    return head.logits(
        kept["hidden"][:, chunk], kept.get("pooled"), {key: value[:, chunk] for key, value in batch.items()}
    )
