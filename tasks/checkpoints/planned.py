"""Checkpoints to be written: which tensor will lie where in which file, and tensors written at their places."""

import json
import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.checkpoints.checkpoint import CODES, tensor_bytes
from sensmerge.tasks.checkpoints.stems import INDEXED, MODEL, SAFETENSORS, SHARDED


@dataclass(frozen=True)
class PlannedTensor:
    """Where one tensor of a checkpoint to be written will lie."""

    file: str
    offset: int
    """first byte in the file"""
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointPlan:
    """The files of a checkpoint to be written, byte for byte known but for the tensors' values."""

    tensors: Mapping[str, PlannedTensor]
    headers: Mapping[str, bytes]
    """first bytes of each file"""
    sizes: Mapping[str, int]
    """whole size of each file in bytes"""
    index: str | None
    """text of the index file, where there are several shards"""
    stem: str = MODEL
    """of the files' names"""

    def only(self, files: Collection[str]) -> "CheckpointPlan":
        """Return the plan of some of the files."""
        tensors = {name: one for name, one in self.tensors.items() if one.file in files}
        headers = {file: header for file, header in self.headers.items() if file in files}
        return CheckpointPlan(tensors, headers, {file: self.sizes[file] for file in headers}, None, self.stem)


def plan_checkpoint(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    shard_size: int,
    stem: str = MODEL,
    together: Sequence[Sequence[str]] = (),
) -> CheckpointPlan:
    """Lay tensors out in shards of at most `shard_size` bytes (a larger tensor has a shard of its own).

    File names, index and metadata are those that transformers writes and reads. Where those who read files of a stem
    know no index (`SHARDED`), all tensors are in one file.

    Args:
        tensors: dtype and shape of each, in their order in a file.
        shard_size: bytes of tensors.
        stem: of the files' names.
        together: where there are several shards, groups of tensors that none divides, unless they are larger.
    """
    sizes_of = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    shared = in_shards(sizes_of, shard_size, together) if stem in SHARDED else [list(tensors)]
    shards = [{name: tensors[name] for name in names} for names in shared]
    planned: dict[str, PlannedTensor] = {}
    headers, sizes = {}, {}
    for number, shard in enumerate(shards, 1):
        place = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{stem}{place}{SAFETENSORS}"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first keeps every tensor aligned to its own size, as the safetensors library does.
        for name, (dtype, shape) in sorted(shard.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = struct.pack("<Q", len(text)) + text
        sizes[file] = len(headers[file]) + end
        for name, (dtype, shape) in shard.items():
            planned[name] = PlannedTensor(file, len(headers[file]) + header[name]["data_offsets"][0], dtype, shape)
    index = None
    if len(shards) > 1:
        weight_map = {name: tensor.file for name, tensor in planned.items()}
        total = sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in planned.values())
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    return CheckpointPlan(planned, headers, sizes, index, stem)


def in_shards(sizes: Mapping[str, int], shard_size: int, together: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Share tensors of some bytes each out; see `plan_checkpoint`."""
    if sum(sizes.values()) <= shard_size:
        return [list(sizes)]
    shards: list[list[str]] = [[]]
    filled = 0
    for names in together or [[name] for name in sizes]:
        nbytes = sum(sizes[name] for name in names)
        if shards[-1] and filled + nbytes > shard_size:
            shards.append([])
            filled = 0
        if nbytes > shard_size and len(names) > 1:
            shards[-1:] = [*in_shards({name: sizes[name] for name in names}, shard_size), []]
            continue
        shards[-1] += names
        filled += nbytes
    return [names for names in shards if names]


def preallocate(plan: CheckpointPlan, folder: Path) -> None:
    """Create the planned files at their full size, headers written; files that are there already keep their tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, header in plan.headers.items():
        descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, header, 0)
            os.truncate(descriptor, plan.sizes[file])
        finally:
            os.close(descriptor)
    if plan.index is not None:
        (folder / f"{plan.stem}{INDEXED}").write_text(plan.index)


class CheckpointWriter:
    """Writes tensors, whole or in pieces, at their planned offsets in preallocated files."""

    def __init__(self, plan: CheckpointPlan, folder: Path) -> None:
        """Prepare to write below a folder; files are opened as they are needed."""
        self.plan = plan
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "CheckpointWriter":
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Write some elements of a tensor, from element `start` on; they must have the planned dtype."""
        planned = self.plan.tensors[name]
        assert values.dtype == planned.dtype, (name, values.dtype, planned.dtype)
        assert start + values.numel() <= math.prod(planned.shape), (name, start, values.shape, planned.shape)
        if planned.file not in self._descriptors:
            self._descriptors[planned.file] = os.open(self._folder / planned.file, os.O_WRONLY)
        data, offset = tensor_bytes(values), planned.offset + start * planned.dtype.itemsize
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptors[planned.file], data[written:], offset + written)

    def begin_flush(self, name: str) -> None:
        """Have the disk begin to write a tensor that is complete, where the system can be told so."""
        planned = self.plan.tensors[name]
        if hasattr(os, "posix_fadvise") and planned.file in self._descriptors:
            size = math.prod(planned.shape) * planned.dtype.itemsize
            # What is still to be written when it is called unneeded is written, and stays in the page cache meanwhile.
            os.posix_fadvise(self._descriptors[planned.file], planned.offset, size, os.POSIX_FADV_DONTNEED)
