"""Stage cross_task: how far the experts' logits lie apart on each other's calibration sets, pair by pair."""

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from sensmerge.tasks.artifacts import (
    Artifact,
    canonical,
    is_partial,
    partial_of,
    read_json,
    sha256_text,
    write_json,
)
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local, identity
from sensmerge.tasks.networks.blocks import Batch, to_device
from sensmerge.tasks.networks.head_inputs import (
    HeadInput,
    fingerprint_of,
    head_input,
    is_little,
    load_head_inputs,
    logits_of,
    save_head_inputs,
)
from sensmerge.tasks.networks.heads import DetachedHead
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.readers import load_reader
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.stages.calibration import CalibrationSet, reader_of
from sensmerge.tasks.stages.job import Earlier, Job

DISTANCES = "distances.json"
PAIRS = "pairs.json"
_HEAD_INPUTS = "head_inputs.safetensors"
CHUNK_TOKENS = 256
"""Logits exist for this many tokens at a time, and short samples of one length are run together up to as many."""
PICTURES = 8
"""How many pictures are run together."""
_TRUNKS = "trunks"
"""Folder for what trunks gave: of completions until all distances are known, of classifiers for good."""

Distances = dict[str, dict[str, float]]


@dataclass(frozen=True)
class CrossTaskJob(Job):
    """Measures the distances of all experts. Those that earlier artifacts have are taken over.

    Passes that only known distances need are left out: after a change of one expert of K, K of K² are made on
    classification tasks, where what heads read of trunks is kept, and 3K − 2 on others. A pass is that of one trunk
    over one calibration set.
    """

    stage = "cross_task"
    version = 7

    base: Artifact
    experts: Mapping[str, Artifact]
    base_config: Set[str]
    """experts that run with the base's settings where their own configs differ"""
    calibration: Mapping[str, CalibrationSet]
    """calibration set of each expert"""
    tokenizer: Artifact | Mapping[str, Artifact]
    """that all models share, or by task where its expert reads it with its own"""
    dtype: str
    """torch name of the networks' dtype"""
    heads: Local[Mapping[str, str]]
    """digest of each expert's config, on which depends what its head reads of a trunk"""
    device: Local[str]
    """torch device"""
    placement: Local[Placement]
    """where the networks run"""
    planned: Local[PlannedModels] = NONE
    """those that it reads"""
    known: Local[Mapping[str, float]] = field(default_factory=dict)
    """distances of earlier artifacts by fingerprint"""
    kept: Local[Mapping[str, Path]] = field(default_factory=dict)
    """what heads read of trunks: files of earlier artifacts by fingerprint"""

    def pair(self, i: str, j: str) -> str:
        """Return the fingerprint of the distance of expert i from expert j: it depends on all of expert j."""
        return self._fingerprint(i, j, [self.experts[j].fingerprint, j in self.base_config])

    def trunk(self, i: str, j: str) -> str:
        """Return the fingerprint of what the head of task j reads of expert i's trunk: of j, its config counts."""
        return self._fingerprint(i, j, self.heads[j])

    def _fingerprint(self, i: str, j: str, head: Any) -> str:
        about = {
            "version": self.version,
            "dtype": self.dtype,
            "base": self.base,
            "expert": [self.experts[i], i in self.base_config],
            "head": head,
            "calibration": self.calibration[j],
            "tokenizer": reader_of(self.tokenizer, j),
        }
        return sha256_text(canonical(identity(about)))

    def resumed(self, earlier: Earlier) -> Self:
        """Take over the distances, and what heads read of trunks, that intact files of earlier artifacts have."""
        names = list(product(self.experts, self.experts))
        pairs, trunks = {self.pair(i, j) for i, j in names}, {self.trunk(i, j) for i, j in names}
        known: dict[str, float] = {}
        kept: dict[str, Path] = {}
        for folder in earlier.artifacts():
            if all(earlier.is_intact(folder, name) for name in (PAIRS, DISTANCES)):
                known |= {one: g for one, g in known_distances(folder).items() if one in pairs}
            for file in kept_trunks(folder):
                if earlier.is_intact(folder, str(file.relative_to(folder))) and fingerprint_of(file) in trunks:
                    kept[fingerprint_of(file)] = file
        return replace(self, known=known, kept=kept)

    def parts(self) -> Sequence[str]:
        """Return the experts whose trunks have to run."""
        return [name for name in self.experts if self.looked_at(name)]

    def reads(self, part: int | str | None) -> Tensors | None:
        """See `Job`: headers at first, and then what is read of trunks and heads, where it is."""
        folders = (self.base.folder, *(one.folder for one in self.experts.values()))
        return dict.fromkeys(folders, ()) if self.planned.of(*folders).listings else None

    def wanted(self, j: str) -> list[str]:
        """Return the experts whose distance from expert j, on its calibration set, is to be measured."""
        return [i for i in self.experts if i != j and self.pair(i, j) not in self.known]

    def looked_at(self, i: str) -> list[str]:
        """Return the tasks over whose calibration sets the trunk of expert i runs."""
        needed = [j for j in self.experts if (wanted := self.wanted(j)) and i in (j, *wanted)]
        return [j for j in needed if self.trunk(i, j) not in self.kept]

    def source(self, i: str) -> Source:
        """Return where the network of expert i comes from."""
        return self._sources[i]

    @cached_property
    def _sources(self) -> Mapping[str, Source]:
        """All sources, each of which reads its headers once."""
        dtype = getattr(torch, self.dtype)

        def source(i: str) -> Source:
            ending, folder, base_config = self.calibration[i].head, self.experts[i].folder, i in self.base_config
            models = self.planned.of(self.base.folder, folder)
            return Source(self.base.folder, folder, f"experts.{i}", ending, dtype, self.device, base_config, models)

        return {i: source(i) for i in self.experts}

    def head(self, i: str) -> DetachedHead:
        """Return the head of expert i; on the CPU where networks run on actors, for they have the GPUs."""
        source = self.source(i)
        return DetachedHead.read(replace(source, device="cpu") if isinstance(self.placement, Actors) else source)

    def is_classification(self, j: str) -> bool:
        """Return whether task j has classes, and its expert a head of its own for them."""
        return self.calibration[j].task.has_own_head

    def batches(self, j: str) -> list[Batch]:
        """Return the inputs of task j's calibration set, in batches without padding: no number depends on others."""
        config, reads = self.source(j).expert.config, self.calibration[j].task.reads
        reader = load_reader(reader_of(self.tokenizer, j).folder, reads)
        # Without a padding token, some heads do not find the last token of more than one sample.
        alone = reads == "texts" and self.is_classification(j) and getattr(config, "pad_token_id", None) is None
        by_shape: dict[tuple[torch.Size, ...], list[Batch]] = {}
        # An encoder-decoder makes of labels what its decoder is given.
        left = set() if self.calibration[j].head == "seq2seq_lm" else {"labels"}
        for sample in self.calibration[j].samples(j, reader, config.label2id):
            inputs = {key: value for key, value in sample.items() if key not in left}
            by_shape.setdefault(tuple(one.shape for one in inputs.values()), []).append(inputs)
        batches: list[Batch] = []
        for samples in by_shape.values():
            ids = samples[0].get("input_ids")
            most = PICTURES if reads == "pictures" else 1 if ids is None else max(1, CHUNK_TOKENS // ids.shape[1])
            size = 1 if alone else most
            for start in range(0, len(samples), size):
                some = samples[start : start + size]
                batches.append({key: torch.cat([sample[key] for sample in some]) for key in some[0]})
        return batches

    def run(self, part: int | str, out: Path) -> bool:
        """Run the trunk of an expert over the calibration sets it is looked at on, and keep what it hands to its head.

        What was kept before is not made again. Memory: one network, or what its placement takes of it (see
        `StreamedRunner`).
        """
        assert isinstance(part, str)
        left = [j for j in self.looked_at(part) if not _kept(out, part, j).exists()]
        if left:
            _run_trunk(self, part, left, out)
        return bool(left)

    def finish(self, out: Path) -> dict[str, Any]:
        """Measure g[i][j] = mean over samples of D_j of the mean over tokens of ‖logits_i − logits_j‖₂.

        The heads run over what `run` kept, side by side, `CHUNK_TOKENS` tokens at a time. On a classification task
        every trunk is followed by the head of the task's own expert, whole samples at a time.

        Memory: K heads with two chunks of logits, K · vocabulary · width + 2 · CHUNK_TOKENS · vocabulary numbers,
        whatever the samples are.

        Args:
            out: folder for `distances.json`, `pairs.json` (their fingerprints) and what is kept of trunks.

        Returns:
            The largest and smallest distance (`distances.json` in `out` has them all), and how many were measured.

        Raises:
            InputError: logits that are not finite.
        """
        names = list(self.experts)
        pairs = {i: {j: self.pair(i, j) for j in names} for i in names}
        distances = {i: {j: 0.0 if i == j else self.known.get(pairs[i][j], math.nan) for j in names} for i in names}
        try:
            for i, j, distance in _measured(self, out):
                if not math.isfinite(distance):
                    raise InputError(
                        f"tasks.{j}.calibration: the distance of experts.{i} from experts.{j} is {distance}; "
                        "expected a finite number (try dtype: float32)"
                    )
                distances[i][j] = distance
        except InputError:
            _drop_trunks(out)
            raise
        _keep_head_inputs(self, out)
        write_json(out / DISTANCES, distances)
        write_json(out / PAIRS, pairs)
        apart = [g for i, row in distances.items() for j, g in row.items() if i != j]
        return {"min": min(apart), "max": max(apart), "measured": sum(len(self.wanted(j)) for j in names)}


def _run_trunk(job: CrossTaskJob, i: str, tasks: Sequence[str], out: Path) -> None:
    """Run the trunk of expert i over the calibration sets of some tasks and keep what it hands to its head."""
    batches = {j: job.batches(j) for j in tasks}
    places = [(j, number) for j in tasks for number in range(len(batches[j]))]
    begun = {j: partial_of(_kept(out, i, j)) for j in tasks}
    for folder in begun.values():
        folder.mkdir(parents=True, exist_ok=True)
    heads = {j: job.head(j) for j in tasks if job.is_classification(j)}
    little: dict[str, dict[int, HeadInput]] = {j: {} for j in heads}
    with torch.no_grad(), open_runner(job.source(i), job.placement, out / _TRUNKS / i) as runner:
        for place, output in runner.trunk_outputs([batches[j][number] for j, number in places]):
            j, number = places[place]
            if j in heads:
                kept = head_input(heads[j], output, batches[j][number])
            else:
                kept = {key: tensor.cpu().contiguous() for key, tensor in output.items()}
            if j in heads and is_little(kept, batches[j][number]):
                little[j][number] = kept
            else:
                save_file(dict(kept), _file(begun[j], number))
    for j, inputs in little.items():
        if len(inputs) == len(batches[j]):
            save_head_inputs(inputs, job.trunk(i, j), begun[j] / _HEAD_INPUTS)
        else:
            for number, kept in inputs.items():
                save_file(dict(kept), _file(begun[j], number))
    for j, folder in begun.items():
        folder.rename(_kept(out, i, j))


def known_distances(folder: Path) -> dict[str, float]:
    """Return all distances of an artifact of this stage by their fingerprint."""
    pairs, distances = read_json(folder / PAIRS), read_json(folder / DISTANCES)
    return {print_: distances[i][j] for i, row in pairs.items() for j, print_ in row.items() if i != j}


def kept_trunks(folder: Path) -> list[Path]:
    """Return the files of an artifact of this stage with what heads read of trunks."""
    return sorted((folder / _TRUNKS).glob(f"*/*/{_HEAD_INPUTS}"))


def _kept(out: Path, i: str, j: str) -> Path:
    return out / _TRUNKS / i / j


def _measured(job: CrossTaskJob, out: Path) -> Iterator[tuple[str, str, float]]:
    """Yield i, j and g[i][j] of all distances that are not known."""
    heads: dict[str, DetachedHead] = {}
    for j in job.experts:
        wanted = job.wanted(j)
        if not wanted:
            continue
        sums = dict.fromkeys(wanted, 0.0)
        if job.is_classification(j):
            head, reads = job.head(j), {i: _head_inputs(job, out, i, j) for i in (j, *wanted)}
            for number, batch in enumerate(job.batches(j)):
                own = logits_of(head, reads[j](number), batch)
                for i in wanted:
                    apart = logits_of(head, reads[i](number), batch) - own
                    norms = apart.norm(dim=-1).double()  # of each sample, or of each of its tokens
                    sums[i] += float(norms.flatten(1).mean(1).sum() if norms.ndim > 1 else norms.sum())
        else:
            heads |= {i: job.head(i) for i in (j, *wanted) if i not in heads}
            for number, batch in enumerate(job.batches(j)):
                kept = {i: _file(_kept(out, i, j), number) for i in (j, *wanted)}
                for i, norm in _token_norms(j, heads, kept, batch).items():
                    sums[i] += norm
        for i, total in sums.items():
            yield i, j, total / job.calibration[j].count


def _keep_head_inputs(job: CrossTaskJob, out: Path) -> None:
    """Leave of what trunks gave what is little; that of earlier artifacts stays known."""
    kept = {_kept(out, i, j): job.trunk(i, j) for i, j in product(job.experts, job.experts)}
    _drop_trunks(out, [folder for folder in kept if (folder / _HEAD_INPUTS).is_file()])
    for folder, print_ in kept.items():
        if not folder.exists() and print_ in job.kept:
            begun = partial_of(folder)
            begun.mkdir(parents=True)
            shutil.copyfile(job.kept[print_], begun / _HEAD_INPUTS)
            begun.rename(folder)


def _drop_trunks(out: Path, kept: Collection[Path] = ()) -> None:
    """Remove what trunks gave, but for some folders; one that is half removed does not look whole."""
    for place in sorted(set((out / _TRUNKS).glob("*/*")).difference(kept)):  # those that are half removed come first
        if place.is_dir():
            shutil.rmtree(place if is_partial(place) else place.rename(partial_of(place)))
        else:
            place.unlink()
    if not kept:
        shutil.rmtree(out / _TRUNKS, ignore_errors=True)


def _head_inputs(job: CrossTaskJob, out: Path, i: str, j: str) -> Callable[[int], HeadInput]:
    """Return what gives what the head of task j reads of expert i's trunk, by the number of the batch."""
    folder = _kept(out, i, j)
    file = folder / _HEAD_INPUTS if folder.exists() else job.kept[job.trunk(i, j)]
    if file.is_file():
        return load_head_inputs(file).__getitem__
    return lambda number: load_file(_file(folder, number))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def _token_norms(j: str, heads: Mapping[str, DetachedHead], kept: Mapping[str, Path], batch: Batch) -> dict[str, float]:
    """Return, for every expert i but j, the sum over samples of the mean over tokens of ‖logits_i − logits_j‖₂.

    Args:
        j: the expert that the others are compared with.
        heads: of each expert.
        kept: what each expert's trunk gave for the samples.
        batch: samples of one length.
    """
    device = str(heads[j].network.device)
    batch = to_device(batch, device)
    trunks = {i: load_file(path, device=device) for i, path in kept.items()}
    samples, length, _ = trunks[j]["hidden"].shape
    step = max(1, CHUNK_TOKENS // samples)
    norms: dict[str, list[torch.Tensor]] = {i: [] for i in kept if i != j}
    with torch.no_grad():
        for start in range(0, length, step):
            chunk = slice(start, start + step)
            reference = _logits(heads[j], trunks[j], chunk, batch)
            for i, found in norms.items():
                found.append((_logits(heads[i], trunks[i], chunk, batch) - reference).norm(dim=-1).double())
    return {i: float(torch.cat(found, dim=1).mean(dim=1).sum()) for i, found in norms.items()}


def _logits(head: DetachedHead, trunk: Mapping[str, torch.Tensor], chunk: slice, batch: Batch) -> torch.Tensor:
    """Return the head's logits, float32, for a chunk of what the trunk gave."""
    return head.logits(
        trunk["hidden"][:, chunk], trunk.get("pooled"), {key: value[:, chunk] for key, value in batch.items()}
    )
