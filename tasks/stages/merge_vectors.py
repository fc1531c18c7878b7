"""Stage merge for SE-Merging: the base, and beside it what each expert adds, instead of one set of weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from sensmerge.tasks.artifacts import sha256_file, write_json
from sensmerge.tasks.checkpoints.checkpoint import CheckpointWriter, open_checkpoint, preallocate, tensor_bytes
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.dynamic.vectors import BASE, VECTORS, LowRank, Vector, compact, save_vectors
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.arithmetic import (
    agreed_pieces,
    contribution_pieces,
    has_consensus,
    keeps_low_rank,
    shares,
    static_coefficient,
)
from sensmerge.tasks.stages.merge import (
    MergeJob,
    flush,
    mean_statistics,
    merge_weights,
    plan_merged,
    task_vector,
    tensor_digests,
    write_companions,
    write_heads,
)

VERSION = 4
FILES = "files.json"
"""sha256 of every other file, by its path in the folder."""

_LATER = {FILES, "manifest.json", "fingerprint.json"}
"""Files that come after the digests; they lie there when an interrupted try is repeated."""


def merge_group_vectors(job: MergeJob, group: int, out: Path) -> bool:
    """Write what each expert adds to each tensor of one group of layers, in compact form and the base's dtype.

    Everything the variant says is in it (sparsifying, consensus, coefficients by layer) but for a common factor, the
    static merge's coefficient c (`static_coefficient`): the static merge is base + c · Σ vectors, and a coefficient of
    1 adds an expert's whole (sparse) task vector. Normalised TIES has no such factor, since it divides each element by
    the weights that agree there: its c = λ / K leaves what one expert has alone K-fold.

    A group that an interrupted run finished is left as it is, and False returned. Holds one tensor at a time, of
    each expert and the base, in float32, and the group's compact vectors.

    Raises:
        InputError: a value that is NaN or Inf, naming the tensor.
    """
    target = out / VECTORS / f"group-{group:05d}.safetensors"
    if target.exists():
        return False
    torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
    weights = merge_weights(job, job.base)["weights"]
    mixed = [name for name in job.groups[group] if name not in job.base.statistics]
    found = {name: _vectors(job, weights[layer_of(name)], name) for name in mixed}
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}")
    save_vectors({name: vectors for name, vectors in found.items() if vectors}, partial)
    flush(partial)
    partial.replace(target)
    return True


def _vectors(job: MergeJob, weights: Mapping[str, float], name: str) -> dict[str, Vector]:
    """Return the vectors of one tensor by expert; experts that add nothing are left out."""
    touching = {key: expert for key, expert in job.experts.items() if expert.touches(name)}
    if not touching:
        return {}
    dtype, shape = job.base.dtype(name), job.base.info(name).shape
    base, common = job.base.read(name).view(-1), static_coefficient(job.settings, job.weight, len(job.experts))
    if has_consensus(job.settings):
        every = [task_vector(job, key, weights[key], name) for key in job.experts]
        parts = {key: torch.empty(len(base)) for key in job.experts}
        for where, agreed in agreed_pieces(base, every, job.settings):
            for part, piece in zip(parts.values(), agreed, strict=True):
                part[where] = piece / common
        compacted = {key: compact(_finite(parts[key].view(shape), dtype, key, name), dtype) for key in touching}
        return {key: vector for key, vector in compacted.items() if vector is not None}
    share = dict(zip(job.experts, shares([weights[key] for key in job.experts], job.settings), strict=True))
    vectors: dict[str, Vector | None] = {}
    for key, expert in touching.items():
        factor = share[key] / common
        factors = expert.factors(name) if keeps_low_rank(job.settings, job.densities[key]) else None
        if factors is not None:
            first, second, scaling = factors
            pair = (_finite(each, dtype, key, name).to(dtype) for each in (first, second * (scaling * factor)))
            vectors[key] = LowRank(*(each.contiguous() for each in pair))
        else:
            delta = torch.empty(len(base))
            for where, piece in contribution_pieces(
                base, task_vector(job, key, weights[key], name), factor, job.settings
            ):
                delta[where] = piece
            vectors[key] = compact(_finite(delta.view(shape), dtype, key, name), dtype)
    return {key: vector for key, vector in vectors.items() if vector is not None}


def _finite(values: torch.Tensor, dtype: torch.dtype, expert: str, name: str) -> torch.Tensor:
    if not bool(values.to(dtype).isfinite().all()):
        raise InputError(
            f"tensor {name}: what experts.{expert} adds has NaN or Inf as {dtype}; expected finite weights"
        )
    return values


def finish_vectors(job: MergeJob, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Complete the folder: the base as a checkpoint in `BASE`, per-task heads, and the digests of all files.

    Args:
        job: the variant.
        tokenizer: folder of the model whose tokenizer, chat template and generation config are copied.
        out: the folder; all groups have been written to it.

    Returns:
        `digest`: sha256 over the names and digests of the files; `bytes`: size of all weights, heads included.

    Raises:
        OSError: a tensor reads back otherwise than it was written.
    """
    (out / BASE).mkdir(exist_ok=True)
    _write_base(job, out / BASE)
    write_companions(job, tokenizer, out / BASE)
    write_heads(job, out)
    paths = sorted(path for path in out.rglob("*") if path.is_file() and str(path.relative_to(out)) not in _LATER)
    digests = {str(path.relative_to(out)): sha256_file(path) for path in paths}
    write_json(out / FILES, digests)
    size = sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")
    return {"digest": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(), "bytes": size}


def _write_base(job: MergeJob, out: Path) -> None:
    """Write the base as merged models have it: parameters that an expert unties apart, statistics as the mean."""
    plan = plan_merged(job.base, None, job.shard_size)
    preallocate(plan, out)
    written = {}
    with CheckpointWriter(plan, out) as writer:
        for name in plan.tensors:
            values = mean_statistics(job, name) if name in job.base.statistics else job.base.read(name).reshape(-1)
            writer.write(name, values)
            written[name] = xxhash.xxh3_128_hexdigest(tensor_bytes(values))
    for file in plan.sizes:
        flush(out / file)
    found = tensor_digests(open_checkpoint(out), xxhash.xxh3_128_hexdigest)
    altered = [name for name, checksum in written.items() if found[name] != checksum]
    if altered:
        raise OSError(
            f"{out}: {', '.join(altered)} read back differently from what was written; run again to write them again"
        )
