"""Calibration and evaluation data: what a recipe says of a task, what its rows must hold, and rows as tokens.

torch is imported where it is used, so that reading a recipe does not wait for it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.tokens import class_tokens, tokens
from sensmerge.tasks.rows.source import DataSource, Row
from sensmerge.tasks.strict import Strict

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Prompted(Strict):
    """Settings that all kinds of task with rows of their own share."""

    calibration: DataSource | None = Field(None, description="rows that sensitivity and cross-task logits are taken on")
    evaluation: DataSource | None = Field(None, description="rows that every model is scored on")
    max_length: int = Field(512, ge=2, description="a sample is cut to this many tokens")
    batch_size: int = Field(8, ge=1, description="samples per forward pass in evaluation; it changes no score")


class CompletionTask(Prompted):
    """The model continues a prompt; scored on the tokens of the expected completion."""

    kind: Literal["completion"]
    prompt: str = Field("{prompt}", description="template of the prompt; {field} is a field of the row")
    completion: str = Field("{completion}", description="template of the expected completion")
    end_token: bool = Field(True, description="append the tokenizer's end token to the completion")
    loss_on: Literal["completion", "all"] = Field("completion", description="tokens that calibration losses count")
    generate: int = Field(0, ge=0, description="longest greedy generation for exact match, in tokens; 0: no generation")
    answer: str | None = Field(
        None, description="regular expression whose last match (group 1 if it has one) is compared in exact match"
    )
    metric: Literal["token_accuracy", "perplexity", "exact_match"] = Field("token_accuracy", description="main metric")


class ClassificationTask(Prompted):
    """The model has a classification head of its own for this task."""

    kind: Literal["classification"]
    prompt: str = Field("{text}", description="template of the text to classify")
    label: str = Field("label", description="field with the class: its name in the expert's config, or its number")
    metric: Literal["accuracy", "macro_f1", "matthews"] = Field("accuracy", description="main metric")


class MultipleChoiceTask(Prompted):
    """The model ranks choices by their likelihood per character after the prompt."""

    kind: Literal["multiple_choice"]
    prompt: str = Field("{prompt}", description="template of the question")
    completion: str = Field(" {choice}", description="template of one choice, {choice} being its text")
    choices: str = Field("choices", description="field with the list of choices")
    answer: str = Field("answer", description="field with the index of the right choice")
    loss_on: Literal["completion", "all"] = Field("completion", description="tokens that calibration losses count")
    metric: Literal["accuracy"] = Field("accuracy", description="main metric")


class LmEvalTask(Strict):
    """Tasks of EleutherAI's lm-evaluation-harness (needs the extra `lm-eval`)."""

    kind: Literal["lm_eval"]
    names: list[str] = Field(min_length=1, description="task names as lm-eval lists them")
    limit: int | None = Field(None, ge=1, description="samples per lm-eval task; all if left out")
    batch_size: int = Field(8, ge=1, description="samples per forward pass; it changes no score")
    metric: str = Field("acc", description="main metric, one that the named tasks report")


RowTask = CompletionTask | ClassificationTask | MultipleChoiceTask
"""A task with rows of its own."""

Task = Annotated[
    CompletionTask | ClassificationTask | MultipleChoiceTask | LmEvalTask,
    Field(discriminator="kind"),
]


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSet:
    """Rows of one task."""

    task: RowTask
    rows: list[Row]
    label2id: Mapping[str, int] | None = None
    """classes of the task's own expert (classification)"""


# Templates -----------------------------------------------------------------------------------------------------------


def template_fields(template: str) -> list[str]:
    """Names of the fields in a template, in order.

    A template is text with `{field}` as in `str.format`, but only plain names: no attribute, index, conversion or
    format, so a template cannot reach beyond the row. `{{` and `}}` are braces. Raises InputError for anything else.
    """
    return [field for _, field in _parts(template) if field is not None]


def render(template: str, row: Mapping[str, Any]) -> str:
    """The template with its fields replaced by the row's texts and whole numbers (see `check_rows`)."""
    return "".join(text + ("" if field is None else str(row[field])) for text, field in _parts(template))


def _parts(template: str) -> list[tuple[str, str | None]]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write a brace of the text twice") from None
    for _, field, form, conversion in parts:
        if field is not None and (not field or set(field) & set(".[]") or form or conversion):
            raise InputError(f"template {template!r}: only plain {{field}} is allowed; write a brace of the text twice")
    return [(text, field) for text, field, _, _ in parts]


# Checks --------------------------------------------------------------------------------------------------------------


