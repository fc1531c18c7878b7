"""Stage cross_task: how far the experts' logits lie apart on each other's calibration sets, pair by pair."""

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tasks.artifacts import read_json, write_json
from tasks.datasets import ClassificationTask, Row, RowSet, calibration_batch
from tasks.errors import InputError
from tasks.models.blocks import to_device
from tasks.models.heads import DetachedHead
from tasks.models.networks import Head, load_tokenizer
from tasks.models.placement import Placement
from tasks.models.runners import open_runner
from tasks.models.source import Source

VERSION = 1
PAIRS = "pairs.json"
CHUNK_TOKENS = 256
"""Logits exist for this many tokens of one sample at a time."""

Pairs = Mapping[str, Mapping[str, str]]
"""pairs[i][j]: fingerprint of all that the distance g[i][j] depends on, for i ≠ j"""
Distances = dict[str, dict[str, float]]


def cross_task(
    base: Path,
    experts: Mapping[str, Path],
    calibration: Mapping[str, RowSet],
    tokenizer: Path,
    dtype: str,
    device: str,
    placement: Placement,
    pairs: Pairs,
    known: Mapping[str, float],
    out: Path,
) -> dict[str, Any]:
    """Measure g[i][j] = mean over samples of D_j of the mean over tokens of ‖logits_i − logits_j‖₂ (DESIGN §5).

    Every expert's trunk runs once over every calibration set (K² passes); what it hands to its head is kept on disk.
    Distances that are known are taken over, and passes that only they need are left out: after a change of one expert
    3K − 2 are made.
    Then the heads run over that, side by side, `CHUNK_TOKENS` tokens at a time. On a classification task every trunk is
    followed by the head of the task's own expert, whole samples at a time.

    Memory of this process: one network, or what its placement takes of it (see `StreamedRunner`), and later K heads
    with two chunks of logits: K · vocabulary · width + 2 · CHUNK_TOKENS · vocabulary numbers, whatever the samples are.

    Args:
        base: folder of the base.
        experts: folder of each expert.
        calibration: the calibration set of each expert.
        tokenizer: folder of the tokenizer that all models share.
        dtype: torch name of the networks' dtype.
        device: torch device.
        placement: where the networks run; it changes no number.
        pairs: a fingerprint of every distance.
        known: distances of earlier artifacts by fingerprint, from `known_distances`.
        out: folder for `distances.json` and `pairs.json` (the fingerprints).

    Returns:
        The largest and smallest distance (`distances.json` in `out` has them all), and how many were measured.

    Raises:
        InputError: logits that are not finite.
    """
    sources = {
        name: Source(base, folder, f"experts.{name}", _ending(calibration[name]), getattr(torch, dtype), device)
        for name, folder in experts.items()
    }
    reader = load_tokenizer(tokenizer)
    batches: dict[str, list[dict[str, torch.Tensor]]] = {
        name: [
            _inputs(one, row, reader, f"row {i} of tasks.{name}.calibration", sources[name])
            for i, row in enumerate(one.rows)
        ]
        for name, one in calibration.items()
    }
    names = list(sources)
    distances: Distances = {i: {j: 0.0 if i == j else known.get(pairs[i][j], math.nan) for j in names} for i in names}
    wanted = {j: [i for i in names if i != j and pairs[i][j] not in known] for j in names}
    heads: dict[str, DetachedHead] = {}
    with tempfile.TemporaryDirectory(dir=out) as scratch, torch.no_grad():
        for i, source in sources.items():
            looked_at = [j for j in names if i in wanted[j] or (i == j and wanted[j])]
            samples = [(j, number) for j in looked_at for number in range(len(batches[j]))]
            if not samples:
                continue
            with open_runner(source, placement, out) as runner:
                for place, output in runner.trunk_outputs([batches[j][number] for j, number in samples]):
                    kept = {key: tensor.cpu().contiguous() for key, tensor in output.items()}
                    save_file(kept, _kept(scratch, i, *samples[place]))
                heads[i] = runner.head()
        for j in names:
            own_head = isinstance(calibration[j].task, ClassificationTask)
            sums = _compare(j, {i: heads[i] for i in wanted[j]}, heads.get(j), own_head, batches[j], scratch)
            for i in wanted[j]:
                distances[i][j] = sums[i] / len(batches[j])
                if not math.isfinite(distances[i][j]):
                    raise InputError(
                        f"tasks.{j}.calibration: the distance of experts.{i} from experts.{j} is {distances[i][j]}; "
                        "expected a finite number (try dtype: float32)"
                    )
    write_json(out / "distances.json", distances)
    write_json(out / PAIRS, pairs)
    apart = [g for i, row in distances.items() for j, g in row.items() if i != j]
    return {"min": min(apart), "max": max(apart), "measured": sum(map(len, wanted.values()))}


def known_distances(artifacts: Iterable[Path]) -> dict[str, float]:
    """Return all distances of artifacts of this stage by their fingerprint."""
    found: dict[str, float] = {}
    for folder in artifacts:
        if (folder / PAIRS).is_file():
            pairs, distances = read_json(folder / PAIRS), read_json(folder / "distances.json")
            found |= {print_: distances[i][j] for i, row in pairs.items() for j, print_ in row.items()}
    return found


def _ending(one: RowSet) -> Head:
    return "classification" if isinstance(one.task, ClassificationTask) else "causal_lm"


def _inputs(one: RowSet, row: Row, tokenizer: Any, where: str, source: Source) -> dict[str, torch.Tensor]:
    batch = calibration_batch(one.task, row, tokenizer, where, source.expert.config.label2id)
    return {key: value for key, value in batch.items() if key != "labels"}


def _kept(scratch: str, i: str, j: str, number: int) -> Path:
    return Path(scratch) / f"{i}-on-{j}-{number}.safetensors"


def _compare(
    j: str,
    heads: Mapping[str, DetachedHead],
    reference_head: DetachedHead | None,
    own_head: bool,
    batches: list[dict[str, torch.Tensor]],
    scratch: str,
) -> dict[str, float]:
    """Return, for each expert i of `heads`, the sum over D_j of the mean over tokens of ‖logits_i − logits_j‖₂."""
    sums = dict.fromkeys(heads, 0.0)
    if reference_head is None or not heads:
        return sums
    device = str(reference_head.network.device)
    for number, batch in enumerate(batches):
        batch = to_device(batch, device)
        kept = {i: load_file(_kept(scratch, i, j, number), device=device) for i in (j, *heads)}
        length = kept[j]["hidden"].shape[1]
        step = length if own_head else CHUNK_TOKENS
        norms: dict[str, list[torch.Tensor]] = {i: [] for i in heads}
        for start in range(0, length, step):
            chunk = slice(start, start + step)
            reference = _logits(reference_head, kept[j], chunk, batch)
            for i, head in heads.items():
                logits = _logits(reference_head if own_head else head, kept[i], chunk, batch)
                norms[i].append((logits - reference).norm(dim=-1).double().flatten())
        for i, parts in norms.items():
            sums[i] += float(torch.cat(parts).mean())
    return sums


def _logits(
    head: DetachedHead, kept: Mapping[str, torch.Tensor], chunk: slice, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the head's logits, float32, for a chunk of what the trunk gave."""
    return head.logits(
        kept["hidden"][:, chunk], kept.get("pooled"), {key: value[:, chunk] for key, value in batch.items()}
    )
