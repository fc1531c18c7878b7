"""What the census tries with an architecture, and what it finds."""

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from tests.census import evaluation, se, sens, static
from tests.census.cases import Column, make_case

COLUMNS: Mapping[str, Column] = {
    "static": static.merges,
    "loads": static.loads,
    "sens whole": sens.whole,
    "sens streamed": sens.streamed,
    "distances": sens.distances,
    "SE full": se.full,
    "SE LoRA": se.lora,
    "evaluation": evaluation.scores,
}
OF_THE_ZOO = [name for name in COLUMNS if name != "SE LoRA"]
"""Columns of networks for which peft need not know linear layers."""


def census(name: str, columns: Collection[str]) -> dict[str, str]:
    """Return what each column says of an architecture, or `tiny`: why there is no tiny network of it."""
    with tempfile.TemporaryDirectory(prefix="census-") as folder:
        try:
            case = make_case(name, Path(folder), lora="SE LoRA" in columns)
        except Exception as error:
            return {"tiny": f"{type(error).__name__}: {error}"}
        # Messages name files: without the folder that is gone when they are read.
        return {column: COLUMNS[column](case).replace(f"{folder}/", "") for column in columns}
