"""Stage merge: one variant of a recipe, group of layers by group of layers, into a Hugging Face checkpoint."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from sensmerge.tasks.artifacts import canonical, read_json, sha256_text, write_json
from sensmerge.tasks.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    CheckpointPlan,
    CheckpointWriter,
    open_checkpoint,
    plan_checkpoint,
    preallocate,
    tensor_bytes,
)
from sensmerge.tasks.checkpoints.companions import (
    CONFIG,
    GENERATION_CONFIG,
    companions,
    copy_companions,
    is_tokenizer_file,
    without_code,
)
from sensmerge.tasks.checkpoints.layers import group_by_layer, layer_of
from sensmerge.tasks.checkpoints.weights import HEAD_WEIGHTS, HEADS, BaseWeights, ExpertWeights
from sensmerge.tasks.coefficients import (
    ExplicitCoefficients,
    SensCoefficients,
    UniformCoefficients,
    alpha,
    plain_weights,
    sens_weights,
    sigma,
    tau,
)
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.methods.arithmetic import Settings, TaskVector, merged_pieces
from sensmerge.tasks.methods.delta import chunks
from sensmerge.tasks.methods.stored import rounded
from sensmerge.tasks.stages.task_vectors import TABLE, read_histogram

VERSION = 6
MEAN = Settings("task_arithmetic", normalize=False, rescale=False, lambda_=1.0)
"""How statistics (`BaseWeights.statistics`) are merged, with weights 1 / experts."""
TENSORS = "tensors.json"
"""What every weight was made of (`inputs`) and what came out (`checksum`), for a later merge to take it over."""


@dataclass(frozen=True)
class MergeJob:
    """All that the merge of one variant reads and how."""

    base: BaseWeights
    experts: Mapping[str, ExpertWeights]
    head_configs: Mapping[str, str]
    """by expert that has a head of its own, the config (JSON) of the network that ends in it"""
    task_vectors: Mapping[str, Path]
    """artifacts of stage task_vectors"""
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
    token_ids: Mapping[str, int | list[int]] = field(default_factory=dict)
    """special tokens for which the merged model's config differs from the base's"""
    classes: Sequence[str] = ()
    """names of the merged head's classes, where the base's config has none"""
    previous: Path | None = None
    """an earlier merge of the variant: tensors whose inputs are the same are taken over from it, bit for bit"""


def plan_merged(base: BaseWeights, out_dtype: str | None, shard_size: int) -> CheckpointPlan:
    """Plan the files of a merged model from the base's headers."""
    dtypes = {name: base.dtype(name) for name in (*base.weights, *base.buffers)}
    if out_dtype is not None:
        dtypes |= {name: getattr(torch, out_dtype) for name in base.weights}
    return plan_checkpoint({name: (dtype, base.info(name).shape) for name, dtype in dtypes.items()}, shard_size)


def merge_group(job: MergeJob, group: int, out: Path) -> bool:
    """Merge one group of layers and write it at its place in the checkpoint under construction in `out`.

    A group that an earlier, interrupted run finished is left as it is, and False returned.
    Memory: that of `merged_pieces`, for one tensor at a time.

    Raises:
        InputError: a merged weight that is NaN or Inf, naming the tensor: it overflows `out_dtype`, or `linear` divides
            by weights that sum to 0.
    """
    done = out / f".group-{group}.json"
    if done.exists():
        return False
    torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
    base = job.base
    plan = plan_merged(base, job.out_dtype, job.shard_size)
    weights = merge_weights(job, base)["weights"]
    preallocate(plan, out)
    previous = _Previous.of(job)
    contents = [read_json(folder / TABLE) for folder in job.task_vectors.values()]
    tensors = {}
    with CheckpointWriter(plan, out) as writer:
        for name in (*job.groups[group], *(base.buffers if group == 0 else ())):
            dtype = plan.tensors[name].dtype
            # Statistics: any other weights may leave what no network can use, such as a negative variance.
            is_mean = name in base.statistics
            own = dict.fromkeys(job.experts, 1 / len(job.experts)) if is_mean else weights.get(layer_of(name), {})
            inputs = _inputs(job, own, name, dtype, [table[name]["content"] for table in contents if name in table])
            with noted(f"tensor {name} of layer {layer_of(name)}"):
                digests = previous.take(name, inputs, writer) if previous else None
                taken = digests is not None
                if digests is None:
                    digests = _merge_tensor(job, own, name, dtype, writer)
            writer.begin_flush(name)
            tensors[name] = {"inputs": inputs, **digests, "taken": taken}
    write_json(done, tensors)
    return True


