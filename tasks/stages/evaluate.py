"""Scores of one model on one task: a record per row (see its kind in `tasks.kinds`), every metric with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.kinds.kind import RowTask, Sample, Task
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.blocks import to_device, trunk_output
from sensmerge.tasks.networks.expert import Expert, load_network, open_expert
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
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.tokens import Inputs, collate, pad_token
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.stages.answers import NetworkModel, batches, classifier_batch_size, items_of, records_of

VERSION = 2
_HEAD_INPUTS = "head_inputs.safetensors"


def evaluate_network(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: RowTask, rows: list[Row], key: str
) -> list[Record]:
    """Run a network over rows and return their records in the order of the rows.

    Rows are those that `RowTask.check_rows` has passed; `key` (`tasks.math.evaluation`) names them in messages. The
    batch size changes no record beyond rounding. Raises InputError as `items_of`, and for logits that are not finite.
    """
    labels = network.config.label2id if task.has_own_head else None
    return records_of(NetworkModel(network, tokenizer, task), items_of("", task, rows, tokenizer, key, labels))


def write_evaluation(task: Task, records: list[Record], out: Path) -> dict[str, dict[str, float]]:
    """Write `records.json` and `scores.json` to a folder and return the scores: metric → value, n, low, high."""
    scores = {metric: asdict(score) for metric, score in task.scores(records).items()}
    write_json(out / "records.json", records)
    write_json(out / "scores.json", scores)
    return scores


@dataclass(frozen=True)
class Subject:
    """The model that is scored."""

    base: Path
    model: Path
    """folder of the base itself, of a merged model, or of an expert"""
    is_expert: bool
    """whether `model` is to be matched with the base (an adapter, a fine-tune under other tensor names)"""
    head_of: Path | None
    """expert whose head follows the trunk (classification)"""
    label2id: Mapping[str, int] | None = None
    """classes of the task's own expert (classification): rows may name them"""
    trunk: str | None = None
    """fingerprint of what the head reads of its trunk for the evaluation set; None where nothing is to be kept"""
    earlier: Path | None = None
    """an earlier artifact of the same step"""
    base_config: tuple[Path, ...] = ()
    """experts that run with the base's settings where their own configs differ"""


def evaluate(
    subject: Subject, name: str, task: Task, rows: list[Row], tokenizer: Path, dtype: str, device: str, out: Path
) -> dict[str, Any]:
    """Score one model on one task.

    Where the head of an expert follows the trunk of another model, what it reads may be kept, if it is little: a
    changed head on the same trunk is scored without running that again, to the same bits.

    Args:
        subject: the model.
        name: the task's name.
        task: the task.
        rows: the evaluation set (none for lm_eval, which has its own).
        tokenizer: folder of the tokenizer that all models share.
        dtype: torch name of the network's dtype.
        device: torch device.
        out: folder for `records.json` (one per row) and `scores.json` (metric → value, n, low, high).

    Returns:
        The scores.
    """
    reader, key = load_tokenizer(tokenizer), f"tasks.{name}.evaluation"
    if not isinstance(task, RowTask):
        records = task.evaluate(_network(subject, name, task, dtype, device), reader, f"tasks.{name}")
    elif subject.trunk is None:
        records = evaluate_network(_network(subject, name, task, dtype, device), reader, task, rows, key)
    else:
        records = _through_head(subject, name, task, rows, reader, dtype, device, out)
    return write_evaluation(task, records, out)


def _network(subject: Subject, name: str, task: Task, dtype: str, device: str) -> PreTrainedModel:
    base = open_base(subject.base)
    model = _expert(subject, subject.model, base, name) if subject.is_expert else open_base(subject.model)
    head_of = _expert(subject, subject.head_of, base, name) if subject.head_of else None
    network = load_network(model, task.head, getattr(torch, dtype), device, head_of)
    if subject.label2id is not None:
        network.config.label2id = dict(subject.label2id)
    if not task.has_own_head:
        set_end_tokens(network, subject.model, subject.base)
    return network


def _expert(subject: Subject, folder: Path, base: Base, name: str) -> Expert:
    return open_expert(folder, base, name, base_config=folder in subject.base_config)


def _through_head(
    subject: Subject,
    name: str,
    task: RowTask,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    device: str,
    out: Path,
) -> list[Record]:
    """Return records as `evaluate_network` does, and keep in `out` what the head reads of the trunk."""
    assert subject.head_of is not None
    assert subject.trunk is not None
    trunk, inputs = None, _kept(subject)
    if inputs:
        base_config = subject.head_of in subject.base_config
        source = Source(subject.base, subject.head_of, name, task.head, getattr(torch, dtype), device, base_config)
        head = DetachedHead.read(source)
    else:
        network = _network(subject, name, task, dtype, device)
        trunk, head = trunk_of(network), DetachedHead(network)
    labels = subject.label2id or head.network.config.label2id
    items = items_of(name, task, rows, tokenizer, f"tasks.{name}.evaluation", labels)
    size = classifier_batch_size(head.network, task.batch_size)
    model = _HeadModel(trunk, head, inputs, pad_token(head.network, tokenizer), size)
    records = records_of(model, items)
    if len(inputs) == model.batches:
        save_head_inputs(inputs, subject.trunk, out / _HEAD_INPUTS)
    return records


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
        for number, chosen in enumerate(batches(reads, self.batch_size)):
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


def _kept(subject: Subject) -> dict[int, HeadInput]:
    """Return what an earlier artifact has kept of the same trunk; nothing if there is none."""
    file = None if subject.earlier is None else subject.earlier / _HEAD_INPUTS
    if file is None or not file.is_file() or fingerprint_of(file) != subject.trunk:
        return {}
    return load_head_inputs(file)
