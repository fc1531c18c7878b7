import bz2
import codecs
import csv
import gzip
import json
import lzma
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.rows.files import read_rows


def rows(folder: Path, form: str, text: str | bytes) -> list[dict[str, Any]]:
    path = folder / f"rows.{form}"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [row for row, _ in read_rows(path, form)]


@pytest.mark.parametrize("text", ["2024-01-15", "0012", "12", "1.50", "NA", "null", "True", " a ", ""])
def test_a_text_of_json_stays_what_it_is(tmp_path: Path, text: str) -> None:
    assert rows(tmp_path, "json", json.dumps({"a": text})) == [{"a": text}]


@pytest.mark.parametrize("text", ["2024-01-15", "0012", "12", "1.50", "NA", "null", "", "true", " a ", "1e3"])
def test_a_value_of_csv_is_its_text(tmp_path: Path, text: str) -> None:
    assert rows(tmp_path, "csv", f"a,b\n{text},2.5\n12,\n") == [{"a": text, "b": "2.5"}, {"a": "12", "b": ""}]


def test_numbers_keep_their_text_whatever_other_rows_have(tmp_path: Path) -> None:
    text = '{"a": 12, "b": 1.50}\n{"a": 2.5}\n{"a": null, "c": 1e3}\n{"a": -0}\n{"a": 12345678901234567890}\n'
    found = rows(tmp_path, "json", text)
    assert found == [
        {"a": 12, "b": "1.50"},
        {"a": "2.5"},
        {"a": None, "c": "1e3"},
        {"a": "-0"},
        {"a": 12345678901234567890},
    ]
    assert rows(tmp_path, "json", f'{{"a": {"9" * 5000}}}') == [{"a": "9" * 5000}]


def test_fractions_are_numbers_within_objects(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"a": [1.50, [2.0]], "b": {"c": 1.50, "d": [1e2, "1.50"]}, "e": [{"f": -0.5}, 3.0]}')
    ((row, _),) = read_rows(file, "json")
    assert row == {"a": ["1.50", ["2.0"]], "b": {"c": 1.5, "d": [100.0, "1.50"]}, "e": [{"f": -0.5}, "3.0"]}
    assert {type(one) for one in (row["a"][0], row["a"][1][0], row["e"][1])} == {str}


@pytest.mark.parametrize(
    ("text", "expected", "lines"),
    [
        ('\n{"a": 1}\r\n\n  {"a": 2}', [{"a": 1}, {"a": 2}], [2, 4]),
        ('{"a": 1} {"a":\n2}{"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}], [1, 1, 2]),
        ('[\n{"a": "]"},\n{"a": ["b"]}\n]\n', [{"a": "]"}, {"a": ["b"]}], [2, 3]),
        ('["x", "y"]', [{"text": "x"}, {"text": "y"}], [1, 1]),
        ('{"a": [1, 2], "b": {"c": 1}}', [{"a": [1, 2], "b": {"c": 1}}], [1]),
        ("[]", [], []),
        (" ", [], []),
    ],
)
def test_json_in_its_forms(tmp_path: Path, text: str, expected: list[dict[str, Any]], lines: list[int]) -> None:
    (tmp_path / "rows.json").write_text(text, newline="")
    assert read_rows(tmp_path / "rows.json", "json") == list(zip(expected, lines, strict=True))


def test_lines_of_csv_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('\na,b\r\n\n"x\n""y"", z",1\n"",2\n', newline="")
    assert read_rows(tmp_path / "rows.csv", "csv") == [({"a": 'x\n"y", z', "b": "1"}, 4), ({"a": "", "b": "2"}, 6)]
    long = "x" * 200_000
    assert rows(tmp_path, "csv", f"a,b\n{long},2\n") == [{"a": long, "b": "2"}]


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_whatever_text_is_written_is_read(tmp_path: Path, table: list[tuple[str, str]]) -> None:
    expected = [{"a": first, "b": second} for first, second in table]
    out = StringIO()
    csv.writer(out).writerows([("a", "b"), *table])
    assert rows(tmp_path, "csv", out.getvalue()) == expected
    assert rows(tmp_path, "json", "\n".join(map(json.dumps, expected))) == expected
    assert rows(tmp_path, "json", json.dumps(expected, indent=1, ensure_ascii=False)) == expected


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_packed_files_and_a_byte_order_mark(tmp_path: Path, pack: Any) -> None:
    for mark in (b"", codecs.BOM_UTF8):
        assert rows(tmp_path, "json", pack(mark + '{"a": "é"}'.encode())) == [{"a": "é"}]
        assert rows(tmp_path, "csv", pack(mark + "a,b\né,2\n".encode())) == [{"a": "é", "b": "2"}]


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("json", '{"a": 1}\n{"a": 2', "line 2: not JSON: Expecting"),
        ("json", '{"a": 1}\nnothing', "line 2: not JSON: Expecting value"),
        ("json", '{"a": 1}\n[{"a": 2}]', "line 2: expected an object with the fields of a row"),
        ("json", '{"a": 1}\n"b"', "line 2: expected an object with the fields of a row"),
        ("json", '{"a": 1}\n\n{"a": 1, "b": {"c": 1, "c": 2}}', "line 3: not JSON: field 'c' stands twice"),
        ("json", '[{"a": 1}\n{"a": 2}]', "line 2: not JSON: expected ',' between two rows"),
        ("json", '[{"a": 1},\n', "line 2: not JSON: the list does not end"),
        ("json", '[{"a": 1}]\n{"a": 2}', "line 1: not JSON: expected ',' between two rows and ']' at the end"),
        ("json", "[" * 100_000, "line 1: .* nested too deeply"),
        ("json", b'{"a": 1}\n{"a": "\xff"}', "line 2: not UTF-8; save the file as UTF-8"),
        ("json", b"PK\x03\x04rest", "is a zip archive; expected text, or text packed by gzip, bzip2 or xz"),
        ("json", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], ": cannot be read: Compressed file ended"),
        ("json", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 30, ": cannot be read: Error -3"),
        ("csv", "a,b\n1,2\n1,2,3\n", "line 3: has 3 fields, the first line names 2; a text with a comma"),
        ("csv", "a,b\n\n1\n", "line 3: has 1 fields, the first line names 2"),
        ("csv", "a,b,a\n1,2,3\n", "line 1: two fields are called 'a'"),
        ("csv", 'a,b\n"x,1\ny,2\n', "line 2: not CSV: unexpected end of data"),
        ("csv", 'a,b\n"x"y,1\n', "line 2: not CSV: .* expected after"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path: Path, form: str, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"rows.{form}.*{message}") as caught:
        rows(tmp_path, form, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_files_that_are_cut(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pack(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(InputError, match=r"rows.jsonl: cannot be read: "):
        read_rows(path, "json")


def test_a_file_that_does_not_fit_into_memory_is_named(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("wb") as file:
        file.truncate(2**31)  # a hole, which takes no room on the disk
    code = (
        "import resource; from pathlib import Path; from sensmerge.tasks.rows.files import read_rows\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30)); read_rows(Path('rows.csv'), 'csv')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "InputError: rows.csv: its rows do not fit into memory" in done.stderr
