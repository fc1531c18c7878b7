"""Kind classification: every expert has a classification head of its own.

A record holds `prediction`, the class of the largest logit, and `label`; of a dynamic model also `routed` (0 or 1):
whether the head that it chose itself is right.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.checks import whole_number
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record, agreement, macro_f1, matthews, mean
from sensmerge.tasks.kinds.texts import TextTask
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class ClassTask(RowTask):
    """The model has a classification head of its own for this task, whatever it reads."""

    head: ClassVar[str] = "classification"
    fields: ClassVar[tuple[str, ...]] = ("label",)
    answer_setting: ClassVar[str | None] = "label"
    reads_answer: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric(("label", "prediction"), agreement, is_proportion=True),
        "routed_accuracy": Metric(("routed",), mean, is_proportion=True),
        "macro_f1": Metric(("label", "prediction"), macro_f1),
        "matthews": Metric(("label", "prediction"), matthews),
    }

    label: str = Field("label", description="field with the class, as its name in the expert's config or as its number")
    metric: Local[Literal["accuracy", "macro_f1", "matthews"]] = Field("accuracy", description="main metric")

    def check_config(self, config: "PretrainedConfig", key: str) -> None:
        """See `Task`: of the classes one has to be right."""
        if config.num_labels == 1 or config.problem_type not in (None, "single_label_classification"):
            raise InputError(
                f"{key}.kind: {self.kind}, but the expert's config has num_labels {config.num_labels} and problem_type "
                f"{config.problem_type}; expected two classes or more, of which one is right; use kind regression for "
                "numbers, or leave the task out"
            )

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: the expert has to have the class."""
        if labels is not None:
            class_index(row[self.label], labels, where)

    def named(self, row: Row, names: Mapping[int, str]) -> Row:
        """See `RowTask`."""
        label = row.get(self.label)
        number = None if label in names.values() else whole_number(label)
        return row if number is None else row | {self.label: names.get(number, label)}

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the class of the largest logit."""
        from sensmerge.tasks.networks.networks import finite

        return {"prediction": int(finite(logits).argmax()), "label": sample.label}

    def is_right(self, record: Record) -> bool:
        """See `Task`."""
        return bool(record["prediction"] == record["label"])

    @abstractmethod
    def asked(self, row: Row) -> Mapping[str, str]:
        """Return what a model is given, for people to read."""

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`: classes by name."""
        names = {number: name for name, number in (labels or {}).items()}
        expected, answer = (str(names.get(record[key], record[key])) for key in ("label", "prediction"))
        return {**self.asked(row), "expected": expected, "answer": answer, "right": self.is_right(record)}


@KINDS.register("classification")
class ClassificationTask(ClassTask, TextTask):
    """The model reads a text, or a pair of texts, and has a classification head of its own for this task."""

    kind: Literal["classification"]

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the text or the pair, and its class."""
        assert labels is not None
        inputs = self.question(row, tokenizer, where)
        return Sample(inputs, len(inputs["input_ids"]), class_index(row[self.label], labels, where))

    def asked(self, row: Row) -> Mapping[str, str]:
        """See `ClassTask`: the text or the pair."""
        return self.texts(row)


def class_index(label: Any, label2id: Labels, where: str) -> int:
    """The number of a row's class: by its name in the expert's `label2id`, else by its number, also as decimal text.

    Raises InputError for a number or a name that no class has.
    """
    if isinstance(label, str) and label in label2id:
        return label2id[label]
    index = whole_number(label)
    if index is not None and index in label2id.values():
        return index
    names = ", ".join(f"{index} {name}" for name, index in sorted(label2id.items(), key=lambda item: item[1])[:20])
    raise InputError(f"{where}: label is {label!r}, expected one of the expert's {len(label2id)} classes: {names}")
