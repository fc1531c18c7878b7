"""Models whose tokens differ, in the one vocabulary of merged models: a folder in the cache stands for each of them."""

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from sensmerge.pipeline.plan.seen import Seen
from sensmerge.tasks.artifacts import canonical, sha256_file, sha256_text
from sensmerge.tasks.checkpoints.views import VIEWS, VocabularyView, in_folders, view_digest
from sensmerge.tasks.checkpoints.vocabulary import Vocabulary
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.views import Member, donors, fill_folder, view_of

LEFT_BEHIND = 3600
"""Seconds after which nobody writes to an unfinished folder any more: whoever began it was killed."""


def in_vocabulary(
    vocabulary: Vocabulary, members: Sequence[Member], keys: Collection[str], tokenizer: Path, cache: Path
) -> dict[str, Seen]:
    """Return, by name, what stands for models; folders are written below the cache unless they are there.

    Args:
        vocabulary: of merged models.
        members: all models, the base first.
        keys: those that are to be seen in it.
        tokenizer: folder of the tokenizer of merged models.
        cache: the hub's cache, which all workers see.

    Raises:
        InputError: what `view_of` and `fill_folder` raise; the cache cannot be written.
    """
    folders = {one.key: str(one.folder.absolute()) for one in members}
    found = {}
    for one in (member for member in members if member.key in keys):
        told = view_of(one, vocabulary, members)
        view = replace(in_folders(told, folders), writer=tokenizer.absolute())

        def fill(target: Path, one: Member = one, view: VocabularyView = view) -> None:
            fill_folder(one, view, vocabulary.rows, target)

        names = tuple(key.removeprefix("experts.") for key in donors(told, one.key))
        found[one.key.removeprefix("experts.")] = Seen(
            settled(cache / VIEWS, fill), one.folder, view_digest(told), names
        )
    return found


def settled(parent: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder named by its content, which `fill` writes unless it is there.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(".*"):
            if left.stat().st_mtime < time.time() - LEFT_BEHIND:
                shutil.rmtree(left, ignore_errors=True)  # somebody else may be at it, too
        with TemporaryDirectory(dir=parent, prefix=".") as temporary:
            # Named as the folder that it becomes: what it holds is read as that is read.
            folder = Path(temporary) / parent.name / "written"
            folder.mkdir(parents=True)
            fill(folder)
            target = parent / _content(folder)[:32]
            try:
                folder.rename(target)
            except OSError:  # one is there: of an earlier plan, or of one that is made at the same time
                if not target.is_dir():
                    raise
        return target
    except OSError as error:
        raise InputError(
            f"--store: {parent} cannot be written ({error.strerror}), which has to hold the tokenizer of merged "
            "models; choose another folder"
        ) from error


def _content(folder: Path) -> str:
    """Return a digest of the files of a folder; of links, of where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = str(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(folder))] = sha256_file(path)
    return sha256_text(canonical(found))
