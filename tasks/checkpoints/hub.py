"""Models on the hub: the files of a commit, listed, fetched and verified."""

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from importlib import import_module
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import repo_folder_name

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.companions import WEIGHTS
from sensmerge.tasks.checkpoints.header import TensorInfo, tensor_info
from sensmerge.tasks.checkpoints.listing import CONFIGS, HubModel, ListedFile, Listing, relevant
from sensmerge.tasks.errors import InputError

VERIFIED = ".verified"
"""Folder, in the hub's cache, for the digests of its files that were compared with what the hub states."""
_ANSWERS = (401, 403, 404)
"""Statuses by which the hub itself says no."""
_LOG = logging.getLogger(__name__)


def list_commit(source: HubModel, cache: Path) -> Listing:
    """List the files of the commit that a revision names now; see `tasks.checkpoints.source.resolve`."""
    with _hub(source, cache) as api:
        commit = _commit(api, source, cache)
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise InputError(f"model {source}: the hub at {api.endpoint} answers with {commit!r}, which is no commit")
        if (listing := _cached_listing(source, commit, cache)) is None:
            # Fetching a file makes the library keep the list of the commit's files: the config, or what git has always.
            files = [*(escape(source.path(name)) for name in CONFIGS), ".gitattributes"]
            api.snapshot_download(source.repo, revision=commit, cache_dir=cache, allow_patterns=files)
            listing = _cached_listing(source, commit, cache)
        if listing is None:
            # Without the hub the library makes do with a snapshot of which it does not know whether it is whole.
            raise LocalEntryNotFoundError("no list of its files is in the cache")
        return listing


def _commit(api: HfApi, source: HubModel, cache: Path) -> str:
    """Return the commit that a revision names now, or named the last time where the hub answers with anything else."""
    try:
        return api.resolve_revision(source.repo, revision=source.revision, cache_dir=cache).resolved
    except (HfHubHTTPError, JSONDecodeError, _no_connection()) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _ANSWERS:
            raise
        try:
            cached = api.resolve_revision(
                source.repo, revision=source.revision, cache_dir=cache, local_files_only=True
            ).resolved
        except RevisionResolutionError:
            raise error from None
        _LOG.warning(
            "model %s: %s; the commit that it named the last time is used: %s",
            source,
            _odd_answer(api, error),
            cached,
        )
        return cached


def _no_connection() -> type[Exception]:
    """Return the error of the HTTP library under huggingface_hub, which passes on what it does not expect.

    Such as a proxy that refuses to connect. The library changes from version to version.
    """
    error: type[Exception] = import_module(type(get_session()).__module__.partition(".")[0]).TransportError
    return error


def _odd_answer(api: HfApi, error: Exception) -> str:
    """Say what somebody answered who may not be the hub, and what to do."""
    place, login = f"the hub at {api.endpoint}", "put its user and password into HTTPS_PROXY"
    if isinstance(error, JSONDecodeError):
        return f"{place} answers with something else than JSON, as a login page does; check HF_ENDPOINT and the proxy"
    if not isinstance(error, HfHubHTTPError):
        return f"{place} cannot be reached ({error}); check the proxy, and if it asks for a login (407), {login}"
    status, after = error.response.status_code, error.response.headers.get("Retry-After")
    if status == 429:
        wait = f"in {after} s" if after else "later"
        return f"{place} has had too many requests (429); try again {wait}, or log in, which allows more"
    if status == 407:
        return f"a proxy before the hub asks for a login (407); {login}"
    return f"{place} answers {status} {error.response.reason_phrase}; try again later"


def _cached_listing(source: HubModel, commit: str, cache: Path) -> Listing | None:
    """Return the listing of a commit if the library keeps its list of files; no request is made."""
    folder = _repo_folder(source, cache)
    # What `huggingface_hub.get_cached_repo_tree` reads; of that function's answer the sha256 digests are left out.
    path = folder / "trees" / f"{commit}.json"
    if not path.exists():
        return None
    tree: dict[str, dict[str, Any]] = load_object(path)["files"]
    for name in tree:
        # Git cannot hold such a path, so it did not come from a repository.
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"model {source}: lists {name!r}, outside its folder; do not use this model")
    files = []
    entries = {name: tree[path] for name, path in source.inside(tree).items()}
    if not entries:
        found = ", ".join(sorted({path.partition("/")[0] for path in tree if "/" in path})[:5]) or "none"
        raise InputError(f"model {source}: has no such subfolder; its folders: {found}")
    inner = [name for name in entries if "/" in name and fnmatch(name, WEIGHTS)]
    for name in sorted(relevant({name: entry["size"] for name, entry in entries.items()}, source, inner)):
        sha256 = entries[name].get("lfs_sha256")
        digest = f"sha256:{sha256}" if sha256 else f"git:{entries[name]['blob_id']}"
        files.append(ListedFile(name, entries[name]["size"], digest))
    return Listing(source, folder / "snapshots" / commit / source.subfolder, commit, tuple(files))


def fetch_files(source: HubModel, listing: Listing, names: Collection[str], cache: Path) -> None:
    """Fetch and verify some files of a model, whose folder then exists; errors as `fetch_all`."""
    listing.folder.mkdir(parents=True, exist_ok=True)
    with _hub(source, cache) as api:
        for file in listing.files:
            if file.name in names:
                _fetch(api, source, listing, file, cache)


