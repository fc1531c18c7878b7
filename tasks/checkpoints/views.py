"""Folders that stand for a model as it is merged: in the vocabulary of merged models, or for its vision tower alone.

Such a folder holds links to the model's weights, its small files as merged models have them (token ids, for one), and a
file that says which tensors are left out, and of which rows of which models some are made. The program alone writes
them, below the hub's cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from sensmerge.tasks.artifacts import sha256_text
from sensmerge.tasks.checkpoints.vocabulary import ModelRow

VIEWS = ".vocabularies"
"""Folder, in the hub's cache, of these folders. A file in any other folder is no view: models come from others, and
a view names files anywhere."""
TOKENIZERS = ".tokenizers"
"""Folder, in the hub's cache, of tokenizers that are put together of those of several models."""
_VIEW = ".view.json"


@dataclass(frozen=True)
class Stretch:
    """Rows that lie side by side in a tensor and in what is made of it."""

    to: int
    start: int
    count: int


@dataclass(frozen=True)
class RowChange:
    """What an adapter adds to rows of a tensor: scaling · second @ first, in factors that its own file holds."""

    folder: str
    """of the adapter"""
    file: str
    first: str
    second: str
    scaling: float
    by_columns: bool
    """whether the columns of `first` belong to rows of the tensor (an embedding), and not the rows of `second`"""


@dataclass(frozen=True)
class Taken:
    """Rows that are taken from one stored tensor."""

    folder: str
    """of the model"""
    file: str
    tensor: str
    stretches: tuple[Stretch, ...]
    change: RowChange | None = None
    """what comes on top"""

    @property
    def path(self) -> Path:
        """Where the tensor is stored."""
        return Path(self.folder) / self.file


@dataclass(frozen=True)
class Gathered:
    """A tensor that is put together of rows of stored ones; a row that nothing is said of is zero."""

    axis: int
    """along which its rows lie"""
    dtype: str
    """safetensors code"""
    shape: tuple[int, ...]
    file: str
    """of the checkpoint, where the tensor is looked for"""
    parts: tuple[Taken, ...]
    means: Mapping[int, tuple[Taken, ...]] = field(default_factory=dict)
    """row → single rows whose mean it has"""
    blank: tuple[Stretch, ...] = ()
    """rows (`to`) that have the mean of all others"""


@dataclass(frozen=True)
class VocabularyView:
    """A model in the vocabulary of merged models."""

    tensors: Mapping[str, Gathered]
    left_out: tuple[str, ...]
    """stored tensors that others of `tensors` are made of"""
    places: tuple[Stretch, ...]
    """row of merged models (`to`) ← the model's own, of all its tokens that merged models have"""
    writer: Path = Path()
    """folder of the tokenizer of merged models, in whose chat template the model reads conversations"""

    def moved(self) -> dict[int, int]:
        """Return the id in merged models of every id of the model's own."""
        return {one.start + step: one.to + step for one in self.places for step in range(one.count)}


def stretches(places: Mapping[int, int]) -> tuple[Stretch, ...]:
    """Return rows, new → stored, as stretches in the order of the new ones."""
    found: list[list[int]] = []
    for to, start in sorted(places.items()):
        last = found[-1] if found else None
        if last is not None and (last[0] + last[2], last[1] + last[2]) == (to, start):
            last[2] += 1
        else:
            found.append([to, start, 1])
    return tuple(Stretch(*one) for one in found)


class Place(NamedTuple):
    """A row of a stored tensor."""

    folder: str
    file: str
    tensor: str
    row: int
    change: RowChange | None = None
    """what comes on top"""


def gather(like: Gathered, sources: Mapping[int, Sequence[ModelRow]], where: Callable[[ModelRow], Place]) -> Gathered:
    """Return a tensor put together of rows of models.

    Args:
        like: the tensor, without its parts.
        sources: for every row but the last ones, which have the mean of all others: of `Vocabulary.rows_of`.
        where: says where a row is stored.
    """
    single: dict[tuple[str, str, str, RowChange | None], dict[int, int]] = {}
    means: dict[int, tuple[Taken, ...]] = {}
    for to, found in sources.items():
        if len(found) == 1:
            one = where(found[0])
            single.setdefault((one.folder, one.file, one.tensor, one.change), {})[to] = one.row
        elif found:
            means[to] = tuple(
                Taken(one.folder, one.file, one.tensor, (Stretch(0, one.row, 1),), one.change)
                for one in map(where, found)
            )
    parts = tuple(
        Taken(folder, file, tensor, stretches(rows), change) for (folder, file, tensor, change), rows in single.items()
    )
    rows = like.shape[like.axis]
    blank = stretches({to: to for to in range(rows) if to not in sources})
    return Gathered(like.axis, like.dtype, like.shape, like.file, parts, means, blank)


def in_folders(view: VocabularyView, folders: Mapping[str, str]) -> VocabularyView:
    """Return a view with other names of folders."""

    def moved(one: Taken) -> Taken:
        change = one.change and replace(one.change, folder=folders[one.change.folder])
        return replace(one, folder=folders[one.folder], change=change)

    tensors = {
        name: replace(
            how,
            parts=tuple(map(moved, how.parts)),
            means={to: tuple(map(moved, found)) for to, found in how.means.items()},
        )
        for name, how in view.tensors.items()
    }
    return replace(view, tensors=tensors)


def write_view(view: VocabularyView, folder: Path) -> None:
    """Write what makes a folder a view."""
    (folder / _VIEW).write_bytes(_JSON.dump_json(view))


def view_digest(view: VocabularyView) -> str:
    """Return a digest of what a folder is made of; what it says of folders should be no paths."""
    return sha256_text(_JSON.dump_json(view).decode())


def read_view(folder: Path) -> VocabularyView | None:
    """Return what a folder is made of if it is a view."""
    path = folder / _VIEW
    if folder.parent.name != VIEWS or not path.is_file():
        return None
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _read(path: Path, _: int) -> VocabularyView:
    return _JSON.validate_json(path.read_bytes())


_JSON = TypeAdapter(VocabularyView)
