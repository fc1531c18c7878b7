"""The contract of a kind of task: a class whose fields are what a recipe says of a task of that kind.

Its methods say what becomes of the task's rows, of what a network answers, and of the records that are left of it.
A module of this room, or of another package, registers its class with `@KINDS.register("NAME")`; nothing else has to
know it. torch is imported where it is used, so that reading a recipe does not wait for it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.checks import NamedField, check_fields
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record, Score, score
from sensmerge.tasks.kinds.templates import template_fields
from sensmerge.tasks.kinds.zero_shot import ZeroShot
from sensmerge.tasks.networks.endings import OWN_HEADS
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.networks.tokens import Inputs, collate
from sensmerge.tasks.registry import Registry
from sensmerge.tasks.rows.source import DataSource, Row
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.strict import Strict

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Labels = Mapping[str, int]
"""the classes of an expert: name → number"""


class Task(Strict):
    """A task of any kind."""

    version: ClassVar[int] = 1
    """counts up whenever equal settings and rows give other samples, losses or records than before"""
    head: ClassVar[str] = "causal_lm"
    """what a network ends in: causal_lm, seq2seq_lm, trunk (no head), or one of `OWN_HEADS`, of every expert's own"""
    reads: ClassVar[Reads] = "texts"
    """what its networks read; what reads its rows is a tokenizer or an image processor accordingly"""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    """by name; the records of a task have those whose fields they hold"""

    kind: str
    batch_size: Local[int] = Field(8, ge=1, description="samples per forward pass; does not change scores")
    metric: Local[str]

    @property
    def has_own_head(self) -> bool:
        """Whether the task's own expert has a head for it: its rows name the expert's classes."""
        return self.head in OWN_HEADS

    @property
    def answer_tokens(self) -> int:
        """How many tokens are generated for each evaluation sample at most; 0 if none are."""
        return 0

    @property
    def has_calibration(self) -> bool:
        """Whether statistics can be taken on rows of the task."""
        return False

    @property
    def has_tuning(self) -> bool:
        """Whether the recipe names rows on which the task scores candidates."""
        return False

    @property
    def is_scored(self) -> bool:
        """Whether models are scored on the task."""
        return True

    @property
    def made_head(self) -> ZeroShot | None:
        """What the head of the task's expert is made of, where it has none."""
        return None

    def check_installed(self, key: str) -> None:
        """Raise InputError if something is missing that the task needs; `key` (`tasks.science`) names it."""

    def check_config(self, config: "PretrainedConfig", key: str) -> None:
        """Raise InputError if the config of the task's expert does not fit; `key` (`tasks.science`) names the task."""

    def notes(self, key: str, tokenizer: "PreTrainedTokenizerBase", expert: Path) -> list[str]:
        """Return what a user should know of how rows are read: a line each.

        Args:
            key: names the task (`tasks.science`).
            tokenizer: that all models share.
            expert: folder of the task's own expert.

        Raises:
            InputError: the tokenizer cannot read such rows.
        """
        return []

    def depends_on(self) -> Mapping[str, Any]:
        """Return what scores depend on beside the task's settings and rows, in a form that `identity` takes."""
        return {}

    def evaluate(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", key: str) -> list[Record]:
        """Return the records of a network on rows that the kind has itself; for kinds that are no `RowTask`."""
        raise NotImplementedError

    def is_right(self, record: Record) -> bool | None:
        """Return whether a record is that of a right answer; None for kinds whose answers are not right or wrong.

        It is asked of kinds whose experts have heads of their own.
        """
        return None

    @classmethod
    def metric_of(cls, name: str, records: Sequence[Record]) -> Metric | None:
        """Return a metric by its name; None where the records (at least one) do not have it."""
        found = cls.metrics.get(name)
        return found if found is not None and set(found.columns) <= records[0].keys() else None

    @classmethod
    def scores(cls, records: Sequence[Record]) -> dict[str, Score]:
        """Return every score that the records (at least one) allow, by its name."""
        found = {name: cls.score_of(name, records) for name in cls.metrics}
        return {name: one for name, one in found.items() if one is not None}

    @classmethod
    def score_of(cls, name: str, records: Sequence[Record]) -> Score | None:
        """Return one of `scores` without the work for the others; None where the records have none."""
        metric = cls.metric_of(name, records)
        return None if metric is None else score(metric, records)

    @classmethod
    def lower_is_better(cls, name: str) -> bool:
        """Return whether a lower value of a metric is better; no metric of another kind is."""
        return name in cls.metrics and not cls.metrics[name].higher_is_better


KINDS: Registry[Task] = Registry("sensmerge.kinds", "sensmerge.tasks.kinds")


class RowTask(Task):
    """A task with rows of its own: the recipe names them, and samples are made of them.

    A kind says which settings name fields of a row, makes the sample of a row, and judges what a network answers.
    """

    templates: ClassVar[tuple[str, ...]] = ("prompt",)
    """settings that are templates of texts"""
    fields: ClassVar[tuple[str, ...]] = ()
    """settings that name a field"""
    answer_setting: ClassVar[str | None] = None
    """the one of them that names the field with the number of the right answer, which records have as `label` beside
    the `prediction`; without such a number in its rows a task can be tuned on by the answers of its own expert"""
    reads_answer: ClassVar[bool] = True
    """whether what a network reads of a calibration row depends on the right answer, beside its loss"""
    asks: ClassVar[tuple[str, ...]] = ()
    """settings that `question` depends on, which merged models keep; none: rows without an answer cannot be asked"""

    calibration: Local[DataSource | None] = Field(
        None, description="rows from which statistics, distances and routes are computed"
    )
    tuning: Local[DataSource | None] = Field(
        None,
        description="rows that variants are tuned on; if left out, the calibration rows, or a half of them that is "
        "held out where a variant is made of these",
    )
    evaluation: Local[DataSource | None] = Field(None, description="rows that every model is scored on")
    max_length: int = Field(512, ge=2, description="maximum length of a sample, in tokens; a longer one is cut")
    batch_size: Local[int] = Field(
        8,
        ge=1,
        description="samples of full length per forward pass in evaluation, and as many tokens of shorter ones; does "
        "not change scores",
    )

    @property
    def has_calibration(self) -> bool:
        """See `Task`."""
        return self.calibration is not None

    @property
    def has_tuning(self) -> bool:
        """See `Task`."""
        return self.tuning is not None

    @property
    def is_scored(self) -> bool:
        """See `Task`."""
        return self.evaluation is not None

    def for_tuning(self) -> Self:
        """Return the task as candidates are scored on it: by the main metric unless that follows the mean loss."""
        return self

    # Rows

    def check_rows(
        self, rows: Sequence[Row], key: str, labels: Labels | None = None, places: Sequence[str] | None = None
    ) -> None:
        """Check the task's settings against its rows, so that no field can make encoding or scoring fail later.

        Args:
            rows: the rows.
            key: where the recipe names them (`tasks.math.calibration`).
            labels: classes of the task's own expert; without them classes are not checked.
            places: where each row stands; None for its number.

        Raises:
            InputError: names setting, row and field.
        """
        settings = key.rpartition(".")[0]
        fields = self.named_fields(settings)
        for number, row in enumerate(rows):
            where = places[number] if places else f"row {number} of {key}"
            check_fields(fields, row, settings, where)
            self.check_row(row, settings, where, labels)

    def named_fields(self, settings: str) -> list[NamedField]:
        """Return every field of a row that the task names; raises InputError for settings that do not fit."""
        found = [NamedField(getattr(self, setting), setting, False) for setting in self.fields]
        for setting in self.templates:
            try:
                found += [NamedField(name, setting, True) for name in template_fields(getattr(self, setting))]
            except InputError as error:
                raise InputError(f"{settings}.{setting}: {error}") from None
        return found

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """Check what only this kind knows of a row that has all fields; see `check_rows`."""

    def complete(self, row: Row, folder: Path | None, settings: str, where: str) -> Row:
        """Return a row with what it names of other files put into it, for workers see no other file.

        Args:
            row: as its data set has it; its fields are not checked yet.
            folder: of the file that it stands in; None where that is not known.
            settings: where the recipe has the task (`tasks.science`).
            where: names the row in messages.

        Raises:
            InputError: names setting, row and field.
        """
        return row

    def named(self, row: Row, names: Mapping[int, str]) -> Row:
        """Return a row with its class by name where it has a number of the expert's own config (`names`)."""
        return row

    def lacks_answer(self, row: Row) -> bool:
        """Return whether a row leaves open what is right, for kinds that have an `answer_setting`."""
        return self.answer_setting is not None and row.get(self.answer_field) is None

    def with_answer(self, row: Row, number: int) -> Row:
        """Return a row with a right answer, for kinds that have an `answer_setting`."""
        return row | {self.answer_field: number}

    @property
    def answer_field(self) -> str:
        """The field with the number of the right answer, for kinds that have an `answer_setting`."""
        assert self.answer_setting is not None
        field: str = getattr(self, self.answer_setting)
        return field

    # Samples

    @abstractmethod
    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return a row with its right answer as a model reads it, at most `max_length` tokens.

        Args:
            row: one that `check_rows` has passed.
            tokenizer: of the model.
            where: names the row in messages.
            labels: classes of the task's own expert.

        Raises:
            InputError: a row that has no sample: without a token to score, say.
        """

    def samples(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> list[Sample]:
        """Return all that a model has to read of a row to be scored on it; see `sample`."""
        return [self.sample(row, tokenizer, where, labels)]

    def calibration_sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return what the loss of a row is taken on; see `sample`."""
        return self.sample(row, tokenizer, where, labels)

    def calibration_batch(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> "dict[str, Tensor]":
        """Return one row as the inputs of a network whose `.loss` is then the row's loss; see `sample`.

        `input_ids` and `attention_mask` are int64 of shape (1, T). `labels` is (1, T) with −100 where the loss does not
        count a token, or the sample's label for a head of the expert's own: (1,), or (1, T) where tokens have classes.
        """
        import torch

        sample = self.calibration_sample(row, tokenizer, where, labels)
        batch = collate([sample.inputs], pad_id=0)
        if sample.label is not None:
            counted = torch.tensor([sample.label])
        else:
            ids, places = batch["input_ids"], list(sample.scored)
            counted = torch.full_like(ids, -100)
            counted[:, places] = ids[:, places]
        return {**batch, "labels": counted}

    # Questions

    def question(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str) -> Inputs:
        """Return what a model reads of a row whose answer nobody knows, for kinds that have `asks`.

        It is the `prompt` of the row's sample, token for token; see `sample`.

        Args:
            row: one that `check_question` has passed.
            tokenizer: of the model.
            where: names the row in messages.
        """
        raise NotImplementedError

    def check_question(self, row: Row, settings: str, where: str) -> None:
        """Check that a row has what is asked; see `check_rows`.

        Raises:
            InputError: names setting, row and field.
        """
        asked = [one for one in self.named_fields(settings) if one.setting.partition("[")[0] in self.asks]
        check_fields(asked, row, settings, where)

    # Answers

    @abstractmethod
    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """Return what counts of a network's logits for one of the `samples`: its record, if it is the only one.

        Logits are (T, vocabulary), padded on the right, or (classes,). Raises InputError if they are not finite.
        """

    def record(self, row: Row, judged: Sequence[Any]) -> Record:
        """Return the record of a row, from what `judge` found in each of its `samples`."""
        (record,) = judged
        found: Record = record
        return found

    def answer_record(self, row: Row, text: str) -> Record:
        """Return what a generated answer adds to a row's record."""
        return {}

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """Return what people read of a row and of what a model answered, by the name of the column; empty if nothing.

        Every row of a task has the same columns. Kinds here have `prompt`, `expected`, `answer`, and `right` where
        answers are right or wrong.

        Args:
            row: as the model was scored on it.
            record: the model's.
            labels: classes of the task's own expert.
        """
        return {}

    def agreement(self, record: Record, own: Record) -> Record:
        """Return a record as if the answer in another, that of the task's own expert, were right (`answer_setting`)."""
        return record | {"label": own["prediction"]}


@dataclass(frozen=True)
class RowSet:
    """Rows of one task, in a file."""

    task: RowTask
    rows: StoredRows
    label2id: Labels | None = None
    """classes of the task's own expert, where that has a head of its own"""