def fetch_all(source: HubModel, listing: Listing, cache: Path) -> None:
    """Fetch all files of a model, several at a time, and verify them.

    Raises:
        InputError: not enough room on the disk; a file's digest is wrong twice; the hub cannot be reached and not
            everything is in the cache.
    """
    cache.mkdir(parents=True, exist_ok=True)
    blobs = _repo_folder(source, cache) / "blobs"  # named by digest, and shared by the commits of a repository
    needed = sum(file.size for file in listing.missing() if not (blobs / file.digest.partition(":")[2]).exists())
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise InputError(
            f"model {source}: {needed} bytes to download, but {cache} has room for {free}; make room there"
        )
    with _hub(source, cache) as api:
        names = [escape(source.path(file.name)) for file in listing.files]
        api.snapshot_download(source.repo, revision=listing.revision, cache_dir=cache, allow_patterns=names)
        for file in listing.files:
            _fetch(api, source, listing, file, cache)


def _fetch(api: HfApi, source: HubModel, listing: Listing, file: ListedFile, cache: Path) -> None:
    """Fetch a file of a model unless it is in the cache, and verify it unless it was verified as it is."""
    for _ in range(2):
        name = source.path(file.name)
        path = Path(api.hf_hub_download(source.repo, name, revision=listing.revision, cache_dir=cache))
        blob, stat = path.resolve(), path.stat()
        known = digests.find(blob, stat, cache / VERIFIED)
        digest = file.digest if known == file.digest else digests.compute(path, file.digest.partition(":")[0])
        found = ListedFile(file.name, stat.st_size, digest)
        if found == file:
            if digest != known and digest.startswith("sha256:"):  # the others are small
                digests.keep(blob, stat, digest, cache / VERIFIED)
            return
        # The library trusts a file for its name alone, so a bad one must go, and the blob that it links to first.
        blob.unlink()
        path.unlink(missing_ok=True)
    raise InputError(
        f"model {source}: {file.name} is damaged: expected {file.size} bytes with {file.digest}, found twice "
        f"{found.size} bytes with {found.digest}; it was removed; try again later or from another mirror"
    )


def doubt(path: Path, cache: Path) -> None:
    """Have a file in the cache verified again the next time that it is needed."""
    digests.forget(path.resolve(), cache / VERIFIED)


def remote_header(source: HubModel, listing: Listing, name: str, cache: Path) -> dict[str, TensorInfo]:
    """Return the header of a safetensors file that is not fetched, of which only the header is read.

    Raises:
        InputError: it cannot be parsed, or the hub cannot be reached.
    """
    repo, path = source.repo, source.path(name)
    with _hub(source, cache) as api:
        # The reading of a range tells of a lost connection only by an exception of the HTTP library; this call, which
        # asks for the size of the file, by one of the hub's own.
        api.hf_hub_download(repo, path, revision=listing.revision, cache_dir=cache, dry_run=True)
        try:
            header = api.parse_safetensors_file_metadata(repo, path, revision=listing.revision)
        except SafetensorsParsingError as error:
            raise InputError(f"model {source}: {name} is not a safetensors file ({error})") from error
    return {
        tensor: tensor_info(tensor, info.dtype, info.shape, listing.folder / name)
        for tensor, info in header.tensors.items()
    }


@contextmanager
def _hub(source: HubModel, cache: Path) -> Iterator[HfApi]:
    """Give a client of the hub of `HF_ENDPOINT` names; the user's mistakes and lost connections become InputErrors."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, library_name="sensmerge")
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield api
    except GatedRepoError as error:
        page = f"{api.endpoint}/{source.repo}"
        raise InputError(f"model {source}: its owner restricts access; ask for it at {page}, then {login}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"model {source}: no repository {source.repo} at {api.endpoint}; correct the name or, where it is private, "
            f"{login}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"model {source}: {source.repo} at {api.endpoint} has no branch, tag or commit {source.revision!r}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise InputError(
            f"model {source}: not whole in {cache}, and the hub at {api.endpoint} cannot be reached ({reason}); "
            f"{_whole_commits(source, cache)}"
        ) from error
    except (HfHubHTTPError, JSONDecodeError, _no_connection()) as error:
        if isinstance(error, HfHubHTTPError) and (status := error.response.status_code) in _ANSWERS:
            raise InputError(f"model {source}: {api.endpoint} refuses access ({status}); {login}") from error
        raise InputError(f"model {source}: {_odd_answer(api, error)}; {_whole_commits(source, cache)}") from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"model {source}: the token of the hub (HF_TOKEN, or that of `hf auth login`) holds a character that no "
            "token has; set it again"
        ) from error


def _whole_commits(source: HubModel, cache: Path) -> str:
    """Say which revisions of a repository can be used without the hub."""
    repo = _repo_folder(source, cache)
    refs = {path.relative_to(repo / "refs").as_posix(): path for path in repo.glob("refs/**/*") if path.is_file()}
    names = {path.name: path.name for path in repo.glob("snapshots/*")}
    names |= {path.read_text(): f"{ref} → {path.read_text()[:12]}" for ref, path in refs.items()}
    whole = []
    for commit, name in sorted(names.items()):
        try:
            listing = _cached_listing(source, commit, cache)
        except InputError:
            continue  # not a model that can be used
        if listing is not None and all((listing.folder / file.name).exists() for file in listing.files):
            whole.append(name)
    return f"cached: {', '.join(whole)}" if whole else "nothing of it is cached"


def _repo_folder(source: HubModel, cache: Path) -> Path:
    """Return where the hub's library keeps a repository in its cache."""
    return cache.resolve() / repo_folder_name(repo_id=source.repo, repo_type="model")
