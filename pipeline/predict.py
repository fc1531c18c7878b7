"""Answers the rows of a JSON Lines file, or a folder of pictures, with a merged model, in batches on Ray."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from PIL import Image
from rich.console import Console

from sensmerge.pipeline.execute.batches import Workers, work_in_batches
from sensmerge.pipeline.execute.cluster import cluster
from sensmerge.tasks.artifacts import file_bytes, parse_json, partial_of
from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.dynamic.folder import MANIFEST, check_files, read_manifest
from sensmerge.tasks.dynamic.model import DynamicModel, Prediction
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.questions import (
    MESSAGES,
    TASK,
    TEXT,
    Prompts,
    Question,
    check_question,
    is_plain,
    plain,
    prompts_of,
)
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG
from sensmerge.tasks.networks.endings import WRITING_HEADS
from sensmerge.tasks.networks.generation import Decoding, check_unused
from sensmerge.tasks.networks.pictures import picture_file
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.serving.form import head_names
from sensmerge.tasks.serving.static_model import WRITING_FORMS, StaticModel, checked_form, reads_of

ADDED = tuple(Prediction.__dataclass_fields__)
"""Fields that a row gets: prediction; and expert and coefficients, of a dynamic model."""

_EXPECTED = """expected JSON Lines, an object on every line: {"text": "3 + 4 ="}"""

FILE = "file"
"""Field of a row for a picture in a folder: its path below that."""


class AskedRow(NamedTuple):
    """A row that is to be answered."""

    place: str
    """the file and line where it stands"""
    row: Row
    content: Question
    """what is asked; the file of a picture is read here, for workers see no other file"""


Batch = list[AskedRow]


@dataclass(frozen=True)
class Settings:
    """How the rows of a file are answered."""

    field: str | None
    """field that holds a row's text, messages or picture; None: what the row itself says, see `kinds.questions`"""
    task: str | None
    """task in whose prompt all rows are asked, or, of a static merge, whose head answers them; None for none"""
    batch_size: int
    """rows in a batch"""
    max_new_tokens: int | None
    """length of a continuation at most; None for what the model does of its own accord"""
    decoding: Decoding
    """how continuations are written"""
    workers: Workers


def predict_file(
    folder: Path,
    source: Path,
    target: Path,
    settings: Settings,
    address: str | None,
    console: Console,
) -> int:
    """Write every row of a file with what a model answers, in the order of the file; see `ADDED`.

    A batch is always `batch_size` successive rows, so what is written does not depend on the number of workers. All
    rows are checked before Ray starts; the target appears when it is complete.

    Args:
        folder: the dynamic model or static merge; workers read it under this path.
        source: JSON Lines file, UTF-8; or a folder of pictures, whose rows have a `file`.
        target: file to write; one that exists is replaced.
        settings: how.
        address: as in `pipeline.execute.cluster.connect`.
        console: where progress goes.

    Returns:
        The number of rows.

    Raises:
        InputError: the folder holds no merged model that answers, or is altered, a row cannot be answered, or the
            target not written.
        StepError: a worker failed otherwise.
    """
    is_dynamic = _is_dynamic(folder)
    _check_paths(source, target)
    prompts = _checked_dynamic(folder, settings) if is_dynamic else _checked_static(folder, settings)
    # The head that answers is no prompt.
    asking = settings if is_dynamic else replace(settings, task=None)
    asked, size = _asked(source, folder, asking, prompts), settings.batch_size
    # What a row names is read here too, so that a file that is not there is found now.
    unprompted = [is_plain(asked.content(place, row)) for place, row in asked.places()]
    count = len(unprompted)
    if count == 0:
        raise InputError(f"{source}: has no {'pictures' if source.is_dir() else 'rows; expected JSON Lines'}")
    if is_dynamic:
        check_files(folder, read_manifest(folder))
    if prompts and any(unprompted):
        console.print(_said_of(sum(unprompted), count, prompts), highlight=False, soft_wrap=True)
    device = "cuda" if settings.workers.num_gpus else "cpu"
    load = partial(_load if is_dynamic else _load_static, folder.absolute(), device, settings)
    with _written_whole(target) as file, cluster(address):
        work_in_batches(
            load,
            _batches(asked, size, count),
            ceil(count / size),
            lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            settings.workers,
            console,
        )
    return count


