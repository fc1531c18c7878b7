"""Rows in a file of their own: jobs name them by their digest and do not carry them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sensmerge.tasks.artifacts import sha256_text, write_whole
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.rows.source import Row, rows_text


@dataclass(frozen=True)
class StoredRows:
    """Rows that lie in `path`, once they are written there."""

    digest: str
    """sha256 of the file, which is the rows as canonical JSON"""
    path: Local[Path]

    @classmethod
    def of(cls, rows: list[Row], folder: Path) -> Self:
        """Name the file of some rows in a folder; it need not exist."""
        digest = sha256_text(rows_text(rows))
        return cls(digest, folder / f"{digest}.json")

    def write(self, rows: list[Row]) -> None:
        """Write the file with its rows, unless it is there as it should be."""
        text = rows_text(rows)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, text)

    def read(self) -> list[Row]:
        """Return the rows, with dates as text.

        Raises:
            InputError: the file is not as it was written.
        """
        text = self.path.read_bytes()
        if hashlib.sha256(text).hexdigest() != self.digest:
            raise InputError(f"{self.path}: damaged: its sha256 is not its name; run again to write it again")
        rows: list[Row] = json.loads(text)
        return rows
