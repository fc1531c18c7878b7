"""Stage merge: one variant of a recipe, group of layers by group of layers, into a Hugging Face checkpoint."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sensmerge.tasks.artifacts import canonical, load_object, sha256_text, write_json
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, open_checkpoint, tensor_bytes
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.checkpoints.planned import CheckpointPlan, CheckpointWriter, preallocate
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.stems import INDEXED
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights, by_file
from sensmerge.tasks.coefficients import row_of
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.identity import Local, identity
from sensmerge.tasks.methods.kernels.delta import chunks
from sensmerge.tasks.methods.remarks import remarks
from sensmerge.tasks.stages.job import Earlier
from sensmerge.tasks.stages.staging import Staging, one_ahead
from sensmerge.tasks.stages.variant import UNCHANGED, VariantJob
from sensmerge.tasks.stages.written import about, blake3_hex, marker, nbytes, plan_merged, verified, write_tensor

TENSORS = "tensors.json"
"""What every weight was made of (`inputs`), what came out (`checksum`) and what the method said of it (`remarks`), for
a later merge to take it over."""
REMARKS = "remarks"
CHANGING = "changing"
"""Of a tensor of a group: the experts that change it, and none before it in the group."""


@dataclass(frozen=True, kw_only=True)
class MergeJob(VariantJob):
    """Merges one variant into a checkpoint."""

    version = 7

    out_dtype: str | None
    """torch name of the merged weights' dtype; None keeps that of each tensor of the base"""
    previous: Local[Path | None] = None
    """an earlier merge of the variant: tensors whose inputs are the same are taken over from it, bit for bit"""
    device: Local[str] = "cpu"
    """torch device, one that the method gives the same bits on; tensors go to any other than `cpu` ahead of time"""

    def resumed(self, earlier: Earlier) -> Self:
        """See `Job`. Each tensor's checksum is compared as it is taken over, so the artifact is not read before."""
        return replace(super().resumed(earlier), previous=earlier.newest())

    def _tensors_of(self, part: int) -> tuple[str, ...]:
        """Return what a piece writes."""
        return (*self.groups[part], *(self.base.buffers if part == len(self.groups) - 1 else ()))

    def _plan(self) -> CheckpointPlan:
        return plan_merged(self.base, self.out_dtype, self.shard_size)

    def _files_of(self, *parts: int) -> set[str]:
        """Return the files that some pieces write to."""
        planned = self._plan().tensors
        return {planned[name].file for part in parts for name in self._tensors_of(part)}

    def bundles(self) -> list[list[int]]:
        """See `Job`: shards end where groups do."""
        found: list[tuple[list[int], set[str]]] = []
        for part in self.parts():
            files = self._files_of(part)
            if not found or found[-1][1].isdisjoint(files):
                found.append(([], set()))
            found[-1][0].append(part)
            found[-1][1].update(files)
        return [parts for parts, _ in found]

    def reads(self, part: int | str | None) -> Tensors | None:
        """See `Job`: a piece reads the tensors of its layers, and `finish` the heads."""
        if part is None:
            return by_file((one.source, name) for one in self.experts.values() for name in one.head.values())
        assert isinstance(part, int)
        models: list[BaseWeights | ExpertWeights] = [self.base, *self.experts.values()]
        return by_file(stored for name in self._tensors_of(part) for one in models for stored in one.stored_for(name))

    def run(self, part: int | str, out: Path) -> bool:
        """Merge one group of layers and write it at its place in the checkpoint under construction in `out`.

        A group that an earlier, interrupted run finished is left as it is, and False returned.
        Memory: that of the method, for one tensor at a time; on a GPU, base and experts of the next one too.

        Raises:
            InputError: a weight of base or experts that is NaN or Inf, naming the tensor; or a merged one: it overflows
                `out_dtype`, or the method divides by weights that sum to 0.
        """
        assert isinstance(part, int)
        done = out / marker(part)
        if done.exists():
            return False
        torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
        base = self.base
        plan = self._plan().only(self._files_of(part))
        weights = self.weights()
        preallocate(plan, out)
        previous = _Previous.of(self)
        staging = None if self.device == "cpu" else Staging(self.device)
        copied = {*base.buffers, *base.statistics}  # or the experts' mean, whatever their weights
        names, unchanged = self._tensors_of(part), set(self.experts)
        own = {name: {} if name in copied else row_of(weights, name, layer_of(name)) for name in names}

        def load(name: str) -> _Loaded:
            with _noted(name):
                inputs = None if name in base.buffers else _inputs(self, own[name], name, plan.tensors[name].dtype)
                taken = previous.take(name, inputs) if previous else None
                return taken or _Loaded(inputs, _merged_pieces(self, own[name], name, staging))

        tensors: dict[str, dict[str, Any]] = {}
        with CheckpointWriter(plan, out) as writer:
            for name, one in one_ahead(load, names) if staging else ((name, load(name)) for name in names):
                with _noted(name):
                    found = _write_tensor(self, own[name], name, one, writer)
                writer.begin_flush(name)
                changing = self._changing(name, unchanged)
                unchanged -= {*changing}
                tensors[name] = {"inputs": one.inputs, **found, "taken": one.known is not None, CHANGING: changing}
                del one  # what of it is on a GPU goes before more is loaded
        if staging:
            staging.release()
        write_json(done, tensors)
        return True

    def _changing(self, name: str, among: Collection[str]) -> list[str]:
        """Return those of some experts that change a tensor; buffers are the base's, whatever experts have."""
        return [key for key in sorted(among) if name not in self.base.buffers and self.experts[key].changes(name)]

    def finish(self, out: Path) -> dict[str, Any]:
        """Verify what the groups wrote, and make the folder a Hugging Face model: config, tokenizer, per-task heads.

        Returns:
            `digest`: over dtype, shape and content of all tensors, however they are sharded; `tensors` and
            `tensor_bytes`: how many there are and their size; `taken_over` and `taken_over_bytes`: those of them that
            an earlier merge had; `by_tensor`: the files that `digest` is of; `remarks`: what the method said, and of
            which tensors; `unchanged`: experts that change nothing.

        Raises:
            InputError: NaN or Inf in a head.
            OSError: a tensor on disk is not what a group wrote; its group is merged again when the step runs again.
        """
        plan = self._plan()
        markers = [out / marker(part) for part in self.parts()]
        found = self._completed(plan, verified(plan, markers, out), out)
        for one in markers:
            one.unlink()
        return found

    def pack(self, bundle: Sequence[int | str], out: Path) -> tuple[list[str], dict[str, Any]]:
        """See `Job`.

        Raises:
            OSError: as `finish`.
        """
        plan = self._plan().only(self._files_of(*(part for part in bundle if isinstance(part, int))))
        return list(plan.sizes), verified(plan, [out / marker(part) for part in bundle], out)

    def unite(self, packed: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
        """See `Job` and `finish`."""
        plan = self._plan()
        if plan.index is not None:
            (out / f"{plan.stem}{INDEXED}").write_text(plan.index)
        return self._completed(plan, {name: entry for one in packed for name, entry in one.items()}, out)

    def _completed(self, plan: CheckpointPlan, tensors: Mapping[str, Mapping[str, Any]], out: Path) -> dict[str, Any]:
        """Write all that lies beside the weights; returns what `finish` does."""
        self.write_companions(out, self.out_dtype)
        self.write_heads(out)
        weights = {name: entry for name, entry in tensors.items() if entry["inputs"] is not None}
        kept = {name: {key: entry[key] for key in ("inputs", "blake3", REMARKS)} for name, entry in weights.items()}
        write_json(out / TENSORS, kept)
        taken = [nbytes(plan.tensors[name]) for name, entry in tensors.items() if entry["taken"]]
        found = {"taken_over": len(taken), "taken_over_bytes": sum(taken), REMARKS: _by_remark(tensors)}
        changing = {key for entry in tensors.values() for key in entry[CHANGING]}
        return about(plan, tensors) | found | {UNCHANGED: [key for key in self.experts if key not in changing]}


def _by_remark(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the tensors of which the method said something, by what it said."""
    found: dict[str, list[str]] = {}
    for name, entry in tensors.items():
        for text in entry[REMARKS]:
            found.setdefault(text, []).append(name)
    return found


@dataclass(frozen=True)
class _Loaded:
    """A tensor that is ready to be written."""

    inputs: str | None
    """fingerprint of all that a merged weight depends on; None for a buffer"""
    pieces: Iterable[tuple[slice, Tensor]]
    """which elements, and their values, in the plan's dtype if they are known and else in any"""
    known: Mapping[str, Any] | None = None
    """what `_write_tensor` returns, of a tensor that is taken over from an earlier merge"""


def _noted(name: str) -> AbstractContextManager[None]:
    return noted(f"tensor {name} of layer {layer_of(name)}")


def _write_tensor(
    job: MergeJob, weights: Mapping[str, float], name: str, one: _Loaded, writer: CheckpointWriter
) -> Mapping[str, Any]:
    """Merge one tensor, or take it over, and write it.

    Returns:
        Its `blake3`, and what the method said of it.
    """
    if one.known is not None:
        for where, values in one.pieces:
            writer.write(name, values, where.start)
        return one.known
    dtype = writer.plan.tensors[name].dtype
    with remarks() as said:
        digest, is_finite = write_tensor(writer, name, one.pieces, dtype)
    if not is_finite:
        used = ", ".join(f"{expert} {weight:g}" for expert, weight in weights.items())
        raise InputError(
            f"tensor {name} merged by {job.method.name} has NaN or Inf as {dtype}; expected finite numbers: set "
            f"another out_dtype, or other weights (here: {used or 'the mean of the experts'})"
        )
    return {"blake3": digest, REMARKS: said}


def _inputs(job: MergeJob, weights: Mapping[str, float], name: str, dtype: torch.dtype) -> str:
    """Return the fingerprint of all that a merged weight depends on.

    Raises:
        InputError: NaN or Inf in what base or experts store for it.
    """
    contents = job.contents(name)
    experts = [[key, weights.get(key), contents[key]] for key in job.experts]
    method = job.method_for(name)
    how = [job.version, identity(method), identity(job.statistics if method.statistics else {})]
    return sha256_text(canonical([*how, name, str(dtype), contents["base"], experts]))


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
            return cls(open_checkpoint(job.previous), load_object(job.previous / TENSORS))
        except InputError:  # its weights are gone or cut since it was made: all is merged again
            return None

    def take(self, name: str, inputs: str | None) -> _Loaded | None:
        """Return a tensor as the earlier merge has it; None if it is made of other inputs, or damaged."""
        known = self.tensors.get(name)
        if inputs is None or not isinstance(known, dict) or known.get("inputs") != inputs or "blake3" not in known:
            return None
        values = self.checkpoint.read(name).reshape(-1)
        if blake3_hex(tensor_bytes(values)) != known["blake3"]:
            return None
        found = {"blake3": known["blake3"], REMARKS: known.get(REMARKS, [])}
        return _Loaded(inputs, [(slice(0, len(values)), values)], found)


def _merged_pieces(
    job: MergeJob, weights: Mapping[str, float], name: str, staging: Staging | None
) -> Iterator[tuple[slice, Tensor]]:
    """Return the pieces of a merged tensor; what they are made of is sent to the device if there is one."""
    if name in job.base.statistics:
        return job.mean_pieces(name)
    base = job.base.read(name)
    touched = any(expert.touches(name) for expert in job.experts.values())
    method = job.method_for(name)
    is_merged = job.base.info(name).is_floating_point and name not in job.base.buffers
    if not (is_merged and (touched or method.changes_untouched)):
        flat = base.reshape(-1)
        return ((where, flat[where]) for where in chunks(len(flat)))
    vectors = [job.task_vector(key, name, weights[key]) for key in job.experts]
    if staging is None:
        return method.merged_pieces(base, vectors)
    there = [replace(one, delta=one.delta.moved(staging.sent)) for one in vectors]
    return staging.returned(method.merged_pieces(staging.sent(base), there))