def _said_of(unprompted: int, count: int, prompts: Prompts) -> str:
    return (
        f"{unprompted} of {count} rows are read as plain text, in no prompt: name a task with --task, or in a field "
        f"{TASK!r} ({', '.join(prompts)}), to use the prompt format it was trained on"
    )


def _checked_dynamic(folder: Path, settings: Settings) -> Prompts:
    """Check a dynamic model, but for its large files, and return the prompts that it knows."""
    manifest = read_manifest(folder)
    if manifest.head not in WRITING_HEADS:
        check_unused(settings.max_new_tokens, settings.decoding)
    return prompts_of(manifest.tasks, str(folder / MANIFEST))


def _checked_static(folder: Path, settings: Settings) -> Prompts:
    """Check a static merge, but for its weights; it knows no prompts, for it may be asked in any way."""
    form, heads = checked_form(folder), head_names(folder)
    if form not in WRITING_FORMS:
        check_unused(settings.max_new_tokens, settings.decoding)
    if settings.task not in heads and (settings.task is not None or len(heads) > 1):
        found = "--task is missing" if settings.task is None else f"--task is {settings.task}"
        one_of = f"the one whose head answers: {', '.join(heads)}"
        raise InputError(f"{folder}: {found}; expected {one_of if heads else 'none: a static merge keeps no prompts'}")
    return {}


def _load(folder: Path, device: str, settings: Settings) -> Callable[[Batch], list[Row]]:
    """Return what answers a batch with a dynamic model, whose files `predict_file` has checked."""
    model = DynamicModel.load(folder, device, verify=False)

    def answer(batch: Batch) -> list[Row]:
        places = [one.place for one in batch]
        questions = [one.content for one in batch]
        predictions = model.predict(questions, settings.max_new_tokens, places, settings.decoding)
        return [one.row | asdict(prediction) for one, prediction in zip(batch, predictions, strict=True)]

    return answer


def _load_static(folder: Path, device: str, settings: Settings) -> Callable[[Batch], list[Row]]:
    """Return what answers a batch with a static merge."""
    model = StaticModel.load(folder, device)

    def answer(batch: Batch) -> list[Row]:
        places = [one.place for one in batch]
        questions = [one.content for one in batch]
        found = model.predict(questions, settings.max_new_tokens, settings.task, settings.decoding, places)
        return [one.row | {ADDED[0]: prediction} for one, prediction in zip(batch, found, strict=True)]

    return answer


def _is_dynamic(folder: Path) -> bool:
    """Return whether a folder holds a dynamic model; raises InputError for what is no static merge either."""
    given = "give the folder of a variant, as `run` printed it"
    if folder.parts[:1] == ("models:",):
        raise InputError(
            f"{folder}: is a version in MLflow, and predict takes folders: give the one that `run` printed; "
            "infra/serve.py and MLflow serve versions"
        )
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}; {given}")
    if (folder / MANIFEST).is_file():
        return True
    if not any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise InputError(f"{folder}: has neither {MANIFEST} (a dynamic model) nor {CONFIG} (a static merge); {given}")
    return False


def _check_paths(source: Path, target: Path) -> None:
    if not source.exists():
        raise InputError(f"{source}: no such file; expected JSON Lines, or a folder of pictures")
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file in it")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: folder {target.absolute().parent} does not exist; make it first")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target}: is the input; write to another file")


def _asked(source: Path, model: Path, settings: Settings, prompts: Prompts) -> "_Lines | _Pictures":
    """Return the rows of a file or a folder. Raises InputError for a folder where the model reads texts."""
    base = model / BASE if (model / MANIFEST).is_file() else model
    pictures = reads_of(model, base) == "pictures"
    if settings.task is not None and (pictures or settings.field is not None):
        why = (
            "the model reads pictures, which have no prompt"
            if pictures
            else "its prompt names fields, so leave out --field"
        )
        raise InputError(f"--task is {settings.task}, but {why}")
    if not source.is_dir():
        return _Pixels(source, settings.field or "image") if pictures else _Texts(source, settings, prompts)
    if not pictures:
        raise InputError(f"{source}: is a folder; expected JSON Lines: the model reads texts")
    if settings.field is not None:
        raise InputError(
            f"--field is {settings.field}, but {source} is a folder of pictures, which have no fields; leave it out"
        )
    return _Pictures(source)


