"""The rows that a recipe names, found and chosen.

`datasets` is imported where it is used: files of rows are read without it.
"""

import base64
import glob
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import file_bytes
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.rows.files import read_rows
from sensmerge.tasks.rows.source import DataSource, Row

TEXT_FORMATS = ("csv", "json")
"""File formats whose rows are read here, so that values stay the text of the file."""


@dataclass(frozen=True)
class Table:
    """All rows that a source has."""

    what: str
    """what it is called in messages"""
    total: int
    take: Callable[[Sequence[int]], list[Row]]
    """returns the rows of some indices, in their order"""
    place: Callable[[int], str]
    """returns where the row of an index stands"""
    folder: Callable[[int], Path | None] = lambda _: None
    """returns the folder of the text file that it stands in; None for other files"""

    def rows(self, indices: Sequence[int]) -> "Rows":
        """Return the rows of some indices, in their order, and where each stands."""
        return Rows(self.take(indices), [self.place(one) for one in indices], [self.folder(one) for one in indices])


@dataclass(frozen=True)
class Rows:
    """Rows, and where each stands."""

    rows: list[Row]
    places: list[str]
    folders: list[Path | None]
    """of the text file of each"""


def open_table(source: DataSource, key: str, folder: Path) -> Table:
    """Open the rows that a recipe names.

    `data_files` of a builder (json, csv, …) and a local `path` are relative to `folder`, the recipe's; `data_files` of
    a hub data set or a local folder are relative to it, as in `datasets.load_dataset`. No code of a data set is run.
    JSON and CSV files, named or in a local folder, are read as `tasks.rows.files` says, all else by `datasets`.

    Raises:
        InputError: missing or unreadable file, unknown or unreachable data set, no rows; it names `key`.
    """
    files = source.data_files
    if source.path in TEXT_FORMATS and files:
        found = [
            path for file in ([files] if isinstance(files, str) else files) for path in paths_of(file, folder, key)
        ]
        table = _read_files({"train": found}, source.path, source.split, key)
    else:
        table = _load_dataset(source, key, folder)
    if table.total == 0:
        raise InputError(f"{key}: {table.what} has no rows")
    return table


def load_rows(source: DataSource, key: str, folder: Path) -> Rows:
    """Read the rows that a recipe names, in the order of the data set.

    With `samples` and a seed, the rows taken are the first of `draw_order`; with `samples` and a null seed the first of
    the data set. A larger `samples` adds rows and keeps the others.

    Raises:
        InputError: as `open_table`, and fewer rows than `samples`; it names `key`.
    """
    table, samples = open_table(source, key, folder), source.samples
    check_samples(table, samples, key)
    return table.rows(sorted(draw_order(table.total, source.seed)[:samples]))


def check_samples(table: Table, samples: int | None, key: str) -> None:
    """Raise InputError, which names `key`, if a table has fewer rows than are asked for."""
    if samples is not None and samples > table.total:
        raise InputError(
            f"{key}.samples is {samples}, but {table.what} has {table.total} rows; ask for at most {table.total}"
        )


def draw_order(total: int, seed: int | None) -> Sequence[int]:
    """Return the indices of rows in the order in which they are taken.

    That is the order of the draws of `random.Random(seed).random()`, one draw per row: Python guarantees the sequence
    on every machine and version. A null seed takes them as they stand.
    """
    if seed is None:
        return range(total)
    draw = random.Random(seed).random
    draws = [draw() for _ in range(total)]
    return sorted(range(total), key=draws.__getitem__)


# Files of rows -------------------------------------------------------------------------------------------------------


def paths_of(file: str, folder: Path, key: str) -> list[Path]:
    """Return the local paths of what an entry of `data_files` names: sorted, as `datasets` takes them."""
    if "://" in file:
        return _downloaded(file, key)
    names = [file] if (folder / file).exists() else sorted(glob.glob(file, root_dir=folder, recursive=True))
    if not names:
        raise InputError(f"{key}.data_files: no such file: {folder / file}")
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise InputError(f"{key}.data_files: {folder / file} is a folder; name the files in it: {file}/*")
    return paths


def _downloaded(url: str, key: str) -> list[Path]:
    import datasets
    from datasets.data_files import resolve_pattern

    if "::" in url:
        raise InputError(f"{key}.data_files: {url} points into an archive; unpack it and name the file in it")
    with _explained(url, key):
        return [Path(datasets.DownloadManager().download(one)) for one in resolve_pattern(url, "")]


def _read_files(files: Mapping[str, Sequence[Path]], form: str, split: str, key: str) -> Table:
    """Return the rows of a split, or of slices of some, of which each has files of its own."""
    what = ", ".join(dict.fromkeys(str(path) for paths in files.values() for path in paths))
    found: dict[str, list[tuple[Row, Path, int]]] = {}
    try:
        for name, paths in files.items():
            if len(files) == 1 or name in split or split == "all":  # else it is not read
                found[name] = [(row, path, line) for path in paths for row, line in read_rows(path, form)]
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    kept = [found[name][index] for name, indices in _parts(split, found, what, key) for index in indices]
    return Table(
        what,
        len(kept),
        lambda chosen: [kept[index][0] for index in chosen],
        lambda index: f"line {kept[index][2]} of {kept[index][1]}",
        lambda index: kept[index][1].parent,
    )