def _merge_tensor(
    job: MergeJob, weights: Mapping[str, float], name: str, dtype: torch.dtype, writer: CheckpointWriter
) -> dict[str, str]:
    """Merge one tensor, write it and return its digests: `checksum` (fast, to read it back by) and `sha256`."""
    checksum, sha256, finite = xxhash.xxh3_128(), hashlib.sha256(), True
    for where, merged in _merged_pieces(job, weights, name):
        piece, piece_is_finite = rounded(merged, dtype)
        finite = finite and piece_is_finite
        content = tensor_bytes(piece)
        checksum.update(content)
        sha256.update(content)
        writer.write(name, piece, where.start)
    if not finite:
        raise InputError(
            f"tensor {name} merged by {job.settings.method} has NaN or Inf as {dtype}; expected finite "
            "weights: set another out_dtype, or weights that linear can divide by (they sum to 0)"
        )
    return {"checksum": checksum.hexdigest(), "sha256": sha256.hexdigest()}


def _inputs(
    job: MergeJob, weights: Mapping[str, float], name: str, dtype: torch.dtype, contents: Sequence[str]
) -> str | None:
    """Return the fingerprint of all that a merged weight depends on; None for a buffer, which is only copied."""
    if not contents:
        return None
    experts = [
        [key, weights[key], job.densities[key], content] for key, content in zip(job.experts, contents, strict=True)
    ]
    return sha256_text(canonical([VERSION, vars(job.settings), job.seed, name, str(dtype), experts]))


@dataclass(frozen=True)
class _Previous:
    """An earlier merge of the same variant."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Mapping[str, Any]]
    """its `TENSORS`"""

    @classmethod
    def of(cls, job: MergeJob) -> "_Previous | None":
        if job.previous is None or not (job.previous / TENSORS).is_file():
            return None
        try:
            return cls(open_checkpoint(job.previous), read_json(job.previous / TENSORS))
        except InputError:  # its weights are gone or cut since it was made: all is merged anew
            return None

    def take(self, name: str, inputs: str | None, writer: CheckpointWriter) -> dict[str, str] | None:
        """Write a tensor as the earlier merge has it and return its digests; None if it is another, or damaged."""
        known = self.tensors.get(name)
        if inputs is None or known is None or known["inputs"] != inputs:
            return None
        values = self.checkpoint.read(name).reshape(-1)
        content = tensor_bytes(values)
        if xxhash.xxh3_128_hexdigest(content) != known["checksum"]:
            return None
        writer.write(name, values)
        return {"checksum": known["checksum"], "sha256": hashlib.sha256(content).hexdigest()}


def _merged_pieces(job: MergeJob, weights: Mapping[str, float], name: str) -> Iterator[tuple[slice, Tensor]]:
    base = job.base.read(name).reshape(-1)
    touched = any(expert.touches(name) for expert in job.experts.values())
    if name in job.base.statistics:
        deltas = [TaskVector(expert.task_vector(name), weights[key]) for key, expert in job.experts.items()]
        return merged_pieces(base, deltas, MEAN)
    if not job.base.info(name).is_floating_point or not (touched or job.settings.method == "linear"):
        return ((where, base[where]) for where in chunks(len(base)))
    vectors = [task_vector(job, key, weights[key], name) for key in job.experts]
    return merged_pieces(base, vectors, job.settings)


def mean_statistics(job: MergeJob, name: str) -> Tensor:
    """Return the experts' mean of a buffer with statistics, flat, in the base's dtype."""
    share = dict.fromkeys(job.experts, 1 / len(job.experts))
    dtype = job.base.dtype(name)
    return torch.cat([rounded(piece, dtype)[0].clone() for _, piece in _merged_pieces(job, share, name)])


def task_vector(job: MergeJob, key: str, weight: float, name: str) -> TaskVector:
    """Return the task vector of one tensor of the expert called `key`, with all that its method asks for."""
    return TaskVector(
        delta=job.experts[key].task_vector(name),
        weight=weight,
        density=job.densities[key],
        mask_key=f"{job.seed}/{key}/{name}",
        histogram=read_histogram(job.task_vectors[key], name) if job.settings.method == "ties" else None,
    )


def merge_weights(job: MergeJob, base: BaseWeights) -> dict[str, Any]:
    """Return the weights of every layer, and for sens coefficients also the τ and σ that they come from."""
    layers = list(group_by_layer(name for name in base.weights if name not in base.statistics))
    if not isinstance(job.coefficients, SensCoefficients):
        return {"weights": plain_weights(job.coefficients, job.weight, layers, job.experts)}
    assert job.distances is not None
    alphas = {
        name: _with_tied_layers(alpha(read_json(path / "sensitivity.json")["sensitivity"]), base)
        for name, path in job.sensitivities.items()
    }
    taus = tau(read_json(job.distances / "distances.json"), job.coefficients.direction)
    sigmas = sigma(alphas, taus, job.coefficients.temperature, layers)
    return {"weights": sens_weights(sigmas, job.weight), "tau": taus, "sigma": sigmas}


def _with_tied_layers(values: Mapping[str, float], base: BaseWeights) -> dict[str, float]:
    """Return values by layer where an expert's embedding that is its head too stands for both layers."""
    tied = {layer_of(name): layer_of(stored) for name, stored in base.stored.items() if stored in base.weights}
    return {**{layer: values[one] for layer, one in tied.items() if one in values}, **values}


