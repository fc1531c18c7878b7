"""Models at a URL: files listed with what the server says of their content, and brought to who reads them."""

import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from filelock import FileLock

from sensmerge.tasks.artifacts import canonical, partial_of, sha256_text
from sensmerge.tasks.checkpoints import digests, sparse
from sensmerge.tasks.checkpoints.companions import WEIGHTS
from sensmerge.tasks.checkpoints.header import TensorInfo, read_header
from sensmerge.tasks.checkpoints.listing import ListedFile, Listing, UrlModel, relevant
from sensmerge.tasks.checkpoints.sparse import Tensors, write_at
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.remote import RemoteFile, RemoteFolder

FETCHED = ".fetched"
"""Folder, in the cache, for a digest of every file that came from a URL, by which it is known to be what came."""
LOCKS = ".locks"
"""Folder, in the cache, for the locks of those who fetch."""
URLS = "urls"
"""Folder, in the cache, with a folder for every state of a model at a URL."""
_DEPTH = 2
"""Of the folders that are looked into: the model's own, and those in it."""
_FIRST = 2**16
"""Bytes of a weights file that are asked for at first; the headers of most files are shorter."""
_LONGEST = 100_000_000
"""Bytes of a header, as the safetensors library has it."""
LARGE = 2**20
"""Bytes from which on tensors of a file of weights come one by one, and only those that are read."""
AHEAD = 4
"""How many ranges of a file come side by side, each with at most `sparse.RANGE` bytes in memory."""


@dataclass(frozen=True)
class _ModelFolder(RemoteFolder):
    @property
    def title(self) -> str:
        return f"model {self.url}"


def list_url(source: UrlModel, cache: Path) -> Listing:
    """List a model at a URL; its files are known by size and by the server's word on their content (`RemoteFile`).

    Raises:
        InputError: nothing is there, no weights are, or the URL cannot be used.
    """
    found = _ModelFolder(source.url).files(depth=_DEPTH)
    if not found:
        raise InputError(f"model {source}: no file is there; check the URL, and that you may list it")
    inner = [name for name in found if "/" in name and fnmatch(name, WEIGHTS)]
    chosen = relevant({name: file.size for name, file in found.items()}, source, inner)
    files = tuple(ListedFile(name, found[name].size, f"etag:{found[name].state}") for name in sorted(chosen))
    state = sha256_text(canonical([[file.name, file.size, file.digest] for file in files]))
    name = f"{source.url.rpartition('/')[2]}-{sha256_text(source.url)[:8]}"
    return Listing(source, cache.absolute() / URLS / name / state[:16], None, files)


def bring(source: UrlModel, listing: Listing, cache: Path, tensors: Tensors | None) -> None:
    """Have a model's files on this machine; see `tasks.checkpoints.source.bring`.

    Raises:
        InputError: as `fetch_files`.
    """
    wanted = {path.name: names for path, names in (tensors or {}).items() if path.parent == listing.folder}
    if tensors is not None and listing.folder in tensors:
        wanted = dict.fromkeys([file.name for file in listing.files if _is_large(file)], ()) | wanted
    names = {file.name for file in listing.files if tensors is None or not _is_large(file) or file.name in wanted}
    fetch_files(source, listing, names, cache, wanted)


