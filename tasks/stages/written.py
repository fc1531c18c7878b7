"""The checkpoint of a merged model, written group of tensors by group of tensors, each with a marker when it is done.

A marker is a JSON file: by tensor its `blake3`, and whatever else the stage needs to know.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from sensmerge.tasks.artifacts import canonical, read_json, sha256_text, sync
from sensmerge.tasks.checkpoints.checkpoint import DTYPES, Checkpoint, tensor_bytes
from sensmerge.tasks.checkpoints.header import read_header
from sensmerge.tasks.checkpoints.planned import (
    CheckpointPlan,
    CheckpointWriter,
    PlannedTensor,
    plan_checkpoint,
    preallocate,
)
from sensmerge.tasks.checkpoints.weights import GROUP_BYTES, BaseWeights, layer_groups
from sensmerge.tasks.methods.kernels.stored import rounded


def merged_groups(base: BaseWeights, shard_size: int) -> tuple[tuple[str, ...], ...]:
    """Return the base's weights in groups of whole layers; each is merged in one go, and none is in several shards."""
    return layer_groups(base, min(GROUP_BYTES, shard_size))


def plan_merged(base: BaseWeights, out_dtype: str | None, shard_size: int) -> CheckpointPlan:
    """Plan the files of a merged model from the base's headers; they are called as the base's are.

    Shards end where groups end, so that different machines may write them; the last has the buffers.
    """
    dtypes = {name: base.dtype(name) for name in (*base.weights, *base.buffers)}
    if out_dtype is not None:
        dtypes |= {name: getattr(torch, out_dtype) for name in base.weights}
    tensors = {name: (dtype, base.info(name).shape) for name, dtype in dtypes.items()}
    *groups, last = merged_groups(base, shard_size)
    return plan_checkpoint(tensors, shard_size, base.checkpoint.stem, [*groups, (*last, *base.buffers)])


def laid_out(base: BaseWeights, out_dtype: str | None, shard_size: int) -> dict[str, Any]:
    """Return the fields of a merge that say how its tensors are shared out.

    Returns:
        `shard_size`; `groups`: see `merged_groups`; `layout`: the name of the rule by which `plan_merged` shares
        tensors out among files, None if there is one file.
    """
    is_sharded = len(plan_merged(base, out_dtype, shard_size).sizes) > 1
    groups = merged_groups(base, shard_size)
    return {"shard_size": shard_size, "groups": groups, "layout": "groups" if is_sharded else None}


def marker(group: int | str) -> str:
    """Return the name of the file that says what became of the tensors of a group that is done."""
    return f".group-{group}.json"


def blake3_hex(content: memoryview) -> str:
    """Return the BLAKE3 of bytes in hex."""
    return blake3(content).hexdigest()


def write_tensor(
    writer: CheckpointWriter, name: str, pieces: Iterable[tuple[slice, Tensor]], dtype: torch.dtype
) -> tuple[str, bool]:
    """Write a tensor, and return the BLAKE3 of its bytes in hex and whether all numbers are finite.

    Args:
        writer: of the checkpoint.
        name: of the tensor.
        pieces: its elements, flat, in order.
        dtype: that it is rounded to.
    """
    digest, is_finite = blake3(), True
    for where, values in pieces:
        piece, piece_is_finite = rounded(values, dtype)
        is_finite = is_finite and piece_is_finite
        digest.update(tensor_bytes(piece))
        writer.write(name, piece, where.start)
    return digest.hexdigest(), is_finite


def verified(plan: CheckpointPlan, markers: Sequence[Path], out: Path) -> dict[str, dict[str, Any]]:
    """Return what the groups' markers say of every tensor, once all is on the disk as it was written.

    Raises:
        OSError: a tensor is not; then the marker of its group is gone.
    """
    preallocate(plan, out)  # headers and sizes as planned, whatever became of the files since
    for file in plan.sizes:
        sync(out / file)
    written = {marker: read_json(marker) for marker in markers}
    tensors = {name: entry for entries in written.values() for name, entry in entries.items()}
    assert set(tensors) == set(plan.tensors), "every tensor is in a group"
    headers = {name: info for file in plan.sizes for name, info in read_header(out / file).items()}
    found = tensor_digests(Checkpoint(out, headers))
    altered = [name for name, entry in tensors.items() if found[name] != entry.get("blake3")]
    if altered:
        for marker, entries in written.items():
            if not entries.keys().isdisjoint(altered):
                marker.unlink()
        raise OSError(
            f"{out}: {', '.join(altered)} read back differently from what was written; run again to merge them again"
        )
    return tensors


def about(plan: CheckpointPlan, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a manifest says of a checkpoint.

    Args:
        plan: of its files.
        tensors: from `verified`.

    Returns:
        `digest`: over dtype, shape and content of all tensors, however they are sharded; `tensors` and
        `tensor_bytes`: how many there are and their size; `by_tensor`: the files that `digest` is of.
    """
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in plan.tensors.items()}
    return {
        "digest": _digest(shapes, {name: entry["blake3"] for name, entry in tensors.items()}),
        "tensors": len(shapes),
        "tensor_bytes": sum(map(nbytes, plan.tensors.values())),
        "by_tensor": list(plan.sizes),
    }


def nbytes(tensor: PlannedTensor) -> int:
    """Return the size of a tensor."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def weights_digest(checkpoint: Checkpoint, like: str = "blake3:") -> str:
    """Return the digest over dtype, shape and content of all tensors, however they are sharded, as `about` has it.

    Args:
        checkpoint: whose tensors are all read.
        like: a digest that this one is compared with. Those of merges by earlier versions are made of the tensors'
            sha256, and have no `blake3:` in front.
    """
    shapes = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in checkpoint.tensors.items()}
    if like.startswith("blake3:"):
        return _digest(shapes, tensor_digests(checkpoint))
    earlier = tensor_digests(checkpoint, lambda content: hashlib.sha256(content).hexdigest())
    return _digest(shapes, earlier).removeprefix("blake3:")


def _digest(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], digests: Mapping[str, str]) -> str:
    content = {name: [str(dtype), shape, digests[name]] for name, (dtype, shape) in shapes.items()}
    return f"blake3:{sha256_text(canonical(content))}"


def tensor_digests(checkpoint: Checkpoint, digest: Callable[[memoryview], str] = blake3_hex) -> dict[str, str]:
    """Return a digest of every tensor's bytes, worked out for several at once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: digest(tensor_bytes(checkpoint.read(name))), checkpoint.tensors)
        return dict(zip(checkpoint.tensors, digests, strict=True))
