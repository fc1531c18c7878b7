"""Rows in files: read as they were written, and never otherwise."""

from datetime import date
from pathlib import Path

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import identity
from sensmerge.tasks.rows.source import Row, rows_digest
from sensmerge.tasks.rows.stored import StoredRows

ROWS: list[Row] = [{"b": 1, "a": "é", "none": None}, {"b": 2.5, "a": "x", "day": date(2024, 2, 29)}]


def test_what_is_read_is_what_was_written_with_dates_as_text(tmp_path: Path) -> None:
    stored = StoredRows.of(ROWS, tmp_path / "rows")
    stored.write(ROWS)
    assert stored.read() == [ROWS[0], ROWS[1] | {"day": "2024-02-29"}]
    assert stored.digest == rows_digest(ROWS) == rows_digest(stored.read())
    assert identity(stored) == {"digest": stored.digest}


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"[]", b""])
def test_a_damaged_file_is_not_read_and_written_anew(damaged: bytes, tmp_path: Path) -> None:
    stored = StoredRows.of(ROWS, tmp_path)
    stored.write(ROWS)
    stored.path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        stored.read()
    stored.write(ROWS)
    assert stored.read()[0]["a"] == "é"
