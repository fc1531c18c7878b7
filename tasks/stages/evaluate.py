"""Scores of one model on one task: a record per row (see its kind in `tasks.kinds`), every metric with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import Artifact, canonical, sha256_text, write_json
from sensmerge.tasks.checkpoints.checkpoint import FilesNeeded
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.checkpoints.weights import by_file
from sensmerge.tasks.identity import For, Local
from sensmerge.tasks.kinds.kind import Labels, RowTask, Task
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.blocks import to_device, trunk_output
from sensmerge.tasks.networks.endings import WRITING_HEADS
from sensmerge.tasks.networks.expert import Expert, load_network
from sensmerge.tasks.networks.generation import set_end_tokens
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
from sensmerge.tasks.networks.networks import load_tokenizer, trunk_of
from sensmerge.tasks.networks.opened import opened_base, opened_expert, opened_reader
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.tokens import Inputs, batches, collate, length, pad_token
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages.answers import NetworkModel, classifier_batch_size, items_of, records_of
from sensmerge.tasks.stages.job import Earlier, Job

_HEAD_INPUTS = "head_inputs.safetensors"


@dataclass(frozen=True)
class EvaluateJob(Job):
    """Scores one model on one task.

    Where the head of an expert follows the trunk of another model, what it reads may be kept, if it is little: a
    changed head on the same trunk is scored without running that again, to the same bits.
    """

    stage = "evaluate"
    version = 4

    base: Artifact
    model: Artifact
    """the base itself, a merged model, or an expert"""
    head: Artifact | None
    """expert whose head follows the trunk (classification)"""
    tokenizer: Artifact
    """folder of the tokenizer that reads the rows"""
    task: Annotated[Task, For("evaluation")]
    rows: StoredRows
    """the evaluation set (of no use to a kind that has its own)"""
    labels: Labels | None
    """classes of the task's own expert (classification): rows may name them"""
    dtype: str
    """torch name of the network's dtype"""
    depends: Mapping[str, Any]
    """what scores depend on beside all this, see `Task.depends_on`"""
    name: Local[str]
    """of the task"""
    is_expert: Local[bool]
    """whether the model is to be matched with the base (an adapter, a fine-tune under other tensor names)"""
    device: Local[str]
    """torch device"""
    head_config: Local[str | None] = None
    """digest of what the head's config computes; None where nothing of the trunk is to be kept"""
    base_config: Local[tuple[Path, ...]] = ()
    """experts that run with the base's settings where their own configs differ"""
    earlier: Local[Path | None] = None
    """an earlier artifact of the same step"""
    planned: Local[PlannedModels] = NONE
    """those that it reads"""

    def reads(self, part: int | str | None) -> Tensors | None:
        """See `Job`: headers at first, and then what the network is made of; nothing of the base for a merged model."""
        inputs = self._inputs
        return dict.fromkeys([one.folder for one in inputs.listings], ()) if inputs.listings else None

    @property
    def _inputs(self) -> PlannedModels:
        """The models of which what is read comes when it is."""
        known = [one.folder for one in self.planned.listings]
        inputs = [self.model.folder] if self.is_expert or self.model.folder in known else []
        return self.planned.of(self.base.folder, *inputs, *([self.head.folder] if self.head else []))

    def trunk(self) -> str | None:
        """Return a fingerprint of what the head reads of the trunk, which outlasts the head."""
        if self.head_config is None:
            return None
        return sha256_text(canonical(self.identity() | {"head": self.head_config, "batch_size": self.task.batch_size}))

    def resumed(self, earlier: Earlier) -> Self:
        """See `Job`: what the head reads of the trunk may be there from before."""
        return self if self.head_config is None else replace(self, earlier=earlier.last())

    def finish(self, out: Path) -> dict[str, Any]:
        """Write `records.json` (one record per row) and `scores.json` (metric → value, n, low, high).

        Returns:
            The scores.

        Raises:
            InputError: a row that has no sample, or logits that are not finite.
        """
        task = self.task
        if not isinstance(task, RowTask):
            records = task.evaluate(self._network(), load_tokenizer(self.tokenizer.folder), f"tasks.{self.name}")
            return write_evaluation(task, records, out)
        tokenizer = opened_reader(self.tokenizer, task.reads)
        if self.head_config is None:
            key = f"tasks.{self.name}.evaluation"
            records = evaluate_network(self._network(), tokenizer, task, self.rows.read(), key)
        else:
            records = self._through_head(task, tokenizer, out)
        return write_evaluation(task, records, out)

    def _network(self) -> PreTrainedModel:
        try:
            model, head_of = self._opened()
        except FilesNeeded:
            self._inputs.bring()
            model, head_of = self._opened()
        base = model.base if isinstance(model, Expert) else model
        heads = [] if head_of is None else [(head_of.source, name) for name in head_of.head.values()]
        read = (one for name in (*base.weights, *base.buffers) for one in model.read_for(name))
        self._inputs.bring(by_file([*heads, *read]))
        network = load_network(model, self.task.head, getattr(torch, self.dtype), self.device, head_of)
        if self.labels is not None:
            network.config.label2id = dict(self.labels)
        if self.task.head in WRITING_HEADS:
            set_end_tokens(network, self.model.folder, self.base.folder)
        return network

    def _opened(self) -> tuple[Base | Expert, Expert | None]:
        """Return the headers of the model, and those of the expert whose head follows it."""
        model = self._expert(self.model) if self.is_expert else opened_base(self.model)
        return model, self._expert(self.head) if self.head else None

    def _expert(self, one: Artifact) -> Expert:
        return opened_expert(one, self.base, one.folder in self.base_config)

    def _through_head(self, task: RowTask, tokenizer: PreTrainedTokenizerBase, out: Path) -> list[Record]:
        """Return records as `evaluate_network` does, and keep in `out` what the head reads of the trunk."""
        trunk, kept, inputs = None, self.trunk(), self._kept()
        assert self.head is not None
        assert kept is not None
        if inputs:
            base_config = self.head.folder in self.base_config
            dtype = getattr(torch, self.dtype)
            folder, models = self.head.folder, self._inputs
            source = Source(self.base.folder, folder, self.name, task.head, dtype, self.device, base_config, models)
            head = DetachedHead.read(source)
        else:
            network = self._network()
            trunk, head = trunk_of(network), DetachedHead(network)
        labels = self.labels or head.network.config.label2id
        items = items_of(self.name, task, self.rows.read(), tokenizer, f"tasks.{self.name}.evaluation", labels)
        size = classifier_batch_size(head.network, task.batch_size)
        model = _HeadModel(trunk, head, inputs, pad_token(head.network, tokenizer), size)
        records = records_of(model, items)
        if len(inputs) == model.batches:
            save_head_inputs(inputs, kept, out / _HEAD_INPUTS)
        return records

    def _kept(self) -> dict[int, HeadInput]:
        """Return what an earlier artifact has kept of the same trunk; nothing if there is none."""
        file = None if self.earlier is None else self.earlier / _HEAD_INPUTS
        if file is None or not file.is_file() or fingerprint_of(file) != self.trunk():
            return {}
        return load_head_inputs(file)


