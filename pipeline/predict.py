"""Answers the rows of a JSON Lines file with a dynamic model, in batches on Ray."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TextIO

from rich.console import Console

from sensmerge.pipeline.execute.batches import Workers, work_in_batches
from sensmerge.pipeline.execute.cluster import cluster
from sensmerge.tasks.artifacts import parse_json, partial_of
from sensmerge.tasks.dynamic.folder import check_files, read_manifest
from sensmerge.tasks.dynamic.model import DynamicModel, Prediction
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.rows.source import Row

ADDED = tuple(Prediction.__dataclass_fields__)
"""Fields that a row gets: prediction, expert, coefficients."""

Batch = list[tuple[str, Row]]
"""Rows, each with the file and line where it stands."""


@dataclass(frozen=True)
class Settings:
    """How the rows of a file are answered."""

    field: str
    """field that holds a row's text"""
    batch_size: int
    """rows in a batch"""
    max_new_tokens: int
    """length of a continuation at most (language models)"""
    workers: Workers


def predict_file(
    folder: Path,
    source: Path,
    target: Path,
    settings: Settings,
    address: str | None,
    console: Console,
) -> int:
    """Write every row of a file with its prediction, expert and coefficients, in the order of the file.

    A batch is always `batch_size` successive rows, so what is written does not depend on the number of workers. All
    rows are checked before Ray starts; the target appears when it is complete.

    Args:
        folder: the dynamic model; workers read it under this path.
        source: JSON Lines file, UTF-8.
        target: file to write; one that exists is replaced.
        settings: how.
        address: as in `pipeline.execute.cluster.connect`.
        console: where progress goes.

    Returns:
        The number of rows.

    Raises:
        InputError: the folder is no dynamic model or is altered, a row cannot be answered, or the target not written.
        StepError: a worker failed otherwise.
    """
    _check_paths(source, target)
    manifest = read_manifest(folder)
    field, size = settings.field, settings.batch_size
    count = sum(1 for _ in _rows(source, field))
    if count == 0:
        raise InputError(f"{source}: has no rows; expected JSON Lines")
    check_files(folder, manifest)
    device = "cuda" if settings.workers.num_gpus else "cpu"
    load = partial(_load, folder.absolute(), device, field, settings.max_new_tokens)
    with _written_whole(target) as file, cluster(address):
        work_in_batches(
            load,
            _batches(source, field, size, count),
            ceil(count / size),
            lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            settings.workers,
            console,
        )
    return count


def _load(folder: Path, device: str, field: str, max_new_tokens: int) -> Callable[[Batch], list[Row]]:
    """Return what answers a batch with the model, whose files `predict_file` has checked."""
    model = DynamicModel.load(folder, device, verify=False)

    def answer(batch: Batch) -> list[Row]:
        places, texts = [place for place, _ in batch], [row[field] for _, row in batch]
        predictions = model.predict(texts, max_new_tokens, places)
        return [row | asdict(prediction) for (_, row), prediction in zip(batch, predictions, strict=True)]

    return answer


def _check_paths(source: Path, target: Path) -> None:
    if not source.is_file():
        raise InputError(f"{source}: no such file; expected JSON Lines")
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file in it")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: folder {target.absolute().parent} does not exist; make it first")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target}: is the input; write to another file")


def _rows(path: Path, field: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, checked, each with its place."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}: line {number}"
                yield place, _row(line, field, place)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _row(line: bytes, field: str, place: str) -> Row:
    try:
        row = parse_json(line)
        # Python reads NaN, numbers too large and halves of surrogate pairs, which JSON in UTF-8 cannot hold.
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise InputError(f"{place}: is not JSON ({error}); expected an object on every line") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: is a {type(row).__name__}; expected an object")
    if field not in row:
        raise InputError(
            f"{place}: has no field {field!r} but {', '.join(row) or 'none'}; name the text's with --field"
        )
    if not isinstance(row[field], str):
        raise InputError(f"{place}: field {field!r} is a {type(row[field]).__name__}; expected a text")
    for name in ADDED:
        if name in row:
            raise InputError(f"{place}: has a field {name!r} already, which is to be added; rename it")
    return row


def _batches(path: Path, field: str, batch_size: int, count: int) -> Iterator[Batch]:
    """Yield the first `count` rows of a file in batches."""
    rows: Iterable[tuple[str, Row]] = islice(_rows(path, field), count)
    for start in range(0, count, batch_size):
        batch = list(islice(rows, batch_size))
        if len(batch) < min(batch_size, count - start):
            raise InputError(f"{path}: lost rows while it was read; run again when nothing writes to it")
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