def _parts(split: str, found: Mapping[str, list[Any]], what: str, key: str) -> list[tuple[str, Sequence[int]]]:
    """Return the splits that a text such as `train[:10%]` names, with the indices of their rows."""
    if split in found or split == "all":
        return [(name, range(len(rows))) for name, rows in found.items() if split in (name, "all")]
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in found.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(f"{key}: cannot read {what}: {_line(error)}") from None
    return [(part.splitname, range(*slice(part.from_, part.to).indices(len(found[part.splitname])))) for part in parts]


# Data sets -----------------------------------------------------------------------------------------------------------


def _load_dataset(source: DataSource, key: str, folder: Path) -> Table:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS

    # Else every file that is read is reported to the hub, and without a network that is waited for.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    path, files = source.path, source.data_files
    what, texts = path, None
    if path in BUILDERS:
        if not files:
            raise InputError(f"{key}: path '{path}' is a file format; name the files to read in data_files")
        files = [_located(file, folder, key) for file in ([files] if isinstance(files, str) else files)]
        what = ", ".join(files)
    elif (folder / path).exists():
        path = str(folder / path)
        with _explained(what, key):
            builder = datasets.load_dataset_builder(path, source.name, data_files=files)
        if builder.name in TEXT_FORMATS:
            by_split = {str(name): [Path(file) for file in found] for name, found in builder.config.data_files.items()}
            texts = _read_files(by_split, builder.name, source.split, key)
            if builder.info.features is None:
                return texts
    elif path.startswith((".", "/")):
        raise InputError(f"{key}.path: no such folder: {folder / path}")
    with _explained(what, key):
        data = datasets.load_dataset(path, source.name, data_files=files, split=source.split, revision=source.revision)
    place = texts.place if texts else lambda index: f"row {index} of {what}, split {source.split}"
    table = Table(what, len(data), lambda chosen: _rows_of(data, chosen, place, key), place)
    return _as_declared(table, texts, key) if texts else table


def _rows_of(data: Any, chosen: Sequence[int], place: Callable[[int], str], key: str) -> list[Row]:
    """Return some rows of a data set; if one of them cannot be read, the message names it."""
    try:
        found: list[Row] = data.select(chosen).to_list()
        # Of a folder of pictures, it is `datasets` that has found the files; in others, anyone may have named them.
        rows = [_in_json(row, data.info.builder_name == "imagefolder") for row in found]
    except Exception as error:  # a text that is no UTF-8, a picture that is none: what libraries of formats raise
        if len(chosen) > 1:
            half = len(chosen) // 2
            return [row for part in (chosen[:half], chosen[half:]) for row in _rows_of(data, part, place, key)]
        raise InputError(f"{key}: {place(chosen[0])} cannot be read: {_line(error)}; repair or remove it") from error
    return rows


def _in_json(value: Any, opens: bool) -> Any:
    """Return a value as JSON can hold it: bytes in base64, and in place of a picture its file.

    Args:
        value: of a row, as `datasets` stores it: an `Image` has `bytes`, or else a `path`.
        opens: whether to read the files that paths name.
    """
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list):
        return [_in_json(one, opens) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"} and (value["bytes"] is not None or (opens and value["path"])):
        return _in_json(file_bytes(Path(value["path"])) if value["bytes"] is None else value["bytes"], opens)
    return {name: _in_json(one, opens) for name, one in value.items()}


def _as_declared(table: Table, texts: Table, key: str) -> Table:
    """Return rows in the types that a folder's README declares, all of whose texts are those of the files.

    `datasets` makes JSON of values that are not of a declared type, and then of the others of their field too.
    """
    if table.total != texts.total:
        raise InputError(
            f"{key}: {table.what} has {texts.total} rows, of which datasets reads {table.total} with the features that "
            "its README.md declares; correct these"
        )

    def take(chosen: Sequence[int]) -> list[Row]:
        rows = table.take(chosen)
        for index, row, own in zip(chosen, rows, texts.take(chosen), strict=True):
            for name, value in own.items():
                if isinstance(value, str) and isinstance(row.get(name), str) and row[name] != value:
                    raise InputError(
                        f"{key}: {table.place(index)}: {name} is {shown(value)}, but {shown(row[name])} with the "
                        f"features that the README.md of {table.what} declares; give all rows a value of that type"
                    )
        return rows

    return replace(table, take=take)


def _located(file: str, folder: Path, key: str) -> str:
    if "://" in file:
        return file
    if not glob.glob(file, root_dir=folder, recursive=True):
        raise InputError(f"{key}.data_files: no such file: {folder / file}")
    return str(folder / file)


@contextmanager
def _explained(what: str, key: str) -> Iterator[None]:
    """What `datasets`, or a library that it reads a format with, raises becomes an InputError."""
    try:
        with _quiet():
            yield
    except StopIteration:  # what some builders make of an empty file
        raise InputError(f"{key}: {what} has no rows") from None
    except ConnectionError as error:
        raise InputError(f"{key}: {_line(error)}; it is not in the local cache either") from error
    except ImportError as error:
        name = error.name or _line(error)
        raise InputError(f"{key}: {what} is read with the package {name}, which is not here; install it") from error
    except Exception as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{key}: cannot read {what}: {_line(error.__cause__ or error)}{_way_out(error)}") from error


def _way_out(error: Exception) -> str:
    """Say what to do where the cache of `datasets` cannot be written, a folder above it included."""
    from datasets import config

    if isinstance(error, OSError) and error.filename is not None:
        cache, failed = Path(config.HF_DATASETS_CACHE), Path(error.filename)
        if failed.is_relative_to(cache) or cache.is_relative_to(failed):
            return "; this is the cache of data sets: set HF_DATASETS_CACHE to a folder that can be written"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: what goes wrong is raised."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()