def evaluate_network(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: RowTask, rows: list[Row], key: str
) -> list[Record]:
    """Run a network over rows and return their records in the order of the rows.

    Rows are those that `RowTask.check_rows` has passed; `key` (`tasks.math.evaluation`) names them in messages. The
    batch size changes no record beyond rounding. Raises InputError as `items_of`, and for logits that are not finite.
    """
    labels = network.config.label2id if task.has_own_head else None
    name = key.partition(".")[2].rpartition(".")[0]
    return records_of(NetworkModel(network, tokenizer, task), items_of(name, task, rows, tokenizer, key, labels))


def write_evaluation(task: Task, records: list[Record], out: Path) -> dict[str, dict[str, float]]:
    """Write `records.json` and `scores.json` to a folder and return the scores: metric → value, n, low, high."""
    scores = {metric: asdict(score) for metric, score in task.scores(records).items()}
    write_json(out / "records.json", records)
    write_json(out / "scores.json", scores)
    return scores


@dataclass
class _HeadModel:
    """A head that answers from what it reads of a trunk, which is kept by the number of the batch, or run."""

    trunk: PreTrainedModel | None
    head: DetachedHead
    inputs: dict[int, HeadInput]
    """what is kept; what the trunk gives is added, if it is little"""
    pad_id: int
    batch_size: int
    batches: int = 0
    """how many were run"""

    def logits(self, samples: Sequence[Sample], owners: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See `Model`."""
        reads = [sample.inputs for sample in samples]
        for number, chosen in enumerate(batches([length(one) for one in reads], self.batch_size)):
            batch = collate([reads[place] for place in chosen], self.pad_id)
            if self.trunk is None:
                found = self.inputs[number]
            else:
                with torch.no_grad():
                    output = trunk_output(self.trunk(**to_device(batch, str(self.head.network.device))))
                found = head_input(self.head, output, batch)
                if is_little(found, batch):
                    self.inputs[number] = found
            self.batches += 1
            yield from zip(chosen, logits_of(self.head, found, batch), strict=True)

    def generate(self, prompts: Sequence[Inputs], owners: Sequence[int], max_new_tokens: int) -> list[str]:
        """See `Model`; a classifier generates nothing."""
        raise NotImplementedError