def check_rows(
    task: Task,
    rows: list[Row],
    key: str,
    label2id: Mapping[str, int] | None = None,
    places: Sequence[str] | None = None,
) -> None:
    """Check a task's settings against its rows, so that encoding and scoring cannot fail on a field later.

    `key` is where the recipe names the rows (`tasks.math.calibration`). `label2id` is that of the expert's config;
    without it classes are not checked. `places` says where each row stands; None for its number. Raises InputError,
    which names setting, row and field.
    """
    if isinstance(task, LmEvalTask):
        return
    settings = key.rpartition(".")[0]
    fields = _named_fields(task, settings)
    for i, row in enumerate(rows):
        where = places[i] if places else f"row {i} of {key}"
        for field, setting in fields:
            named = f"{settings}.{setting} names field {field!r}"
            if field not in row:
                raise InputError(f"{named}, {where} has {', '.join(map(repr, row)) or 'no field'}")
            if row[field] is None:
                raise InputError(f"{named}, which is null in {where}; leave the row out, or write a text")
            if setting in ("prompt", "completion") and not _is_text(row[field]):
                raise InputError(
                    f"{named}, which is {_kind_of(row[field])} in {where}; expected a text or a whole number: "
                    "write it into the row as the text that the model is to read"
                )
            if isinstance(row[field], str) and not _is_unicode(row[field]):
                raise InputError(
                    f"{named}, which has half a surrogate pair in {where}; repair the text, or leave it out"
                )
        match task:
            case CompletionTask(answer=str(pattern)):
                try:
                    found_answer = find_answer(pattern, render(task.completion, row))
                except re.error as error:
                    raise InputError(f"{settings}.answer: {pattern!r} is not a regular expression: {error}") from None
                if found_answer is None:
                    raise InputError(f"{settings}.answer: {pattern!r} matches nothing in the completion of {where}")
            case ClassificationTask() if label2id is not None:
                class_index(row[task.label], label2id, where)
            case MultipleChoiceTask():
                _check_choices(row[task.choices], row[task.answer], where)


def _named_fields(
    task: CompletionTask | ClassificationTask | MultipleChoiceTask, settings: str
) -> list[tuple[str, str]]:
    """Every field of a row that the task names, with the setting that names it; checks the settings themselves."""
    templates, fields = {"prompt": task.prompt}, []
    match task:
        case CompletionTask():
            templates["completion"] = task.completion
            if task.metric == "exact_match" and not task.generate:
                raise InputError(f"{settings}.metric is exact_match, set {settings}.generate to a number of tokens")
        case ClassificationTask():
            fields = [(task.label, "label")]
        case MultipleChoiceTask():
            templates["completion"] = task.completion
            fields = [(task.choices, "choices"), (task.answer, "answer")]
    for setting, template in templates.items():
        try:
            fields += [(field, setting) for field in template_fields(template)]
        except InputError as error:
            raise InputError(f"{settings}.{setting}: {error}") from None
    if isinstance(task, CompletionTask | ClassificationTask):
        return fields
    if ("choice", "completion") not in fields:
        raise InputError(f"{settings}.completion is {task.completion!r}, expected a template that names {{choice}}")
    return [named for named in fields if named != ("choice", "completion")]


def _is_text(value: Any) -> bool:
    """Whether a value has one text that a model can read: JSON's `true` is not Python's `True`."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    """Whether a text has none of the halves of characters that JSON can spell and no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    names = {dict: "an object", list: "a list", float: f"the number {value!r} without a text of its own"}
    return names.get(type(value), f"a {type(value).__name__} ({value})")


def _check_choices(choices: Any, answer: Any, where: str) -> None:
    if (
        not isinstance(choices, list)
        or not choices
        or not all(_is_text(one) and str(one) and _is_unicode(str(one)) for one in choices)
    ):
        raise InputError(f"{where}: choices are {choices!r}, expected a list of texts that are not empty")
    if whole_number(answer) not in range(len(choices)):
        raise InputError(f"{where}: answer is {answer!r}, expected the index of a choice, 0 to {len(choices) - 1}")


def whole_number(value: Any) -> int | None:
    """A number of a class or a choice, given as such or as its decimal text (all that a CSV file has); else None."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 10 and str(int(value)) == value:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def class_index(label: Any, label2id: Mapping[str, int], where: str) -> int:
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


def find_answer(pattern: str, text: str) -> str | None:
    """The last match of a regular expression, its group 1 if it has one, without surrounding space; None if none."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return (matches[-1][1 if matches[-1].re.groups else 0] or "").strip()


# Rows as tokens ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A row in tokens."""

    input_ids: list[int]
    """The whole text, special tokens included."""
    prompt_tokens: int
    """How many leading tokens are context: they are read, not scored."""
    label: int | None = None
    """The class, for classification."""

    @property
    def scored_from(self) -> int:
        """Index of the first scored token; never 0, because nothing predicts the first token of a text."""
        return max(self.prompt_tokens, 1)


