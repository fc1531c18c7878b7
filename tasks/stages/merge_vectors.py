"""Stage merge for SE-Merging: the base, and beside it what each expert adds, instead of one set of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.artifacts import sync
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint, tensor_bytes
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.checkpoints.planned import CheckpointWriter, preallocate
from sensmerge.tasks.coefficients import row_of
from sensmerge.tasks.dynamic.vectors import BASE, LowRank, Vector, compact
from sensmerge.tasks.dynamic.writing import finite_as, seal, vectors_file, write_vectors
from sensmerge.tasks.methods.contract import Additive
from sensmerge.tasks.stages.variant import UNCHANGED, VariantJob
from sensmerge.tasks.stages.written import blake3_hex, plan_merged, tensor_digests


@dataclass(frozen=True, kw_only=True)
class MergeVectorsJob(VariantJob):
    """Writes what each expert adds to the base in one variant."""

    version = 5

    method: Additive

    @property
    def static(self) -> float:
        """Every expert's coefficient in the static merge."""
        return self.method.static_coefficient(self.weight, len(self.experts))

    def run(self, part: int | str, out: Path) -> bool:
        """Write what each expert adds to each tensor of a group of layers, in compact form and the base's dtype.

        Everything the variant says is in it (sparsifying, consensus, coefficients by layer) but for a common factor,
        the static merge's coefficient c (`static`): the static merge is base + c · Σ vectors, and a coefficient of
        1 adds an expert's whole (sparse) task vector. Normalised TIES has no such factor, since it divides each element
        by the weights that agree there: its c = λ / K leaves what one expert has alone K-fold.

        A group that an interrupted run finished is left as it is, and False returned. Holds one tensor at a time, of
        each expert and the base, in float32, and the group's compact vectors.

        Raises:
            InputError: a value that is NaN or Inf, naming the tensor.
        """
        assert isinstance(part, int)
        if vectors_file(out, part).exists():
            return False
        torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
        weights = self.weights()
        for name in self.groups[part]:
            self.contents(name)  # of what is sparse, NaN might not be seen later
        mixed = [name for name in self.groups[part] if name not in self.base.statistics]
        found = {name: _vectors(self, row_of(weights, name, layer_of(name)), name) for name in mixed}
        write_vectors(out, part, found)
        return True

    def finish(self, out: Path) -> dict[str, Any]:
        """Complete the folder: the base as a checkpoint in `BASE`, per-task heads, and the digests of all files.

        Returns:
            `digest`: sha256 over the names and digests of the files; `bytes`: size of all weights, heads included;
            `unchanged`: experts that change nothing.

        Raises:
            OSError: a tensor reads back differently from what was written.
        """
        (out / BASE).mkdir(exist_ok=True)
        _write_base(self, out / BASE)
        self.write_companions(out / BASE)
        self.write_heads(out)
        return seal(out) | {UNCHANGED: self.unchanged()}


def _vectors(job: MergeVectorsJob, weights: Mapping[str, float], name: str) -> dict[str, Vector]:
    """Return the vectors of one tensor by expert; experts that add nothing are left out."""
    touching = [key for key, expert in job.experts.items() if expert.touches(name)]
    if not touching:
        return {}
    if job.method.consensus:
        vectors = _agreed(job, weights, name, touching)
    else:
        share = dict(zip(job.experts, job.method.shares([weights[key] for key in job.experts]), strict=True))
        vectors = {key: _contribution(job, key, name, share[key] / job.static) for key in touching}
    return {key: vector for key, vector in vectors.items() if vector is not None}


def _agreed(
    job: MergeVectorsJob, weights: Mapping[str, float], name: str, touching: list[str]
) -> dict[str, Vector | None]:
    """Return what each expert adds to a tensor where all must agree on its elements."""
    dtype, shape, base = job.base.dtype(name), job.base.info(name).shape, job.base.read(name).view(-1)
    parts = {key: torch.empty(len(base)) for key in job.experts}
    every = [job.task_vector(key, name, weights[key]) for key in job.experts]
    for where, agreed in job.method.agreed_pieces(base, every):
        for part, piece in zip(parts.values(), agreed, strict=True):
            part[where] = piece / job.static
    return {key: compact(finite_as(parts[key].view(shape), dtype, key, name), dtype) for key in touching}


def _contribution(job: MergeVectorsJob, key: str, name: str, factor: float) -> Vector | None:
    """Return what one expert adds to a tensor whatever the others do; an adapter's factors are kept if they can be."""
    dtype, shape = job.base.dtype(name), job.base.info(name).shape
    factors = job.experts[key].factors(name) if job.method.keeps_whole(key) else None
    if factors is not None:
        first, second, scaling = factors
        pair = (finite_as(each, dtype, key, name).to(dtype) for each in (first, second * (scaling * factor)))
        return LowRank(*(each.contiguous() for each in pair))
    base = job.base.read(name).view(-1)
    delta = torch.empty(len(base))
    for where, piece in job.method.contribution_pieces(base, job.task_vector(key, name, factor), factor):
        delta[where] = piece
    return compact(finite_as(delta.view(shape), dtype, key, name), dtype)


def _write_base(job: MergeVectorsJob, out: Path) -> None:
    """Write the base as merged models have it: parameters that an expert unties apart, statistics as the mean."""
    plan = plan_merged(job.base, None, job.shard_size)
    preallocate(plan, out)
    written = {}
    with CheckpointWriter(plan, out) as writer:
        for name in plan.tensors:
            values = job.mean_statistics(name) if name in job.base.statistics else job.base.read(name).reshape(-1)
            writer.write(name, values)
            written[name] = blake3_hex(tensor_bytes(values))
    for file in plan.sizes:
        sync(out / file)
    found = tensor_digests(open_checkpoint(out))
    altered = [name for name, digest in written.items() if found[name] != digest]
    if altered:
        raise OSError(
            f"{out}: {', '.join(altered)} read back differently from what was written; run again to write them again"
        )