def finish_merge(job: MergeJob, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Verify what the groups wrote, and make the folder a Hugging Face model: config, tokenizer, per-task heads.

    Args:
        job: the variant.
        tokenizer: folder of the model whose tokenizer, chat template and generation config the merged model gets.
        out: the folder; all groups have been written to it.

    Returns:
        `digest`: sha256 over dtype, shape and content of all tensors, however they are sharded; `tensors` and
        `tensor_bytes`: how many there are and their size; `taken_over` and `taken_over_bytes`: those of them that an
        earlier merge had; `by_tensor`: the files that `digest` is of.

    Raises:
        OSError: a tensor on disk is not what a group wrote; its group is merged anew when the step runs again.
    """
    plan = plan_merged(job.base, job.out_dtype, job.shard_size)
    preallocate(plan, out)  # headers and sizes as planned, whatever became of the files since
    for file in plan.sizes:
        flush(out / file)
    markers = [out / f".group-{group}.json" for group in range(len(job.groups))]
    written = {marker: read_json(marker) for marker in markers}
    tensors = {name: entry for entries in written.values() for name, entry in entries.items()}
    assert set(tensors) == set(plan.tensors), "every tensor is in a group"
    found = tensor_digests(open_checkpoint(out), xxhash.xxh3_128_hexdigest)
    altered = [name for name, entry in tensors.items() if found[name] != entry["checksum"]]
    if altered:
        for marker, entries in written.items():
            if not entries.keys().isdisjoint(altered):
                marker.unlink()
        raise OSError(
            f"{out}: {', '.join(altered)} read back differently from what was written; run again to merge them again"
        )
    write_companions(job, tokenizer, out)
    write_heads(job, out)
    weights = {name: entry for name, entry in tensors.items() if entry["inputs"] is not None}
    write_json(
        out / TENSORS, {name: {key: entry[key] for key in ("inputs", "checksum")} for name, entry in weights.items()}
    )
    for marker in markers:
        marker.unlink()
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in plan.tensors.items()}
    digest = _digest(shapes, {name: entry["sha256"] for name, entry in tensors.items()})
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in shapes.items()}
    taken = [sizes[name] for name, entry in tensors.items() if entry["taken"]]
    return {
        "digest": digest,
        "tensors": len(sizes),
        "tensor_bytes": sum(sizes.values()),
        "taken_over": len(taken),
        "taken_over_bytes": sum(taken),
        "by_tensor": list(plan.sizes),
    }


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return the sha256 over dtype, shape and content of all tensors, however they are sharded, as `finish_merge`."""
    shapes = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return _digest(shapes, tensor_digests(checkpoint, lambda content: hashlib.sha256(content).hexdigest()))


def _digest(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], digests: Mapping[str, str]) -> str:
    return sha256_text(canonical({name: [str(dtype), shape, digests[name]] for name, (dtype, shape) in shapes.items()}))


def tensor_digests(checkpoint: Checkpoint, digest: Callable[[memoryview], str]) -> dict[str, str]:
    """Return a digest of every tensor's bytes, worked out for several at once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: digest(tensor_bytes(checkpoint.read(name))), checkpoint.tensors)
        return dict(zip(checkpoint.tensors, digests, strict=True))


def write_companions(job: MergeJob, tokenizer: Path, out: Path) -> None:
    """Write what makes a folder of weights a Hugging Face model: its config, and all that lies beside the weights.

    Tokenizer, chat templates and generation config are those of the folder `tokenizer`; the rest is the base's. What
    names code is left out, for merged models have none beside them.

    Args:
        job: the variant.
        tokenizer: folder of the model whose tokenizer, chat template and generation config the merged model gets.
        out: the folder of the weights.
    """
    config = without_code(read_json(job.base.folder / CONFIG))
    parts = [one for one in (config, config.get("text_config")) if one is not None]
    if job.base.untied:
        for part in parts:
            part["tie_word_embeddings"] = False
    if job.classes:
        config["id2label"] = {str(number): name for number, name in enumerate(job.classes)}
        config["label2id"] = {name: number for number, name in enumerate(job.classes)}
    for key, value in job.token_ids.items():
        for part in [one for one in parts if key in one] or [config]:
            part[key] = value
    if job.out_dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = job.out_dtype
    write_json(out / CONFIG, config)

    def of_tokenizer(name: str) -> bool:
        return is_tokenizer_file(name) or name == GENERATION_CONFIG

    files = {name: path for name, path in companions(job.base.folder).items() if not of_tokenizer(name)}
    files |= {name: path for name, path in companions(tokenizer).items() if of_tokenizer(name)}
    copy_companions(files, out)


def write_heads(job: MergeJob, out: Path) -> None:
    """Write the heads that belong to one expert each, and `coefficients.json`, into the merged model's folder."""
    for name, head_config in job.head_configs.items():
        folder = out / HEADS / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in job.experts[name].head_tensors().items()}
        save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(head_config)
    write_json(out / "coefficients.json", merge_weights(job, job.base))


def flush(path: Path) -> None:
    """Have a file's bytes written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
