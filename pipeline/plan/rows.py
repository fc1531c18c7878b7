"""The rows of a recipe's tasks: chosen, checked, and kept apart: no sample both calibrates and is scored."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowTask, Sample, Task
from sensmerge.tasks.networks.base import missing_parameters
from sensmerge.tasks.networks.causality import not_causal
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import positions
from sensmerge.tasks.rows.source import DataSource, Row, rows_digest
from sensmerge.tasks.rows.tables import Rows, check_samples, draw_order, load_rows, open_table


@dataclass(frozen=True)
class TaskRows:
    """A task with the rows that the recipe chose for it."""

    task: Task
    calibration: list[Row]
    evaluation: list[Row]
    calibration_tokens: int = 0
    """of all calibration rows"""
    longest_calibration: int = 0
    """tokens of the longest calibration row"""


@dataclass(frozen=True)
class _Reader:
    """Checks the rows of one task and turns them into samples."""

    name: str
    task: RowTask
    expert: Expert
    tokenizer: Any
    routed: bool
    """whether samples are told apart by their prompts"""

    def named(self, rows: list[Row]) -> list[Row]:
        """Return rows with their classes by name where numbers would be those of the expert's own config.

        The expert's head is read in the base's order, as that of merged models is.
        """
        names = self.expert.own_classes
        return [self.task.named(row, names) for row in rows] if names else rows

    def samples(self, split: Literal["calibration", "evaluation"], found: Rows) -> list[Sample]:
        """Return rows as samples. Raises InputError for the first row that does not fit the task or its network."""
        key, label2id = f"tasks.{self.name}.{split}", self.expert.config.label2id
        self.task.check_rows(found.rows, key, label2id, found.places)
        samples = []
        for row, place in zip(found.rows, found.places, strict=True):
            where = f"{key}: {place}"
            sample = self.task.sample(row, self.tokenizer, where, label2id)
            _check_sample(f"tasks.{self.name}", where, self.task, sample, self.expert)
            if self.routed and not sample.has_prompt:
                raise InputError(f"{where}: the prompt has no token that application se can route by; leave it out")
            samples.append(sample)
        return samples


def gather_rows(
    tasks: Mapping[str, Task], experts: Mapping[str, Expert], tokenizer: Any, folder: Path, routed: bool
) -> tuple[dict[str, TaskRows], list[str]]:
    """Choose and check the rows of all tasks.

    Calibration rows are those of `load_rows`. Evaluation rows are drawn in the same order from the rows that no task
    calibrates on: a row is left out if it equals a calibration row of any task, or gives the same sample.

    Args:
        tasks: the recipe's.
        experts: of the tasks, by the same names.
        tokenizer: the one that all models use.
        folder: what the recipe's paths are relative to.
        routed: whether a variant tells samples apart by their prompts.

    Returns:
        The rows by task, and a line about each task that lost evaluation rows to calibration.

    Raises:
        InputError: data that does not fit its task, or no row left to score; it names the recipe's key.
    """
    readers: dict[str, _Reader] = {}
    calibration: dict[str, list[Row]] = {}
    tokens: dict[str, list[int]] = {}
    taken: dict[object, str] = {}
    for name, task in tasks.items():
        _check_kind(name, task, experts[name])
        if not isinstance(task, RowTask):
            continue
        readers[name] = _Reader(name, task, experts[name], tokenizer, routed)
        found = Rows([], [])
        if task.calibration is not None:
            found = load_rows(task.calibration, f"tasks.{name}.calibration", folder)
            found = replace(found, rows=readers[name].named(found.rows))
        samples = readers[name].samples("calibration", found)
        for row, place, sample in zip(found.rows, found.places, samples, strict=True):
            taken |= dict.fromkeys(_marks(row, sample), place)
        calibration[name], tokens[name] = found.rows, [len(sample.input_ids) for sample in samples]
    data: dict[str, TaskRows] = {}
    notes: list[str] = []
    for name, reader in readers.items():
        source = reader.task.evaluation
        rows, lines = _evaluation(reader, source, folder, taken) if source else ([], [])
        notes += lines
        data[name] = TaskRows(reader.task, calibration[name], rows, sum(tokens[name]), max(tokens[name], default=0))
    return {name: data.get(name) or TaskRows(task, [], []) for name, task in tasks.items()}, notes


def _marks(row: Row, sample: Sample) -> tuple[object, object]:
    """Return what two rows must not share: their content, or what a model reads and should answer."""
    return rows_digest([row]), sample.content


def _evaluation(
    reader: _Reader, source: DataSource, folder: Path, taken: Mapping[object, str]
) -> tuple[list[Row], list[str]]:
    """Return the rows to score, and what is to be said of those that were left out."""
    key = f"tasks.{reader.name}.evaluation"
    table = open_table(source, key, folder)
    check_samples(table, source.samples, key)
    order = draw_order(table.total, source.seed) if source.samples else range(table.total)
    wanted = source.samples or table.total
    chosen: dict[int, Row] = {}
    left_out: list[str] = []
    start = 0
    while len(chosen) < wanted and start < len(order):
        drawn = sorted(order[start : start + wanted - len(chosen)])
        start += len(drawn)
        found = Rows(reader.named(table.take(drawn)), [table.place(index) for index in drawn])
        for index, row, place, sample in zip(
            drawn, found.rows, found.places, reader.samples("evaluation", found), strict=True
        ):
            other = next((taken[mark] for mark in _marks(row, sample) if mark in taken), None)
            if other is None:
                chosen[index] = row
            else:
                left_out.append(place if place == other else f"{place} is {other}")
    if not chosen:
        raise InputError(
            f"{key}: no row is left to score: calibration uses the same {len(left_out)} samples: {left_out[0]} …; "
            "give calibration fewer samples, or name other rows"
        )
    if not left_out:
        return _ascending(chosen), []
    asked = "" if len(chosen) == wanted or source.samples is None else f" of the {wanted} asked for"
    return _ascending(chosen), [
        f"{key}: {len(chosen)} rows{asked} are scored; {len(left_out)} left out because calibration uses them too: "
        f"{left_out[0]}{' …' if left_out[1:] else ''}"
    ]


def _ascending(chosen: Mapping[int, Row]) -> list[Row]:
    return [chosen[index] for index in sorted(chosen)]


def _check_kind(name: str, task: Task, expert: Expert) -> None:
    """Check that a task's kind has a meaning for the expert's network."""
    if not task.has_own_head:
        _check_continues(f"tasks.{name}.kind: {task.kind} needs a language model", expert)
    elif not _classifies(expert):
        raise InputError(
            f"tasks.{name}.kind: {task.kind}, but {expert.folder} is a {expert.network}; expected a classifier of "
            "texts (its own, or a LoRA adapter with task_type SEQ_CLS and its head in modules_to_save)"
        )
    task.check_installed(f"tasks.{name}")


def _check_continues(needs: str, expert: Expert) -> None:
    for folder, config in ((expert.base.folder, expert.base.config), (expert.folder, expert.config)):
        reason = not_causal(config)
        if reason:
            raise InputError(
                f"{needs}, but {folder} ({config.model_type}) {reason}; leave the task out, or use kind classification "
                "if the experts are classifiers"
            )
    try:
        lacking = missing_parameters(expert.base, "causal_lm")
    except InputError as error:
        raise InputError(f"{needs}; {error}") from None
    if lacking:
        raise InputError(f"{needs}, but the base lacks {lacking[0]}; expected a base with a language-model head")


def _check_sample(key: str, where: str, task: RowTask, sample: Sample, expert: Expert) -> None:
    """Check that the network takes a sample: its tokens, its length, and a generation where one is asked for."""
    config = expert.config.get_text_config()
    unknown = [token for token in sample.input_ids if token >= config.vocab_size]
    if unknown:
        raise InputError(f"{where}: the tokenizer gives token {unknown[0]}, the model knows {config.vocab_size}")
    generate = task.answer_tokens
    if generate and not sample.has_prompt:
        raise InputError(f"{where}: the prompt has no token to generate from; set {key}.generate: 0")
    length = max(len(sample.input_ids), sample.prompt_tokens + generate)
    limit = positions(expert.config) or length
    if length > limit:
        raise InputError(
            f"{where} takes {length} tokens, generation included; the model takes {limit}; set {key}.max_length lower"
        )


def _classifies(expert: Expert) -> bool:
    return expert.network in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
