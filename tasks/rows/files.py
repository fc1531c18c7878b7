"""Rows of JSON and CSV files as the text in them: nothing is inferred, neither from one row nor from many.

A file is UTF-8, with or without a byte order mark, and may be compressed with gzip, bzip2 or xz.

- JSON: objects one after the other (JSON Lines, or written over several lines), or one list of objects; a list of texts
  gives rows with a field `text`. A whole number is an int; a number with a fraction or an exponent is its text, but a
  float in an object within the row, such as the arguments of a tool. A row has the fields that stand in it.
- CSV (RFC 4180): fields apart by commas, quoted by `"`, a quote doubled; the first line names the fields. Every value
  is text, an empty one too; empty lines are skipped.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import file_bytes
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.rows.source import Row

_SPACE = re.compile(r"[ \t\r\n]*")
_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
_ARCHIVES = {
    b"PK\x03\x04": "a zip",
    b"\x28\xb5\x2f\xfd": "a zstd",
    b"\x04\x22\x4d\x18": "an lz4",
    b"7z\xbc\xaf": "a 7z",
}


def read_rows(path: Path, form: str) -> list[tuple[Row, int]]:
    """Return the rows of a file and the line that each begins in, counted from 1.

    Args:
        path: the file.
        form: `json` or `csv`.

    Raises:
        InputError: it cannot be read, or is not what the module says; with the line.
    """
    try:
        return list((_json_rows if form == "json" else _csv_rows)(path, _text(path)))
    except MemoryError:
        raise InputError(f"{path}: its rows do not fit into memory; split the file, or write it as Parquet") from None


def _text(path: Path) -> str:
    try:
        content = file_bytes(path, most=inf)
        for magic, name in _ARCHIVES.items():
            if content.startswith(magic):
                raise InputError(f"{path}: is {name} archive; expected text, or text packed by gzip, bzip2 or xz")
        for magic, unpack in _UNPACK.items():
            if content.startswith(magic):
                content = unpack(content)
                break
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[Row, int]]:
    line, counted = 1, 0
    try:
        for start, value in _json_values(text):
            line, counted = line + text.count("\n", counted, start), start
            if not isinstance(value, dict):
                raise InputError(f"{path}, line {line}: expected an object with the fields of a row: {{…}}")
            yield {name: _with_floats(one) for name, one in value.items()}, line
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}, line {line}: an object after it is nested too deeply") from None


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a text and where each begins: those of its list, or all that it has one after the other."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_Fraction, parse_int=_whole)
    place = _after_space(text, 0)
    listed = text.startswith("[", place)
    if listed:
        place = _after_space(text, place + 1)
        if text.startswith("]", place):
            return
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:  # of `_object`, it does not know the place
            raise error if error.doc else json.JSONDecodeError(error.msg, text, place) from None
        yield place, {"text": value} if listed and isinstance(value, str) else value
        place = _after_space(text, end)
        if listed and text.startswith(",", place):
            place = _after_space(text, place + 1)
        elif listed and text.startswith("]", place) and _after_space(text, place + 1) == len(text):
            return
        elif listed:
            raise json.JSONDecodeError("expected ',' between two rows and ']' at the end", text, place)
    if listed:
        raise json.JSONDecodeError("the list does not end", text, place)


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise json.JSONDecodeError(f"field {double!r} stands twice in one object", "", 0)
    return found


class _Fraction(str):
    """A number with a fraction or an exponent, as its text."""


def _with_floats(value: Any, inner: bool = False) -> Any:
    """Return a value of a row whose fractions are floats within objects, and texts elsewhere."""
    if isinstance(value, dict):
        return {name: _with_floats(one, True) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_floats(one, inner) for one in value]
    return (float if inner else str)(value) if isinstance(value, _Fraction) else value


def _whole(text: str) -> int | str:
    """Return a whole number; its text where an int would be written otherwise (−0) or is too long for Python."""
    if text == "-0" or len(text) > sys.get_int_max_str_digits() > 0:
        return text
    return int(text)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[Row, int]]:
    csv.field_size_limit(sys.maxsize)  # else a text of more than 131,072 characters is an error
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: not CSV: {error}") from None
        if values is None:
            return
        if not values:  # an empty line
            continue
        if names is None:
            names = values
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise InputError(f"{path}, line {line}: two fields are called {double!r}; rename one")
        elif len(values) != len(names):
            raise InputError(
                f"{path}, line {line}: has {len(values)} fields, the first line names {len(names)}; "
                "a text with a comma stands in double quotes"
            )
        else:
            yield dict(zip(names, values, strict=True)), line
