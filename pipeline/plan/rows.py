"""The rows of a recipe's tasks: chosen, checked, and kept apart: no sample both calibrates and is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sensmerge.pipeline.plan.pixels import check_pictures, positions_of
from sensmerge.pipeline.plan.step import Split
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowTask, Task
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import positions
from sensmerge.tasks.rows.source import DataSource, Row, rows_digest
from sensmerge.tasks.rows.tables import Rows, check_samples, draw_order, load_rows, open_table

Tuning = Literal["none", "on_calibration", "apart"]
"""What is tuned: nothing; only variants that read no calibration rows, so that they can be tuned on these; also others,
for which some of these rows are held out."""


@dataclass(frozen=True)
class RowUse:
    """What a recipe does with rows, as far as it says which rows will do."""

    routed: bool
    """whether a variant tells samples apart by their prompts"""
    tuned: Tuning
    """what is tuned on calibration rows where a task names no others"""
    losses: str | None
    """what takes losses on calibration rows, in words; where nothing does, these may lack their answers"""


@dataclass(frozen=True)
class TaskRows:
    """A task with the rows that the recipe chose for it."""

    task: Task
    calibration: list[Row]
    evaluation: list[Row]
    tuning: list[Row] = field(default_factory=list)
    """by which variants are chosen that are not made of calibration rows"""
    held_out: list[Row] = field(default_factory=list)
    """by which variants are chosen that are: none of these calibrate"""
    calibration_tokens: int = 0
    """of all calibration rows"""
    longest_calibration: int = 0
    """tokens of the longest calibration row"""
    unanswered: bool = False
    """whether the tuning rows leave open what is right; their answers are then of no meaning"""


class _Chosen(NamedTuple):
    """A row that a split of a task has."""

    row: Row
    place: str
    sample: Sample
    marks: tuple[object, ...]
    """what no other row may share: its content, and what a model reads and should answer"""
    unanswered: bool
    """whether it leaves open what is right"""
    tokens: int
    """that a model has of it, those of a picture estimated"""


@dataclass(frozen=True)
class _Reader:
    """Checks the rows of one task and turns them into samples."""

    name: str
    task: RowTask
    expert: Expert
    tokenizers: Sequence[Any]
    """all that read the task; samples are those of the first"""
    use: RowUse

    def _may_lack_answers(self, split: Split) -> bool:
        """Return whether rows of a split need not say what is right."""
        return split == "tuning" or (split == "calibration" and self.use.losses is None and not self.task.reads_answer)

    def _check_answers(self, split: Split, found: Rows) -> None:
        """Say why calibration rows need an answer, where other recipes could do without."""
        if split == "calibration" and self.use.losses is not None and not self.task.reads_answer:
            for row, place in zip(found.rows, found.places, strict=True):
                if self.task.lacks_answer(row):
                    raise InputError(
                        f"tasks.{self.name}.{split}: {place} has no {self.task.answer_field}, and "
                        f"{self.use.losses} needs the loss on it; add it, or leave the variant out"
                    )

    def _named(self, rows: list[Row]) -> list[Row]:
        """Return rows with their classes by name where numbers would be those of the expert's own config.

        The expert's head is read in the base's order, as that of merged models is.
        """
        names = self.expert.own_classes
        return [self.task.named(row, names) for row in rows] if names else rows

    def _complete(self, key: str, found: Rows) -> list[Row]:
        """Return rows with what they name of other files put into them."""
        each = zip(found.rows, found.folders, found.places, strict=True)
        return [self.task.complete(row, folder, f"tasks.{self.name}", f"{key}: {place}") for row, folder, place in each]

    def read(self, split: Split, found: Rows) -> list[_Chosen]:
        """Return rows with their samples. Raises InputError for the first that does not fit the task or its network."""
        key, label2id = f"tasks.{self.name}.{split}", self.expert.config.label2id
        found = replace(found, rows=self._complete(key, found))
        self._check_answers(split, found)
        lacking = [self._may_lack_answers(split) and self.task.lacks_answer(row) for row in found.rows]
        rows = [self.task.with_answer(row, 0) if lacks else row for row, lacks in zip(found.rows, lacking, strict=True)]
        found = replace(found, rows=self._named(rows))
        self.task.check_rows(found.rows, key, label2id, found.places)
        chosen = []
        samples = self._samples(found, key)
        for row, place, unanswered, (sample, *others) in zip(found.rows, found.places, lacking, samples, strict=True):
            where = f"{key}: {place}"
            for one in (sample, *others):
                _check_sample(f"tasks.{self.name}", where, self.task, one, self.expert)
                if self.use.routed and not one.has_prompt:
                    raise InputError(f"{where}: the prompt has no token that application se can route by; leave it out")
            contents = [sample.content]
            if unanswered:  # whatever the right answer of an equal row is
                every = self.task.samples(row, self.tokenizers[0], where, label2id)
                contents = [replace(one, label=label).content for one in every for label in (None, *label2id.values())]
            tokens = len(sample.tokens) or positions_of(sample, self.expert)
            chosen.append(_Chosen(row, place, sample, (rows_digest([row]), *contents), unanswered, tokens))
        return chosen

    def _samples(self, found: Rows, key: str) -> list[list[Sample]]:
        """Return the samples of rows, each by every reader."""
        label2id = self.expert.config.label2id
        samples = [
            [self.task.sample(row, one, f"{key}: {place}", label2id) for one in self.tokenizers]
            for row, place in zip(found.rows, found.places, strict=True)
        ]
        check_pictures(key, found.places, [sample for sample, *_ in samples], self.expert)
        return samples


def gather_rows(
    tasks: Mapping[str, Task],
    experts: Mapping[str, Expert],
    tokenizers: Mapping[str, Sequence[Any]],
    folder: Path,
    use: RowUse,
) -> tuple[dict[str, TaskRows], list[str]]:
    """Choose and check the rows of all tasks.

    Calibration rows are those of `load_rows`. Tuning rows are drawn in the same order from the rows that no task
    calibrates on, evaluation rows from those that no task calibrates or tunes on: a row is left out if it equals such a
    row of any task, or gives the same sample. A task without tuning rows of its own tunes on its calibration rows.
    Where variants that are made of these are tuned, half of them, drawn at random, is held out.

    Args:
        tasks: the recipe's.
        experts: of the tasks, by the same names; `check_kinds` has passed them.
        tokenizers: those that read a task, by its name; samples are those of the first, and the last is merged models'.
        folder: what the recipe's paths are relative to.
        use: what the recipe does with them.

    Returns:
        The rows by task, and lines about them: which tune, and of each task that lost rows to calibration.

    Raises:
        InputError: data that does not fit its task, or no row left to score; it names the recipe's key.
    """
    readers: dict[str, _Reader] = {}
    notes = []
    for name, task in tasks.items():
        notes += task.notes(f"tasks.{name}", tokenizers[name][-1], experts[name].folder)
        if isinstance(task, RowTask):
            readers[name] = _Reader(name, task, experts[name], tokenizers[name], use)
    calibration = {name: _calibration(reader, folder) for name, reader in readers.items()}
    taken = _places(calibration)
    for name, rows in calibration.items():
        tuned_on = use.tuned if readers[name].task.tuning is None else "none"
        notes += _answers(readers[name], "calibration", rows, tuned_on)
    tuning, held_out, said = _to_tune_on(readers, calibration, use.tuned, folder)
    notes += said
    taken = _places(tuning) | taken
    named = any(reader.task.tuning for reader in readers.values())
    users = "calibration or tuning uses" if named else "calibration uses"
    data: dict[str, TaskRows] = {}
    for name, reader in readers.items():
        evaluation, said = _apart(reader, "evaluation", folder, taken, users)
        notes += said
        data[name] = _task_rows(reader.task, calibration[name], evaluation, tuning[name], held_out[name])
    return {name: data.get(name) or TaskRows(task, [], []) for name, task in tasks.items()}, notes


def _to_tune_on(
    readers: Mapping[str, _Reader], calibration: dict[str, list[_Chosen]], tuned: Tuning, folder: Path
) -> tuple[dict[str, list[_Chosen]], dict[str, list[_Chosen]], list[str]]:
    """Return the rows to tune on by task, those held out, and lines about them; arguments as in `gather_rows`.

    What is held out is taken out of `calibration`.
    """
    taken, notes = _places(calibration), list[str]()
    tuning: dict[str, list[_Chosen]] = {}
    held_out: dict[str, list[_Chosen]] = {}
    halves = {
        name: _halves(calibration[name])
        for name, reader in readers.items()
        if tuned == "apart" and reader.task.tuning is None
    }
    kept = _places(calibration | {name: half for name, (half, _) in halves.items()})
    for name, reader in readers.items():
        if reader.task.tuning is not None:
            tuning[name], said = _apart(reader, "tuning", folder, taken)
            held_out[name] = tuning[name]
            said += _answers(reader, "tuning", tuning[name])
        else:
            tuning[name] = calibration[name] if tuned != "none" else []
            if name in halves and calibration[name]:
                calibration[name], held_out[name], said = _held_out(name, *halves[name], kept)
            else:
                held_out[name], said = [], _tuned_on(name, calibration[name], tuned)
        notes += said
    return tuning, held_out, notes


def _task_rows(
    task: Task, calibration: list[_Chosen], evaluation: list[_Chosen], tuning: list[_Chosen], held_out: list[_Chosen]
) -> TaskRows:
    tokens = [one.tokens for one in calibration]
    return TaskRows(
        task,
        calibration=[one.row for one in calibration],
        evaluation=[one.row for one in evaluation],
        tuning=[one.row for one in tuning],
        held_out=[one.row for one in held_out],
        calibration_tokens=sum(tokens),
        longest_calibration=max(tokens, default=0),
        unanswered=any(one.unanswered for one in tuning),
    )


def _answers(reader: _Reader, split: Split, rows: list[_Chosen], tuned: Tuning = "none") -> list[str]:
    """Return what is to be said of rows that leave open what is right.

    Raises:
        InputError: only some of them do.
    """
    lacking = [one.place for one in rows if one.unanswered]
    given = next((one.place for one in rows if not one.unanswered), None)
    if not lacking:
        return []
    key, answer = f"tasks.{reader.name}.{split}", reader.task.answer_field
    if given is not None:
        raise InputError(f"{key}: {lacking[0]} has no {answer}, {given} has one; give it to all rows, or to none")
    if split == "calibration" and tuned == "none":
        return [f"{key}: its rows have no {answer}; no variant needs one there"]
    return [f"{key}: its rows have no {answer}, so what experts.{reader.name} answers counts as right"]


def _calibration(reader: _Reader, folder: Path) -> list[_Chosen]:
    source, key = reader.task.calibration, f"tasks.{reader.name}.calibration"
    return [] if source is None else reader.read("calibration", load_rows(source, key, folder))


def _places(chosen: Mapping[str, list[_Chosen]]) -> dict[object, str]:
    """Return the place of every row by what no other may share with it."""
    return {mark: one.place for rows in chosen.values() for one in rows for mark in one.marks}


def _halves(every: list[_Chosen]) -> tuple[list[_Chosen], list[_Chosen]]:
    """Return rows in two halves, drawn at random, each in the rows' order; the first has one more if it must.

    Not every second one: in a file with the classes in turn, each half would have its own.
    """
    second = set(draw_order(len(every), 0)[: len(every) // 2])
    places = range(len(every))
    return [every[i] for i in places if i not in second], [every[i] for i in places if i in second]


def _tuned_on(name: str, every: list[_Chosen], tuned: Tuning) -> list[str]:
    """Say that variants are tuned on all calibration rows of a task, if they are."""
    if tuned != "on_calibration" or not every:
        return []
    return [f"tasks.{name}.calibration: variants are tuned on its {len(every)} rows"]


def _held_out(
    name: str, kept: list[_Chosen], others: list[_Chosen], taken: Mapping[object, str]
) -> tuple[list[_Chosen], list[_Chosen], list[str]]:
    """Return the calibration rows that still calibrate, those that are held out, and what is to be said of them.

    Args:
        name: of the task.
        kept: the half that calibrates.
        others: the other half; what any task calibrates on is in neither.
        taken: marks of all rows that calibrate.
    """
    key = f"tasks.{name}.calibration"
    held_out = [one for one in others if taken.keys().isdisjoint(one.marks)]
    if not held_out:
        raise InputError(
            f"{key}: of {len(kept) + len(others)} rows none can be held out to tune variants on; give it more samples, "
            f"or name rows in tasks.{name}.tuning"
        )
    said = f"{key}: {len(held_out)} of its rows are held out to tune variants on; the other {len(kept)} calibrate"
    return kept, held_out, [said]


def _apart(
    reader: _Reader,
    split: Literal["tuning", "evaluation"],
    folder: Path,
    taken: Mapping[object, str],
    users: str = "calibration uses",
) -> tuple[list[_Chosen], list[str]]:
    """Return the rows of a split that are not taken, and what is to be said of those that were left out.

    Args:
        reader: of the task.
        split: which.
        folder: what the recipe's paths are relative to.
        taken: the place of each row that is taken, by what no other row may share with it.
        users: who has taken them, for messages.
    """
    source: DataSource | None = getattr(reader.task, split)
    if source is None:
        return [], []
    key = f"tasks.{reader.name}.{split}"
    table = open_table(source, key, folder)
    check_samples(table, source.samples, key)
    order = draw_order(table.total, source.seed) if source.samples else range(table.total)
    wanted = source.samples or table.total
    chosen: dict[int, _Chosen] = {}
    left_out: list[str] = []
    start = 0
    while len(chosen) < wanted and start < len(order):
        drawn = sorted(order[start : start + wanted - len(chosen)])
        start += len(drawn)
        for index, one in zip(drawn, reader.read(split, table.rows(drawn)), strict=True):
            other = next((taken[mark] for mark in one.marks if mark in taken), None)
            if other is None:
                chosen[index] = one
            else:
                left_out.append(one.place if one.place == other else f"{one.place} is {other}")
    use, used = ("tune on", "tuned on") if split == "tuning" else ("score", "scored")
    if not chosen:
        raise InputError(
            f"{key}: no row is left to {use}: {users} the same {len(left_out)} samples: {left_out[0]} …; "
            "give calibration fewer samples, or name other rows"
        )
    rows = [chosen[index] for index in sorted(chosen)]
    if not left_out:
        return rows, []
    asked = "" if len(chosen) == wanted or source.samples is None else f" of the {wanted} asked for"
    return rows, [
        f"{key}: {len(chosen)} rows{asked} are {used}; {len(left_out)} left out because {users} them too: "
        f"{left_out[0]}{' …' if left_out[1:] else ''}"
    ]


def _check_sample(key: str, where: str, task: RowTask, sample: Sample, expert: Expert) -> None:
    """Check that the network takes a sample: its tokens, its length, and a generation where one is asked for."""
    config = expert.config.get_text_config()
    known = getattr(config, "vocab_size", None)  # Canine hashes what others look up
    unknown = [token for token in sample.tokens if known is not None and token >= known]
    if unknown:
        raise InputError(f"{where}: the tokenizer gives token {unknown[0]}, the model knows {known}")
    looks = task.head == "classification" and expert.config.is_encoder_decoder
    if looks and config.eos_token_id not in sample.input_ids:
        raise InputError(
            f"{where}: the tokenizer gives no token {config.eos_token_id}, at which the head of {expert.network} "
            "looks; expected one that ends every text with it"
        )
    generate = task.answer_tokens
    if generate and not sample.has_prompt:
        raise InputError(f"{where}: the prompt has no token to generate from; set {key}.generate: 0")
    length = sample.positions(generate)
    limit = positions(expert.config) or length
    if length > limit:
        raise InputError(
            f"{where} takes {length} tokens, generation included; the model takes {limit}; set {key}.max_length lower"
        )