@dataclass(frozen=True)
class _Lines(ABC):
    """The rows of a JSON Lines file."""

    path: Path

    def places(self) -> Iterator[tuple[str, Row]]:
        """Yield the rows, checked, each with its place."""
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    place = f"{self.path}: line {number}"
                    row = _row(line, place)
                    self.check(row, place)
                    yield place, row
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error

    @abstractmethod
    def check(self, row: Row, place: str) -> None:
        """Raise InputError for a row that has nothing to ask."""

    @abstractmethod
    def content(self, place: str, row: Row) -> Question:
        """Return what is asked in a row that `check` has passed."""


@dataclass(frozen=True)
class _Texts(_Lines):
    """Rows that are asked in a prompt, in a chat template, or as plain text."""

    settings: Settings
    prompts: Prompts

    def check(self, row: Row, place: str) -> None:
        """See `_Lines`."""
        field = self.settings.field
        if field is None and self.settings.task is None and not {TASK, MESSAGES} & row.keys():
            field = TEXT
        if field is None or isinstance(row.get(field), list):
            check_question(self._question(row), self.prompts, place)
        else:
            _check_field(row, field, place)

    def content(self, place: str, row: Row) -> Question:
        """See `_Lines`."""
        question = self._question(row)
        return plain(question) if is_plain(question) else question

    def _question(self, row: Row) -> dict[str, Any]:
        task, field = self.settings.task, self.settings.field
        if task is not None:
            return row | {TASK: task}
        if field is not None:
            return {MESSAGES if isinstance(row[field], list) else TEXT: row[field]}
        return row


@dataclass(frozen=True)
class _Pixels(_Lines):
    """Rows with a picture: in base64, or its path below the file's folder."""

    field: str

    def check(self, row: Row, place: str) -> None:
        """See `_Lines`."""
        _check_field(row, self.field, place)

    def content(self, place: str, row: Row) -> bytes:
        """Return the file of the picture of a row."""
        return picture_file(row[self.field], self.path.parent, f"{place}: field {self.field!r}")


@dataclass(frozen=True)
class _Pictures:
    """The pictures of a folder and its subfolders, in the order of their paths."""

    path: Path

    def places(self) -> Iterator[tuple[str, Row]]:
        """Yield a row for each picture; raises InputError for another file, but for hidden ones."""
        known = Image.registered_extensions()
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            if file.is_dir() or any(part.startswith(".") for part in name.parts):
                continue
            if file.suffix.lower() not in known:
                raise InputError(f"{file}: is no picture, by its name; expected pictures alone: move it elsewhere")
            yield str(file), {FILE: name.as_posix()}

    def content(self, place: str, row: Row) -> bytes:
        """Return the file of a picture."""
        try:
            return file_bytes(Path(self.path, row[FILE]))
        except OSError as error:
            raise InputError(f"{place}: cannot be read ({error.strerror})") from error


def _row(line: bytes, place: str) -> Row:
    try:
        row = parse_json(line)
        # Python reads NaN, numbers too large and halves of surrogate pairs, which JSON in UTF-8 cannot hold.
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise InputError(f"{place}: is not JSON ({error}); {_EXPECTED}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: is a {type(row).__name__}; {_EXPECTED}")
    for name in ADDED:
        if name in row:
            raise InputError(f"{place}: has a field {name!r} already, which is to be added; rename it")
    return row


def _check_field(row: Row, field: str, place: str) -> None:
    if field not in row:
        raise InputError(
            f"{place}: has no field {field!r} but {', '.join(row) or 'none'}; name the one to answer with --field"
        )
    if not isinstance(row[field], str):
        raise InputError(f"{place}: field {field!r} is a {type(row[field]).__name__}; expected a text")


def _batches(asked: "_Lines | _Pictures", batch_size: int, count: int) -> Iterator[Batch]:
    """Yield the first `count` rows in batches."""
    rows: Iterable[tuple[str, Row]] = islice(asked.places(), count)
    for start in range(0, count, batch_size):
        batch = [AskedRow(place, row, asked.content(place, row)) for place, row in islice(rows, batch_size)]
        if len(batch) < min(batch_size, count - start):
            raise InputError(f"{asked.path}: lost rows while it was read; run again when nothing writes to it")
        yield batch


@contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """Open a file beside the target; when all is written, flush it to disk and rename it into place."""
    partial_path = partial_of(path)
    try:
        try:
            with partial_path.open("w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another file"
        ) from error
