"""The calibration set of a task, as the stages see it that run experts' networks over it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.identity import For
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.networks.blocks import Batch
from sensmerge.tasks.networks.networks import Head
from sensmerge.tasks.rows.stored import StoredRows


@dataclass(frozen=True)
class CalibrationSet:
    """Rows, and how they become samples."""

    task: Annotated[RowTask, For("calibration")]
    rows: StoredRows

    @property
    def head(self) -> Head:
        """What the network of the task's expert ends in."""
        return self.task.head

    @cached_property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.rows.read())

    def samples(self, name: str, tokenizer: Any, label2id: Mapping[str, int]) -> Iterator[Batch]:
        """Yield the inputs of a network for each row, with labels.

        Args:
            name: of the task, for messages.
            tokenizer: that reads the task's texts.
            label2id: classes of the task's expert.

        Raises:
            InputError: a row that makes no sample.
        """
        for number, row in enumerate(self.rows.read()):
            where = f"row {number} of tasks.{name}.calibration"
            yield self.task.calibration_batch(row, tokenizer, where, label2id)


def reader_of(tokenizer: Artifact | Mapping[str, Artifact], task: str) -> Artifact:
    """Return the tokenizer that reads a task's texts."""
    return tokenizer if isinstance(tokenizer, Artifact) else tokenizer[task]
