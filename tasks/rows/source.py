"""Where the rows of a task come from."""

import json
from typing import Any

from pydantic import Field

from sensmerge.tasks.artifacts import sha256_text
from sensmerge.tasks.strict import Strict

Row = dict[str, Any]


class DataSource(Strict):
    """Rows of a data set. `path`, `name`, `data_files`, `split` and `revision` are those of `datasets.load_dataset`."""

    path: str = Field(description="builder (json, csv, parquet, …), local folder or hub id")
    name: str | None = Field(None, description="configuration of the data set")
    data_files: str | list[str] | None = Field(None, description="file or files, relative to the recipe's folder")
    split: str = Field("train", description="split to read")
    revision: str | None = Field(None, description="branch, tag or commit of a data set on the hub")
    samples: int | None = Field(None, ge=1, description="how many rows to use; all if left out")
    seed: int | None = Field(0, description="seed of the random choice of rows; null takes the first rows")


def rows_text(rows: list[Row]) -> str:
    """Return rows as canonical JSON: fields sorted by name, no spaces, dates as text.

    The order of rows counts, and that of keys within a field: chat templates write the arguments of a tool in it.
    """
    return json.dumps([dict(sorted(row.items())) for row in rows], separators=(",", ":"), default=str)


def rows_digest(rows: list[Row]) -> str:
    """Return the sha256 of rows as canonical JSON."""
    return sha256_text(rows_text(rows))
