"""Stage merge: one variant of a recipe, group of layers by group of layers, into a Hugging Face checkpoint."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tasks.artifacts import read_json, sha256_file, write_json
from tasks.coefficients import (
    ExplicitCoefficients,
    SensCoefficients,
    UniformCoefficients,
    alpha,
    plain_weights,
    sens_weights,
    sigma,
    tau,
)
from tasks.errors import InputError
from tasks.methods import Settings, TaskVector, merge_tensor
from tasks.models.checkpoint import (
    CheckpointPlan,
    open_checkpoint,
    plan_checkpoint,
    preallocate,
    tensor_bytes,
    write_tensor,
)
from tasks.models.expert import Base, Expert, open_base, open_expert
from tasks.models.heads import HEAD_WEIGHTS, HEADS
from tasks.models.layers import group_by_layer, layer_of
from tasks.models.networks import has_tokenizer, load_tokenizer
from tasks.task_vectors import read_histogram

VERSION = 1
GROUP_BYTES = 64 * 2**20
"""Layers are merged in groups of about this size: enough groups to keep workers busy, few enough to schedule."""


@dataclass(frozen=True)
class MergeJob:
    """All that the merge of one variant reads and how; folders of models and artifacts."""

    base: Path
    experts: Mapping[str, Path]
    task_vectors: Mapping[str, Path]
    settings: Settings
    weight: float
    densities: Mapping[str, float]
    seed: int
    coefficients: UniformCoefficients | ExplicitCoefficients | SensCoefficients
    sensitivities: Mapping[str, Path]
    """artifacts of stage sensitivity (sens coefficients only)"""
    distances: Path | None
    """artifact of stage cross_task (sens coefficients only)"""
    out_dtype: str | None
    """torch name of the merged weights' dtype; None keeps that of each tensor of the base"""
    shard_size: int
    """bytes"""
    groups: tuple[tuple[str, ...], ...]
    """the base's weights in groups of whole layers; each is merged in one go"""


def layer_groups(base: Base, group_bytes: int = GROUP_BYTES) -> tuple[tuple[str, ...], ...]:
    """Split the base's weights into groups of whole layers of at least `group_bytes` (the last may be smaller)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for names in group_by_layer(base.weights).values():
        if filled >= group_bytes:
            groups.append([])
            filled = 0
        groups[-1] += names
        filled += sum(base.info(name).nbytes for name in names)
    return tuple(tuple(group) for group in groups)


def plan_merged(base: Base, out_dtype: str | None, shard_size: int) -> CheckpointPlan:
    """Plan the files of a merged model from the base's headers."""
    dtypes = {name: base.dtype(name) for name in (*base.weights, *base.buffers)}
    if out_dtype is not None:
        dtypes |= {name: getattr(torch, out_dtype) for name in base.weights}
    return plan_checkpoint({name: (dtype, base.info(name).shape) for name, dtype in dtypes.items()}, shard_size)


def merge_group(job: MergeJob, group: int, out: Path) -> None:
    """Merge one group of layers and write it at its place in the checkpoint under construction in `out`.

    A group that an earlier, interrupted run finished is left as it is. Holds one tensor at a time, of each expert and
    the base, in float32.

    Raises:
        InputError: a merged weight that is NaN or Inf, naming the tensor: it overflows `out_dtype`, or `linear` divides
            by weights that sum to 0.
    """
    done = out / f".group-{group}.json"
    if done.exists():
        return
    torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
    base = open_base(job.base)
    experts = {name: open_expert(folder, base, f"experts.{name}") for name, folder in job.experts.items()}
    plan = plan_merged(base, job.out_dtype, job.shard_size)
    weights = merge_weights(job, base)["weights"]
    preallocate(plan, out)
    digests = {}
    for name in (*job.groups[group], *(base.buffers if group == 0 else ())):
        dtype = plan.tensors[name].dtype
        merged = _merge_one(job, base, experts, weights.get(layer_of(name), {}), name).to(dtype)
        if not bool(merged.isfinite().all()):
            raise InputError(
                f"tensor {name} merged by {job.settings.method} has NaN or Inf as {dtype}; expected finite weights: "
                "set another out_dtype, or weights that linear can divide by (they sum to 0)"
            )
        write_tensor(plan, out, name, merged)
        digests[name] = _digest(merged)
    for file in {plan.tensors[name].file for name in digests}:
        flush(out / file)
    write_json(done, digests)