def encode(
    task: CompletionTask | ClassificationTask | MultipleChoiceTask,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    label2id: Mapping[str, int] | None = None,
) -> Sample:
    """A row as the tokens that models are scored on, at most `task.max_length` of them.

    completion: prompt and completion are tokenised apart and joined, so the boundary is the same whatever follows. The
    tokenizer's begin tokens stand in front only, its end token stands at the end if `end_token`; a text that has them
    gets no second ones. Of a text that is too long, the prompt loses its beginning, down to half of `max_length`,
    before the completion loses its end.
    multiple_choice: the same with the right choice and no end token (see `encode_choices`).
    classification: the text with the tokenizer's special tokens, cut from the right but for the special tokens.

    `where` names the row in messages; `label2id` is that of the expert's config, which classification needs. Raises
    InputError: a completion without a token, an end token the tokenizer does not have, a class the
    expert does not have.
    """
    match task:
        case ClassificationTask():
            assert label2id is not None
            ids = class_tokens(render(task.prompt, row), tokenizer, task.max_length)
            if not ids:
                raise InputError(f"{where}: the text to classify has no token; leave the row out")
            return Sample(ids, len(ids), class_index(row[task.label], label2id, where))
        case MultipleChoiceTask():
            return encode_choices(task, row, tokenizer, where)[int(row[task.answer])]
    prompt = tokens(render(task.prompt, row), tokenizer, front=True)
    completion = _ended(tokens(render(task.completion, row), tokenizer, front=False), task, tokenizer)
    prompt = prompt[-max(task.max_length - len(completion), task.max_length // 2) :]
    sample = Sample((prompt + completion)[: task.max_length], len(prompt))
    if len(sample.input_ids) <= sample.scored_from:
        raise InputError(f"{where}: the completion has no token to score; leave the row out")
    return sample


def encode_choices(
    task: MultipleChoiceTask, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str
) -> list[Sample]:
    """One sample per choice: prompt and choice tokenised apart and joined.

    Cut from the left, as lm-eval does: choices are compared by their likelihood, so each must be whole.
    Raises InputError if a choice alone does not fit `max_length`.
    """
    prompt = tokens(render(task.prompt, row), tokenizer, front=True)
    samples = []
    for choice in row[task.choices]:
        completion = tokens(render(task.completion, row | {"choice": choice}), tokenizer, front=False)
        ids = (prompt + completion)[-task.max_length :]
        sample = Sample(ids, len(ids) - len(completion))
        if not completion or sample.prompt_tokens < 1:
            raise InputError(
                f"{where}: choice {choice!r} needs 1 to {task.max_length - 1} tokens after a prompt of at least one, "
                f"it has {len(completion)} after {len(prompt)}; raise max_length or leave the row out"
            )
        samples.append(sample)
    return samples


def calibration_batch(
    task: CompletionTask | ClassificationTask | MultipleChoiceTask,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    label2id: Mapping[str, int] | None = None,
) -> "dict[str, Tensor]":
    """One row as the inputs of a network whose `.loss` is then the row's loss.

    `input_ids` and `attention_mask` are int64 of shape (1, T). `labels` is (1, T) with −100 where the loss does not
    count a token, or (1,) with the class for classification.

    With `loss_on: all` the joined text is tokenised as one, as when a model reads plain text; tokens then need not be
    those of `encode` at the boundary of prompt and completion. Raises InputError as `encode` does.
    """
    import torch

    if isinstance(task, ClassificationTask) or task.loss_on == "completion":
        sample = encode(task, row, tokenizer, where, label2id)
    else:
        sample = Sample(_whole_text(task, row, tokenizer), 0)
        if len(sample.input_ids) < 2:
            raise InputError(f"{where}: a text of {len(sample.input_ids)} tokens has no loss; leave the row out")
    ids = torch.tensor([sample.input_ids])
    if sample.label is not None:
        labels = torch.tensor([sample.label])
    else:
        labels = ids.clone()
        labels[:, : sample.prompt_tokens] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _whole_text(task: CompletionTask | MultipleChoiceTask, row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Prompt and completion (or right choice) tokenised as one text; cut on the side that `encode` cuts."""
    if isinstance(task, CompletionTask):
        text = render(task.prompt, row) + render(task.completion, row)
        return _ended(tokens(text, tokenizer, front=True), task, tokenizer)[: task.max_length]
    choice = {"choice": row[task.choices][int(row[task.answer])]}
    text = render(task.prompt, row) + render(task.completion, row | choice)
    return tokens(text, tokenizer, front=True)[-task.max_length :]


def _ended(ids: list[int], task: CompletionTask, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids with the end token once, if the task wants it."""
    if not task.end_token:
        return ids
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token: set end_token: false in the task")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
