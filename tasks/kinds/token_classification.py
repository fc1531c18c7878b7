"""Kind token_classification: every expert has a head of its own that gives each word of a text a class, its tag.

A record holds how many words have a tag (`tags`), how many got the right one (`right`), whether all did
(`exact_match`), and, where classes are tags of entities, the numbers of these: `predicted`, `expected`, and `found`,
which are both. Of a dynamic model it also holds `routed` (0 or 1): whether all tags are right by the head that it chose
itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.checks import is_unicode, whole_number
from sensmerge.tasks.kinds.classification import class_index
from sensmerge.tasks.kinds.entities import are_entity_tags, entities, f1, share
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record, mean
from sensmerge.tasks.networks.tokens import check_words, word_tokens
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IGNORED = -100
"""Class of a token that no loss and no score counts."""


@dataclass(frozen=True)
class TaggedSample(Sample):
    """A text whose tokens have classes."""

    names: tuple[str, ...] = ()
    """of the classes, in the order of their numbers"""


@KINDS.register("token_classification")
class TokenClassificationTask(RowTask):
    """The model has a head of its own for this task that gives each word a tag: that of its first token."""

    head: ClassVar[str] = "token_classification"
    templates: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    reads_answer: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "f1": Metric(("found", "predicted", "expected"), f1),
        "precision": Metric(("found", "predicted"), share),
        "recall": Metric(("found", "expected"), share),
        "accuracy": Metric(("right", "tags"), share),
        "exact_match": Metric(("exact_match",), mean, is_proportion=True),
        "routed_exact_match": Metric(("routed",), mean, is_proportion=True),
    }

    kind: Literal["token_classification"]
    tokens: str = Field("tokens", description="field with the list of the text's words")
    tags: str = Field(
        "tags",
        description="field with the list of their classes, each as its name in the expert's config or as its number",
    )
    metric: Local[Literal["f1", "precision", "recall", "accuracy", "exact_match"]] = Field(
        "f1",
        description="main metric: f1, precision and recall are those of entities (classes O, B-TYPE, I-TYPE, …), "
        "accuracy is that of tags, exact_match the share of texts whose tags are all right",
    )

    def check_config(self, config: "PretrainedConfig", key: str) -> None:
        """See `Task`: entities need names of classes that tell where they begin."""
        names = list(config.id2label.values())
        if config.label2id != {name: number for number, name in config.id2label.items()}:
            raise InputError(
                f"{key}: in the config of the task's expert, label2id is {shown(config.label2id)}, which is not the "
                f"inverse of id2label, {shown(config.id2label)}; repair one of them"
            )
        if self.metric in ("f1", "precision", "recall") and not are_entity_tags(names):
            raise InputError(
                f"{key}.metric is {self.metric}, which is of entities, but the expert's classes are "
                f"{', '.join(names[:5])}{', …' if names[5:] else ''}; expected O, B-TYPE, I-TYPE, …: name them so in "
                "id2label and label2id of its config.json (of an adapter, its base's), or set metric: accuracy"
            )

    def notes(self, key: str, tokenizer: "PreTrainedTokenizerBase", expert: "Path") -> list[str]:
        """See `Task`."""
        check_words(tokenizer, key)
        return []

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: there have to be words, each with a tag that the expert has."""
        words, tags = row[self.tokens], row[self.tags]
        if not isinstance(words, list) or not words or not all(isinstance(one, str) for one in words):
            raise InputError(
                f"{settings}.tokens names field {self.tokens!r}, which in {where} is {shown(words)}; expected a list "
                "of words"
            )
        if not all(map(is_unicode, words)):
            raise InputError(
                f"{settings}.tokens names field {self.tokens!r}, which has half a surrogate pair in {where}; repair "
                "the word, or leave the row out"
            )
        if not isinstance(tags, list) or len(tags) != len(words):
            found = f"a list of {len(tags)}" if isinstance(tags, list) else shown(tags)
            raise InputError(
                f"{settings}.tags names field {self.tags!r}, which in {where} is {found}; expected a list of a tag for "
                f"each of the {len(words)} words"
            )
        for number, tag in enumerate(tags if labels is not None else ()):
            class_index(tag, labels or {}, f"{where}: {self.tags}[{number}]")

    def named(self, row: Row, names: Mapping[int, str]) -> Row:
        """See `RowTask`."""
        tags = row.get(self.tags)
        if not isinstance(tags, list):
            return row
        numbers = [None if tag in names.values() else whole_number(tag) for tag in tags]
        named = [tag if number is None else names.get(number, tag) for tag, number in zip(tags, numbers, strict=True)]
        return row | {self.tags: named}

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the words with the tokenizer's special tokens, cut from the right but for these.

        A word's tag is the class of its first token; words without one (cut, or nothing but white space) do not count.
        """
        assert labels is not None
        ids, places = word_tokens(row[self.tokens], tokenizer, self.max_length)
        classes = [IGNORED] * len(ids)
        for place, tag in zip(places, row[self.tags], strict=True):
            if place is not None:
                classes[place] = class_index(tag, labels, where)
        if set(classes) <= {IGNORED}:
            raise InputError(f"{where}: no word of field {self.tokens!r} has a token; leave the row out")
        names = tuple(sorted(labels, key=labels.__getitem__))
        return TaggedSample({"input_ids": ids}, len(ids), tuple(classes), names)

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the classes of the largest logits of the words' first tokens."""
        from sensmerge.tasks.networks.networks import finite

        assert isinstance(sample, TaggedSample)
        assert isinstance(sample.label, tuple)
        places = [place for place, one in enumerate(sample.label) if one != IGNORED]
        expected = [sample.label[place] for place in places]
        predicted: list[int] = finite(logits[places]).argmax(-1).tolist()
        right = sum(map(int.__eq__, predicted, expected))
        record = {"right": right, "tags": len(places), "exact_match": int(right == len(places))}
        return record | _entity_counts(predicted, expected, sample.names)

    def is_right(self, record: Record) -> bool:
        """See `Task`."""
        return bool(record["exact_match"])

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`: words and tags; records keep how many are right, not which."""
        names = {number: name for name, number in (labels or {}).items()}
        tags = [names.get(class_index(tag, labels or {}, self.tags), "") for tag in row[self.tags]]
        return {
            "prompt": " ".join(row[self.tokens]),
            "expected": " ".join(tags),
            "answer": f"{record['right']} of {record['tags']} tags",
            "right": self.is_right(record),
        }


def _entity_counts(predicted: list[int], expected: list[int], names: tuple[str, ...]) -> dict[str, int]:
    if not are_entity_tags(names):
        return {}
    theirs, ours = (entities([names[one] for one in classes]) for classes in (predicted, expected))
    return {"found": len(theirs & ours), "predicted": len(theirs), "expected": len(ours)}
