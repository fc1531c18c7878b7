"""Models at a URL: files listed with what the server says of their content, and brought to who reads them."""

import shutil
import struct
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from sensmerge.tasks.artifacts import canonical, sha256_text
from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.companions import WEIGHTS
from sensmerge.tasks.checkpoints.header import TensorInfo, read_header
from sensmerge.tasks.checkpoints.listing import ListedFile, Listing, UrlModel, relevant
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


def fetch_files(source: UrlModel, listing: Listing, names: Collection[str], cache: Path) -> None:
    """Bring some files of a model to this machine, unless they are there as they came; one process does it at a time.

    Raises:
        InputError: no room on the disk; a file is not there, is another one than was listed, or cannot be read.
    """
    listing.folder.mkdir(parents=True, exist_ok=True)
    lock = cache / LOCKS / f"{sha256_text(str(listing.folder))[:32]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        wanted = [file for file in listing.files if file.name in names and not is_as_it_came(listing, file, cache)]
        if not wanted:
            return
        needed, free = sum(file.size for file in wanted), shutil.disk_usage(listing.folder).free
        if needed > free:
            raise InputError(
                f"model {source}: {needed} bytes to fetch, but {cache} has room for {free}; make room there"
            )
        place = _ModelFolder(source.url)
        files = {file.name: RemoteFile(file.size, file.digest.removeprefix("etag:")) for file in wanted}
        place.bring(files, {name: listing.folder / name for name in files})
        now = place.files(depth=_DEPTH)
        for name, file in files.items():
            path = listing.folder / name
            if now.get(name) != file:
                path.unlink()
                raise _changed(source, [name])
            digests.keep(path, path.stat(), digests.compute(path, "blake3"), cache / FETCHED)


def is_as_it_came(listing: Listing, file: ListedFile, cache: Path) -> bool:
    """Return whether a file of a model at a URL is on this machine, and nobody has written to it since."""
    path = listing.folder / file.name
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == file.size and digests.find(path, stat, cache / FETCHED) is not None


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
    size = next(file.size for file in listing.files if file.name == name)
    place = _ModelFolder(source.url)
    head = place.read(name, 0, min(size, _FIRST))
    length = 8 + struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if len(head) < length <= min(size, _LONGEST):
        head += place.read(name, len(head), length)
    with TemporaryDirectory() as folder:
        # The library itself reads it, from a file that is as large and takes no more room than the header.
        path = Path(folder) / name
        with path.open("wb") as file:
            file.write(head[:length])
            file.truncate(size)
        try:
            return read_header(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), f"model {source}: {name}")) from error
