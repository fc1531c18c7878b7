"""A model wherever it lies: its files listed and verified; its headers and small files read before its weights come."""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from sensmerge.tasks.checkpoints import hub, url
from sensmerge.tasks.checkpoints.companions import WEIGHTS
from sensmerge.tasks.checkpoints.header import TensorInfo, read_header
from sensmerge.tasks.checkpoints.listing import HubModel, Listing, LocalModel, ModelSource, UrlModel, list_folder
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.errors import InputError


def resolve(source: ModelSource, cache: Path) -> Listing:
    """List the files of a model: weights in safetensors, configs, and the small files that travel into merged models.

    A branch or tag becomes a commit here, once; only the commit is used from then on. Where the hub cannot be reached
    (or `HF_HUB_OFFLINE=1`), the commit and list that it gave the last time are used. Of a folder no weights are read:
    those that nobody has read yet have no digest (`Listing.hashed` gives them one). A model at a URL is known by what
    the server says of its files.

    Args:
        source: the model.
        cache: folder of the hub's cache, and of the digests of local files.

    Raises:
        InputError: weights are missing or only in pickle form; the repository or revision does not exist or is not
            open to this user; the hub cannot be reached and the revision is not in the cache; the URL cannot be used.
    """
    match source:
        case HubModel():
            return hub.list_commit(source, cache)
        case UrlModel():
            return url.list_url(source, cache)
        case LocalModel():
            return list_folder(source, cache)


def small_files(listing: Listing, cache: Path) -> Path:
    """Fetch and verify all but the weights of a model (configs, index, tokenizer) and return its folder.

    Raises:
        InputError: as `fetch_files`.
    """
    fetch_files(listing, [file.name for file in listing.files if not fnmatch(file.name, WEIGHTS)], cache)
    return listing.folder


def fetch_files(listing: Listing, names: Collection[str], cache: Path) -> None:
    """Fetch and verify some files of a model.

    Raises:
        InputError: a file's digest is wrong twice, or the hub cannot be reached and not all of them are in the cache;
            a file at a URL changed, or cannot be read.
    """
    match listing.source:
        case HubModel():
            hub.fetch_files(listing.source, listing, names, cache)
        case UrlModel():
            url.fetch_files(listing.source, listing, names, cache)


def safetensors_header(listing: Listing, name: str, cache: Path) -> dict[str, TensorInfo]:
    """Return what the header of a safetensors file says; of a file not fetched yet, only the header is read.

    Raises:
        InputError: the model has no such file, its header cannot be parsed, or hub or URL cannot be reached.
    """
    if name not in {file.name for file in listing.files}:
        raise InputError(f"model {listing.source}: has no file {name!r}, which its index names; use another revision")
    if isinstance(listing.source, LocalModel) or (listing.folder / name).exists():
        return read_header(listing.folder / name)
    if isinstance(listing.source, UrlModel):
        return url.remote_header(listing.source, listing, name)
    return hub.remote_header(listing.source, listing, name, cache)


def bring(listing: Listing, cache: Path, tensors: Tensors | None = None) -> None:
    """Have a model's files on this machine, which need not be the one that planned with it or downloaded it.

    Args:
        listing: the model.
        cache: as in `resolve`.
        tensors: all that is read of its weights, and perhaps of others'; None: whole files. Of a model at a URL, only
            that comes of large files.

    Raises:
        InputError: as `fetch_files`; a local file stays what it is, here or not.
    """
    if isinstance(listing.source, UrlModel):
        url.bring(listing.source, listing, cache, tensors)
    elif listing.missing():
        fetch_files(listing, [file.name for file in listing.files], cache)


def verify(listing: Listing, cache: Path) -> None:
    """Bring all files of a model to this machine and verify them; of what was read as it is, nothing is read again.

    The files of one at a URL come to the machines where they are read (`bring`); here it is asked for their states.

    Raises:
        InputError: not enough room on the disk; a file's digest is wrong twice; a local file, or one at a URL, changed
            after it was listed; the hub cannot be reached and not everything is in the cache.
    """
    if isinstance(listing.source, HubModel):
        hub.fetch_all(listing.source, listing, cache)
        return
    if isinstance(listing.source, UrlModel):
        url.check(listing.source, listing, cache)
        return
    now = list_folder(listing.source, cache)
    for file in now.unhashed():
        now = now.hashed(file.name, cache)
    changed = {file.name for file in {*listing.files} ^ {*now.files}}
    if changed:
        raise InputError(
            f"model {listing.source}: {', '.join(sorted(changed))} changed after it was planned; run again"
        )
