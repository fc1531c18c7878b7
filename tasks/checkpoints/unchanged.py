"""Models that have to stay, while they are read, what they were when a step was planned."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.hub import VERIFIED
from sensmerge.tasks.checkpoints.listing import HubModel, Listing, LocalModel, UrlModel
from sensmerge.tasks.checkpoints.source import bring, verify
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.url import altered
from sensmerge.tasks.errors import InputError

State = tuple[str, int, int, int]
"""Path, size, inode and modification time of a file or folder."""

_FOUND: dict[Listing, tuple[State, ...]] = {}
"""Models that this process has found to be as they were listed, and the states of their files then."""


@dataclass(frozen=True)
class PlannedModels:
    """The models that a step reads, as their digests are in its fingerprint."""

    listings: tuple[Listing, ...]
    cache: Path
    """folder of the hub's cache, and of the digests of local files"""

    def of(self, *folders: Path) -> "PlannedModels":
        """Return the models in some folders.

        Returns:
            None of them where one is no model's own folder, and so may stand for rows of others.
        """
        found = tuple(one for one in self.listings if one.folder in folders)
        return replace(self, listings=found) if {one.folder for one in found} == {*folders} else NONE

    def bring(self, tensors: Tensors | None = None) -> None:
        """Have the files on this machine, where they come from the hub or a URL and are not here.

        Args:
            tensors: all that is read of the weights; None: whole files.

        Raises:
            InputError: as `tasks.checkpoints.source.bring`.
        """
        for listing in self.listings:
            bring(listing, self.cache, tensors)

    def check(self) -> None:
        """Check that all files are what they were listed as.

        A file is read again only where inode, size or modification time are others than when its digest was taken.

        Raises:
            InputError: a file is another one, or gone.
        """
        for listing in self.listings:
            begin, now = time.time_ns(), _states(listing)
            if _FOUND.get(listing) != now:
                _check(listing, self.cache)
                if all(abs(begin - modified) > digests.SETTLED for *_, modified in now):
                    _FOUND[listing] = now

    def states(self) -> list[State]:
        """Return the states of all files; other ones may hold something else.

        Raises:
            InputError: a file is gone.
        """
        return [state for listing in self.listings for state in _lasting_states(listing)]


NONE = PlannedModels((), Path())
"""Of a step that reads only what other steps have made."""


def _states(listing: Listing) -> tuple[State, ...]:
    # A folder's time tells of files that came later, which a network might be read from.
    paths = [listing.folder, *(listing.folder / file.name for file in listing.files)]
    if isinstance(listing.source, UrlModel):  # the others are not read
        paths = [path for path in paths if path.exists()]
    try:
        return tuple((str(path), *_state(path)) for path in paths)
    except OSError as error:
        raise InputError(
            f"model {listing.source}: {error.filename} cannot be read any more ({error.strerror}); expected the files "
            "that were planned with: put it back, or run again"
        ) from error


def _lasting_states(listing: Listing) -> list[State]:
    """Return the states of files that need not be here, if the name of their folder says which they are."""
    if isinstance(listing.source, UrlModel) or (isinstance(listing.source, HubModel) and listing.missing()):
        return [(str(listing.folder / file.name), file.size, 0, 0) for file in listing.files]
    return list(_states(listing))


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns


def _check(listing: Listing, cache: Path) -> None:
    if isinstance(listing.source, LocalModel):
        verify(listing, cache)
        return
    changed = list(_changed_on_disk(listing, cache))
    if changed:
        raise InputError(f"model {listing.source}: {', '.join(changed)} changed after it was downloaded; run again")


def _changed_on_disk(listing: Listing, cache: Path) -> Iterator[str]:
    """Yield the files of a model from the hub or a URL that are not what these state; nothing is fetched."""
    if isinstance(listing.source, UrlModel):
        yield from altered(listing, cache)
        return
    for file in listing.files:
        path = (listing.folder / file.name).resolve()
        stat = path.stat()
        if stat.st_size == file.size and digests.find(path, stat, cache / VERIFIED) == file.digest:
            continue
        if stat.st_size != file.size or digests.compute(path, file.digest.partition(":")[0]) != file.digest:
            yield file.name