def fetch_files(
    source: UrlModel,
    listing: Listing,
    names: Collection[str],
    cache: Path,
    tensors: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """Bring some files of a model to this machine, unless they are there as they came; one process does it at a time.

    Args:
        source: where they are.
        listing: the model.
        names: of the files.
        cache: as in `tasks.checkpoints.source.resolve`.
        tensors: by file, those tensors of it that are enough, if it is a large file of weights.

    Raises:
        InputError: no room on the disk; a file is not there, is another one than was listed, or cannot be read.
    """
    with _alone(listing.folder, cache):
        asked = [file for file in listing.files if file.name in names]
        lacking = [file for file in asked if not _has(listing, file, cache, tensors.get(file.name))]
        if not lacking:
            return
        place = _ModelFolder(source.url)
        whole = {file.name: _remote(file) for file in lacking if not _is_large(file)}
        _check_room(source, listing, sum(file.size for file in whole.values()))
        place.bring(whole, {name: listing.folder / name for name in whole})
        came: dict[str, Collection[str] | None] = dict.fromkeys(whole)
        for file in lacking:
            if _is_large(file):
                came[file.name] = _bring_tensors(place, source, listing, file, tensors.get(file.name))
        now = place.files(depth=_DEPTH)
        for file in lacking:
            if now.get(file.name) != _remote(file):
                sparse.remove(listing.folder / file.name)
                raise _changed(source, [file.name])
            _know(listing.folder / file.name, came[file.name], cache)


def thin(folder: Path, cache: Path, kept: Callable[[], Mapping[str, Collection[str]] | None]) -> int:
    """Delete tensors of the large files of a model that is on this machine.

    Args:
        folder: of the model.
        cache: as in `tasks.checkpoints.source.resolve`.
        kept: says, while nobody else writes to the files, which tensors stay, by file: a file that it does not name
            loses all; None: all stays.

    Returns:
        How many bytes that freed.
    """
    with _alone(folder, cache):
        stay = kept()
        if stay is None:
            return 0
        large = [path for path in folder.glob(WEIGHTS) if path.stat().st_size >= LARGE]
        return sum(sparse.keep_only(path, stay.get(path.name, ())) for path in large)


@contextmanager
def _alone(folder: Path, cache: Path) -> Iterator[None]:
    """Hold a model's folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = cache / LOCKS / f"{sha256_text(str(folder))[:32]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield


def _remote(file: ListedFile) -> RemoteFile:
    return RemoteFile(file.size, file.digest.removeprefix("etag:"))


def _is_large(file: ListedFile) -> bool:
    return file.size >= LARGE and "/" not in file.name and fnmatch(file.name, WEIGHTS)


def _check_room(source: UrlModel, listing: Listing, needed: int) -> None:
    free = shutil.disk_usage(listing.folder).free
    if needed > free:
        raise InputError(
            f"model {source}: {needed} bytes to fetch, but {listing.folder} has room for {free}; make room there"
        )


def _bring_tensors(
    place: RemoteFolder, source: UrlModel, listing: Listing, file: ListedFile, names: Collection[str] | None
) -> Collection[str]:
    """Write tensors of a large file, all or some, where they belong in it; the rest of it are holes at first.

    Returns:
        Those that are there now.
    """
    path = listing.folder / file.name
    before = sparse.present(path)
    if before is None or not path.exists() or not before.holds_of(path):
        sparse.remove(path)
        _begin(place, source, listing, file)
        before = sparse.Present(frozenset(), frozenset(), (0, 0))
    offsets = sparse.places(path)
    wanted = {*(offsets if names is None else names)} - before.tensors
    stretches = sparse.ranges(offsets[name] for name in wanted)
    _check_room(source, listing, sum(end - begin for begin, end in stretches))
    sparse.say(path, before.tensors, wanted)
    descriptor = os.open(path, os.O_WRONLY)
    try:

        def come(begin: int, end: int) -> None:
            write_at(descriptor, place.read(file.name, begin, end), begin)

        with ThreadPoolExecutor(AHEAD) as pool:
            coming = [pool.submit(come, *one) for one in stretches]
            try:
                for one in coming:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.fsync(descriptor)  # what is said to be here must not be a hole after a power cut
    finally:
        os.close(descriptor)
    return before.tensors | wanted


def _begin(place: RemoteFolder, source: UrlModel, listing: Listing, file: ListedFile) -> None:
    """Write a file that has its header, and its size, and no tensor yet."""
    path = listing.folder / file.name
    partial = partial_of(path)
    with partial.open("wb") as begun:
        begun.write(_head(place, file))
        begun.truncate(file.size)
    try:
        read_header(partial)
    except InputError as error:
        raise _about(source, partial, file.name, error) from error
    sparse.say(path, ())
    partial.replace(path)


def _know(path: Path, tensors: Collection[str] | None, cache: Path) -> None:
    """Write down that a file, or some tensors of it, are as they came."""
    if tensors is not None and sparse.places(path).keys() - tensors:
        sparse.say(path, tensors)
        return
    digests.keep(path, path.stat(), digests.compute(path, "blake3"), cache / FETCHED)
    sparse.record_of(path).unlink(missing_ok=True)


def _has(listing: Listing, file: ListedFile, cache: Path, tensors: Collection[str] | None = None) -> bool:
    """Return whether a file of a model, or tensors of it, are on this machine, and nobody has written to it since."""
    path = listing.folder / file.name
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    found = sparse.present(path)
    if found is None:
        return digests.find(path, path.stat(), cache / FETCHED) is not None
    return tensors is not None and found.tensors >= {*tensors} and found.holds_of(path)


def altered(listing: Listing, cache: Path) -> list[str]:
    """Return the files that somebody else has written to since they came; those that are not here are left out."""

    def wrong() -> list[str]:
        here = [file for file in listing.files if (listing.folder / file.name).exists()]
        return [file.name for file in here if not _has(listing, file, cache, ())]

    if not wrong():
        return []
    with _alone(listing.folder, cache):  # unless another process has just been writing more tensors
        return wrong()


def check(source: UrlModel, listing: Listing, cache: Path) -> None:
    """Check that a model at a URL is what was listed.

    Raises:
        InputError: it is not any more.
    """
    changed = {file.name for file in {*listing.files} ^ {*list_url(source, cache).files}}
    if changed:
        raise _changed(source, changed)


def _changed(source: UrlModel, names: Collection[str]) -> InputError:
    return InputError(f"model {source}: {', '.join(sorted(names))} changed after it was planned; run again")


def remote_header(source: UrlModel, listing: Listing, name: str) -> dict[str, TensorInfo]:
    """Return the header of a safetensors file that is not fetched, of which only the header is read.

    Raises:
        InputError: it cannot be parsed, or the URL cannot be read.
    """
    file = next(file for file in listing.files if file.name == name)
    with TemporaryDirectory() as folder:
        # The library itself reads it, from a file that is as large and takes no more room than the header.
        path = Path(folder) / name
        with path.open("wb") as begun:
            begun.write(_head(_ModelFolder(source.url), file))
            begun.truncate(file.size)
        try:
            return read_header(path)
        except InputError as error:
            raise _about(source, path, name, error) from error


def _head(place: RemoteFolder, file: ListedFile) -> bytes:
    """Return the first bytes of a safetensors file, up to the end of its header if that has a sound length."""
    head = place.read(file.name, 0, min(file.size, _FIRST))
    length = 8 + struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if len(head) < length <= min(file.size, _LONGEST):
        head += place.read(file.name, len(head), length)
    return head[:length]


def _about(source: UrlModel, path: Path, name: str, error: InputError) -> InputError:
    return InputError(str(error).replace(str(path), f"model {source}: {name}"))
