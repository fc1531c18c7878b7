"""What a variant would answer with other settings: merged in memory, one candidate after the other; none is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.coefficients import row_of
from sensmerge.tasks.dynamic.materialised import Materialised
from sensmerge.tasks.dynamic.parameters import by_parameter
from sensmerge.tasks.dynamic.vectors import Vector, compact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.methods.settings import Values, VariantSettings
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.endings import WRITING_HEADS
from sensmerge.tasks.networks.expert import load_network
from sensmerge.tasks.networks.generation import set_end_tokens
from sensmerge.tasks.networks.heads import SavedHead
from sensmerge.tasks.networks.readers import load_reader
from sensmerge.tasks.stages.evaluate import evaluate_network
from sensmerge.tasks.stages.variant import VariantJob

_MERGE = "merge"
"""The one vector that is added to the base."""
_Vectors = dict[str, dict[str, Vector]]
"""by tensor, and `_MERGE`"""


@dataclass
class Candidates:
    """A variant, the rows of all tasks, and how the networks run that answer them."""

    variant: VariantJob
    tuning: Mapping[str, RowSet]
    dtype: str
    """torch name of the networks' dtype"""
    device: str
    """torch device"""
    heads: Path
    """folder with the heads of experts that have their own, as `VariantJob.write_heads` writes them"""
    _merged: tuple[VariantSettings, _Vectors] | None = None
    """what was merged last: further weights often come of the same merge"""

    def records(self, candidates: Sequence[Values]) -> list[dict[str, list[Record]]]:
        """Return the records of each candidate, by task.

        Candidates that differ in nothing but a factor of what is added to the base are merged once. Each is written
        out in place of the base's weights as it is run: cheaper than a pass that adds its share to every product.
        Memory: the base's network, what one merge adds to it, and the parameters that this changes once more.
        """
        found: list[dict[str, list[Record]]] = [{} for _ in candidates]
        for settings, factors in self._merges(candidates):
            vectors = self._vectors(settings)
            for owner, names in self._networks().items():
                network = self._network(owner, self.tuning[names[0]])
                parameters = dict(network.named_parameters(remove_duplicate=False))
                own = self.variant.experts[owner].head if owner is not None else ()
                changes = Materialised(parameters, by_parameter(self._base(), network, vectors, [_MERGE], own))
                for name in names:
                    for number, factor in factors.items():
                        with changes.written(torch.tensor([factor], dtype=torch.float64)):
                            found[number][name] = self._records(network, name)
        return found

    def _merges(self, candidates: Sequence[Values]) -> Iterator[tuple[VariantSettings, dict[int, float]]]:
        """Yield settings to merge with, and the factors by which candidates, by number, scale what that adds."""
        merges: list[tuple[VariantSettings, dict[int, float]]] = []
        for number, values in enumerate(candidates):
            settings, factor = self.variant.settings.having(values), 1.0
            if settings.method.scales_with_weight():
                settings, factor = replace(settings, weight=1.0), settings.weight
            known = next((factors for one, factors in merges if one == settings), None)
            if known is None:
                merges.append((settings, known := {}))
            known[number] = factor
        yield from merges

    def _vectors(self, settings: VariantSettings) -> _Vectors:
        """Return what a merge adds to each tensor of the base that it changes; the last one is kept."""
        if self._merged is None or self._merged[0] != settings:
            self._merged = None  # its memory is needed
            self._merged = settings, self._merge(settings)
        return self._merged[1]

    def _merge(self, settings: VariantSettings) -> _Vectors:
        job, dtype = self.variant.having(settings), getattr(torch, self.dtype)
        weights = job.weights()
        found: _Vectors = {}
        with _one_thread():
            for name in job.base.weights:
                own = {} if name in job.base.statistics else row_of(weights, name, layer_of(name))
                touched = any(expert.touches(name) for expert in job.experts.values())
                if name in job.base.statistics or not (touched or job.method.changes_untouched):
                    continue
                job.contents(name)  # NaN that is left out of some candidates is found in none
                vector = compact(_delta(job, name, own), dtype)
                if vector is not None:
                    found[name] = {_MERGE: vector}
        return found

    def _networks(self) -> dict[str | None, list[str]]:
        """Return the tasks by the expert whose head follows the merged trunk; None where the head is merged too."""
        found: dict[str | None, list[str]] = {}
        for name in self.tuning:
            found.setdefault(name if name in self.variant.head_configs else None, []).append(name)
        return found

    def _base(self) -> Base:
        base = open_base(self.variant.base.folder)
        return base.untie() if self.variant.base.untied and not base.untied else base

    def _network(self, owner: str | None, rows: RowSet) -> PreTrainedModel:
        """Return the base's network as the merged model's would be, but for the weights that are merged."""
        variant, base = self.variant, self._base()
        head = SavedHead(self.heads / HEADS / owner) if owner else None
        network = load_network(base, rows.task.head, getattr(torch, self.dtype), self.device, head)
        buffers = {base.network_name(name): buffer for name, buffer in network.named_buffers()}
        for name in base.statistics:
            if base.network_name(name) in buffers:
                buffer = buffers[base.network_name(name)]
                buffer.copy_(variant.mean_statistics(name).view(buffer.shape))
        if owner is None:
            _set_token_ids(network.config, variant.token_ids)
        if rows.task.head in WRITING_HEADS:
            set_end_tokens(network, variant.tokenizer, base.folder)
        return network

    def _records(self, network: PreTrainedModel, name: str) -> list[Record]:
        one = self.tuning[name]
        if one.label2id is not None:
            network.config.label2id = dict(one.label2id)
        tokenizer = load_reader(self.variant.tokenizer, one.task.reads)
        return evaluate_network(network, tokenizer, one.task, one.rows.read(), f"tasks.{name}.tuning")


def _set_token_ids(config: PretrainedConfig, token_ids: Mapping[str, int | list[int]]) -> None:
    """Give a config the special tokens that those of merged models have, see `VariantJob.write_companions`."""
    for key, value in token_ids.items():
        for part in [one for one in (config, config.get_text_config()) if hasattr(one, key)] or [config]:
            setattr(part, key, value)


def _delta(job: VariantJob, name: str, weights: Mapping[str, float]) -> torch.Tensor:
    """Return what a merge adds to one tensor, in float32.

    Raises:
        InputError: it is NaN or infinite, naming the tensor.
    """
    base = job.base.read(name)
    delta = torch.empty(base.numel())
    vectors = [job.task_vector(expert, name, weights[expert]) for expert in job.experts]
    for where, merged in job.method_for(name).merged_pieces(base, vectors):
        delta[where] = merged
    if not bool(delta.isfinite().all()):
        raise InputError(
            f"tensor {name} merged by {job.method.name} has NaN or Inf; expected finite numbers: set other values to "
            "tune, or other weights"
        )
    return delta.sub_(base.reshape(-1).float()).view(base.shape)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside the block, sums and products do not depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
