"""How rows become records: one way for all kinds of task and all models, static ones and dynamic ones.

A model that answers samples is a `Model`; how it batches them is its own affair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import Labels, RowTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.networks.blocks import to_device
from sensmerge.tasks.networks.endings import WRITING_HEADS
from sensmerge.tasks.networks.generation import generate
from sensmerge.tasks.networks.readers import read_by
from sensmerge.tasks.networks.tokens import Inputs, batches, collate, length, pad_token
from sensmerge.tasks.rows.source import Row


@dataclass(frozen=True)
class Item:
    """One row: what a model reads, and what only the scoring knows."""

    name: str
    """of the task"""
    task: RowTask
    number: int
    """of the row in its evaluation set"""
    row: Row
    samples: list[Sample]

    @property
    def prompt(self) -> Inputs:
        """What the row is routed by, and its answer generated from."""
        return self.samples[0].prompt


def items_of(
    name: str, task: RowTask, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, key: str, labels: Labels | None
) -> list[Item]:
    """Return rows as items; `key` (`tasks.math.evaluation`) names them in messages.

    Raises:
        InputError: a row without a sample, or without a prompt that its task generates from.
    """
    items = []
    for number, row in enumerate(rows):
        where = f"row {number} of {key}"
        items.append(Item(name, task, number, row, task.samples(row, tokenizer, where, labels)))
        if task.answer_tokens and not items[-1].samples[0].has_prompt:
            raise InputError(f"{where}: the prompt has no token to generate from; set generate: 0")
    return items


class Model(Protocol):
    """What answers samples."""

    def logits(self, samples: Sequence[Sample], owners: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each sample's place and logits, in any order: (T, vocabulary) padded on the right, or (classes,).

        Of networks without a head it is the last hidden state, (T, width) padded on the right.

        `owners` are the places of the samples' items.
        """

    def generate(self, prompts: Sequence[Inputs], owners: Sequence[int], max_new_tokens: int) -> list[str]:
        """Return greedy continuations as text, each up to an end token (left out)."""


def records_of(model: Model, items: Sequence[Item]) -> list[Record]:
    """Return the record of each item.

    Raises:
        InputError: logits that are not finite; an answer that its task cannot look through.
    """
    samples = [sample for item in items for sample in item.samples]
    owners = [place for place, item in enumerate(items) for _ in item.samples]
    judged: list[Any] = [None] * len(samples)
    for place, logits in model.logits(samples, owners):
        judged[place] = items[owners[place]].task.judge(samples[place], logits)
    parts = iter(judged)
    records = [item.task.record(item.row, [next(parts) for _ in item.samples]) for item in items]
    for most in sorted({item.task.answer_tokens for item in items} - {0}):
        asked = [place for place, item in enumerate(items) if item.task.answer_tokens == most]
        texts = model.generate([items[place].prompt for place in asked], asked, most)
        for place, text in zip(asked, texts, strict=True):
            item = items[place]
            try:
                records[place] |= item.task.answer_record(item.row, text)
            except InputError as error:
                raise InputError(f"tasks.{item.name}.{error}; the text is the answer to row {item.number}") from None
    return records


def classifier_batch_size(network: PreTrainedModel, asked: int) -> int:
    """Return how many samples of full length a classifier takes at once: as many as are asked for, or one.

    A decoder with a classification head finds the last token by the padding id of its config; without one it takes the
    last of the batch, which is right for a single sample only.
    """
    if read_by(network) == "pictures":  # all have one size
        return asked
    return asked if getattr(network.config, "pad_token_id", None) is not None else 1


class NetworkModel:
    """A network that answers the samples of one task, as it is, in evaluation mode."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: RowTask) -> None:
        """Take a network that ends as the task says."""
        self._network = network.eval()
        self._tokenizer = tokenizer
        self._task = task
        self._pad_id = pad_token(network, tokenizer)

    def logits(self, samples: Sequence[Sample], owners: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See `Model`."""
        network, size = self._network, self._task.batch_size
        if self._task.has_own_head:
            size = classifier_batch_size(network, size)
        options = {"use_cache": False} if self._task.head in WRITING_HEADS else {}
        inputs = [sample.inputs for sample in samples]
        for chosen in batches([length(one) for one in inputs], size):
            batch = to_device(collate([inputs[place] for place in chosen], self._pad_id), str(network.device))
            with torch.inference_mode():
                output = network(**batch, **options)
                found: Tensor = output.last_hidden_state if self._task.head == "trunk" else output.logits
            yield from zip(chosen, found, strict=True)

    def generate(self, prompts: Sequence[Inputs], owners: Sequence[int], max_new_tokens: int) -> list[str]:
        """See `Model`."""
        network, tokenizer, texts = self._network, self._tokenizer, [""] * len(prompts)
        # Of padding before new tokens little is computed: prompts of all lengths run together.
        for chosen in batches([length(one) + max_new_tokens for one in prompts], self._task.batch_size, 1):
            some = [prompts[place] for place in chosen]
            with torch.inference_mode():
                found = generate(network, tokenizer, some, max_new_tokens)
            for place, ids in zip(chosen, found, strict=True):
                texts[place] = tokenizer.decode(ids, skip_special_tokens=True)
        return texts