def _merge_one(
    job: MergeJob, base: Base, experts: Mapping[str, Expert], weights: Mapping[str, float], name: str
) -> torch.Tensor:
    touched = any(expert.touches(name) for expert in experts.values())
    if not base.info(name).is_floating_point or not (touched or job.settings.method == "linear"):
        return base.read(name)
    vectors = [task_vector(job, expert, key, weights[key], name) for key, expert in experts.items()]
    return merge_tensor(base.read(name).float(), vectors, job.settings)


def task_vector(job: MergeJob, expert: Expert, key: str, weight: float, name: str) -> TaskVector:
    """Return the task vector of one tensor of the expert called `key`, with all that its method asks for."""
    return TaskVector(
        delta=expert.delta(name),
        weight=weight,
        density=job.densities[key],
        mask_key=f"{job.seed}/{key}/{name}",
        histogram=read_histogram(job.task_vectors[key], name) if job.settings.method == "ties" else None,
    )


def merge_weights(job: MergeJob, base: Base) -> dict[str, Any]:
    """Return the weights of every layer, and for sens coefficients also the τ and σ that they come from."""
    layers = list(group_by_layer(base.weights))
    if not isinstance(job.coefficients, SensCoefficients):
        return {"weights": plain_weights(job.coefficients, job.weight, layers, job.experts)}
    assert job.distances is not None
    alphas = {
        name: alpha(read_json(path / "sensitivity.json")["sensitivity"]) for name, path in job.sensitivities.items()
    }
    taus = tau(read_json(job.distances / "distances.json"), job.coefficients.direction)
    sigmas = sigma(alphas, taus, job.coefficients.temperature, layers)
    return {"weights": sens_weights(sigmas, job.weight), "tau": taus, "sigma": sigmas}


def finish_merge(job: MergeJob, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Verify what the groups wrote, and make the folder a Hugging Face model: config, tokenizer, per-task heads.

    Args:
        job: the variant.
        tokenizer: folder of the model whose tokenizer, chat template and generation config the merged model gets.
        out: the folder; all groups have been written to it.

    Returns:
        `digest`: sha256 over the names and digests of the weight files; `files`: those digests.

    Raises:
        OSError: a tensor on disk is not what a group wrote; its group is merged anew when the step runs again.
    """
    base = open_base(job.base)
    plan = plan_merged(base, job.out_dtype, job.shard_size)
    preallocate(plan, out)  # headers and sizes as planned, whatever became of the files since
    markers = [out / f".group-{group}.json" for group in range(len(job.groups))]
    digests = {marker: read_json(marker) for marker in markers}
    assert set().union(*digests.values()) == set(plan.tensors), "every tensor is in a group"
    written = open_checkpoint(out)
    altered = {
        name: marker
        for marker, tensors in digests.items()
        for name, digest in tensors.items()
        if _digest(written.read(name)) != digest
    }
    if altered:
        for marker in set(altered.values()):
            marker.unlink()
        raise OSError(f"{out}: {', '.join(altered)} read back otherwise than written; run again to merge them anew")
    write_companions(job, base, tokenizer, out)
    files = {file: sha256_file(out / file) for file in sorted(plan.sizes)}
    for marker in markers:
        marker.unlink()
    return {"digest": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(), "files": files}


def write_companions(job: MergeJob, base: Base, tokenizer: Path, out: Path) -> None:
    """Write what lies beside the weights: config, tokenizer, generation config, per-task heads, `coefficients.json`.

    Args:
        job: the variant.
        base: the base, opened.
        tokenizer: folder of the model whose tokenizer, chat template and generation config the merged model gets.
        out: the merged model's folder.
    """
    config = read_json(job.base / "config.json")
    if job.out_dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = job.out_dtype
    write_json(out / "config.json", config)
    folders = (job.base, tokenizer, *job.experts.values())
    source = next((folder for folder in folders if (folder / "generation_config.json").is_file()), None)
    if source is not None:
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    if has_tokenizer(tokenizer):
        loaded = load_tokenizer(tokenizer)
        if not loaded.chat_template:
            owners = [load_tokenizer(folder) for folder in job.experts.values() if has_tokenizer(folder)]
            loaded.chat_template = next((owner.chat_template for owner in owners if owner.chat_template), None)
        loaded.save_pretrained(out)
    for name, folder in job.experts.items():
        _write_head(open_expert(folder, base, f"experts.{name}"), out / HEADS / name)
    write_json(out / "coefficients.json", merge_weights(job, base))


def _write_head(expert: Expert, folder: Path) -> None:
    """Keep an expert's own head beside the merged trunk: its tensors, and the config of the network that ends in it."""
    if not expert.head:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in expert.head_tensors().items()}
    save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
    expert.config.save_pretrained(folder)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def flush(path: Path) -> None:
    """Have a file's bytes written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
