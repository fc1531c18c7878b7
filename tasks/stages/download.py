"""Where a model comes from: a local folder or a commit of a hub repository, listed, fetched and verified."""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import repo_folder_name

from sensmerge.tasks.artifacts import hash_file, read_json, sha256_text, write_json
from sensmerge.tasks.checkpoints.companions import WEIGHTS, is_companion, is_plain, local_files
from sensmerge.tasks.checkpoints.header import TensorInfo, read_header, tensor_info
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.stages.job import Job

CONFIGS = ["config.json", "adapter_config.json"]
READ = [WEIGHTS, "*.safetensors.index.json", *CONFIGS]
"""What is read of a model, at its top level; beside it, what travels into merged models (`is_companion`)."""
# Mistral's repositories hold every weight twice; the copy of this name is not in the Hugging Face layout.
FOREIGN = "consolidated*"
PICKLES = ["pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.ckpt"]


@dataclass(frozen=True)
class LocalModel:
    """A model in a folder of this machine (or of storage that all workers share)."""

    folder: Path

    def __str__(self) -> str:
        """Return the folder."""
        return str(self.folder)


@dataclass(frozen=True)
class HubModel:
    """A model in a repository of the hub."""

    repo: str
    revision: str
    """branch, tag or commit"""

    def __str__(self) -> str:
        """Return the source as a recipe spells it."""
        return f"hub:{self.repo}@{self.revision}"


@dataclass(frozen=True)
class ListedFile:
    """One file of a model.

    Raises:
        InputError: the name is not that of a file in the model's folder or a known subfolder of it.
    """

    name: str
    size: int
    """bytes"""
    digest: str
    """`sha256:…`, or `git:…` (git blob id) for small files of the hub"""

    def __post_init__(self) -> None:
        """Refuse a name with a drive, `..`, or a folder that no model has."""
        if not is_plain(self.name):
            raise InputError(f"listed file {self.name!r} is not a plain file name; do not use this model")


@dataclass(frozen=True)
class Listing:
    """The files of a model, and where they lie or will lie."""

    source: Local[LocalModel | HubModel]
    folder: Local[Path]
    """for a hub model, the snapshot folder of its commit in the cache"""
    revision: Local[str | None]
    """commit of a hub model"""
    files: tuple[ListedFile, ...]

    def missing(self) -> tuple[ListedFile, ...]:
        """Return the files that are not in the folder yet."""
        return tuple(file for file in self.files if not (self.folder / file.name).exists())


def parse_model_id(text: str, folder: Path) -> LocalModel | HubModel:
    """Read a recipe's `model:` string: a folder, or `hub:ORG/NAME@REVISION` (branch, tag or commit; default main).

    Args:
        text: the string; a relative path starts at `folder`, `~` is the home folder.
        folder: the recipe's folder.

    Raises:
        InputError: no such folder, or no valid id or revision.
    """
    if text.startswith("hub:"):
        repo, _, revision = text.removeprefix("hub:").strip().partition("@")
        if not _is_repo_id(repo):
            raise InputError(f"model {text!r}: {repo!r} is not the id of a repository; write hub:ORG/NAME@REVISION")
        # A revision becomes a file name in the cache; git itself allows no `..` in one.
        if not re.fullmatch(r"\w[\w./+-]*", revision or "main") or ".." in revision:
            raise InputError(f"model {text!r}: {revision!r} cannot be a revision; give a branch, a tag or a commit")
        return HubModel(repo, revision or "main")
    try:
        path = (folder / os.path.expanduser(text)).resolve()
        exists = path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"model {text!r}: cannot be a folder ({error})") from error
    if not exists:
        hint = f"; for a model on the hub write hub:{text}" if _is_repo_id(text.partition("@")[0]) else ""
        raise InputError(f"model {text!r}: no such folder {path}{hint}")
    return LocalModel(path)


def _is_repo_id(text: str) -> bool:
    try:
        repo_folder_name(repo_id=text, repo_type="model")  # checks the id first
    except HFValidationError:
        return False
    return True


def resolve(source: LocalModel | HubModel, cache: Path) -> Listing:
    """List the files of a model: weights in safetensors, configs, and the small files that travel into merged models.

    A branch or tag becomes a commit here, once; only the commit is used from then on. Where the hub cannot be reached
    (or `HF_HUB_OFFLINE=1`), the commit and list that it gave the last time are used. Of a folder every file is
    hashed; digests are kept in the cache by path, size and modification time.

    Args:
        source: the model.
        cache: folder of the hub's cache, and of the digests of local files.

    Raises:
        InputError: weights are missing or only in pickle form; the repository or revision does not exist or is not
            open to this user; the hub cannot be reached and the revision is not in the cache.
    """
    if isinstance(source, LocalModel):
        return Listing(source, source.folder, None, _local_files(source, cache))
    with _hub(source, cache) as api:
        commit = api.resolve_revision(source.repo, revision=source.revision, cache_dir=cache).resolved
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise InputError(f"model {source}: the hub at {api.endpoint} answers with {commit!r}, which is no commit")
        if (listing := _cached_listing(source, commit, cache)) is None:
            # Fetching the config, which every model has, makes the library keep the list of the commit's files.
            api.snapshot_download(source.repo, revision=commit, cache_dir=cache, allow_patterns=CONFIGS)
            listing = _cached_listing(source, commit, cache)
        if listing is None:
            # Without the hub the library makes do with a snapshot of which it does not know whether it is whole.
            raise LocalEntryNotFoundError("no list of its files is in the cache")
        return listing


def _cached_listing(source: HubModel, commit: str, cache: Path) -> Listing | None:
    """Return the listing of a commit if the library keeps its list of files; no request is made."""
    folder = _repo_folder(source, cache)
    # What `huggingface_hub.get_cached_repo_tree` reads; of that function's answer the sha256 digests are left out.
    path = folder / "trees" / f"{commit}.json"
    if not path.exists():
        return None
    tree: dict[str, dict[str, Any]] = read_json(path)["files"]
    for name in tree:
        # Git cannot hold such a path, so it did not come from a repository.
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"model {source}: lists {name!r}, outside its folder; do not use this model")
    files = []
    inner = [name for name in tree if "/" in name and fnmatch(name, WEIGHTS)]
    for name in sorted(_relevant({name: entry["size"] for name, entry in tree.items()}, source, inner)):
        sha256 = tree[name].get("lfs_sha256")
        files.append(
            ListedFile(name, tree[name]["size"], f"sha256:{sha256}" if sha256 else f"git:{tree[name]['blob_id']}")
        )
    return Listing(source, folder / "snapshots" / commit, commit, tuple(files))


def _local_files(source: LocalModel, cache: Path) -> tuple[ListedFile, ...]:
    """List a folder, hashing only files whose size or modification time is not the one of the last time."""
    if not source.folder.is_dir():
        raise InputError(f"model {source}: no such folder on this machine; workers must see it at the same path")
    record = cache / ".digests" / f"{sha256_text(str(source))[:16]}.json"
    known: dict[str, list[Any]] = read_json(record) if record.exists() else {}
    fresh: dict[str, list[Any]] = {}
    stats = {name: path.stat() for name, path in local_files(source.folder).items()}
    inner = [path.relative_to(source.folder).as_posix() for path in source.folder.glob(f"*/{WEIGHTS}")]
    for name in sorted(_relevant({name: stat.st_size for name, stat in stats.items()}, source, inner)):
        stat = stats[name]
        key = [stat.st_size, stat.st_mtime_ns]
        fresh[name] = known[name] if known.get(name, [])[:2] == key else [*key, _digest(source.folder / name, "sha256")]
    if fresh != known:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, fresh)
    return tuple(ListedFile(name, size, digest) for name, (size, _, digest) in fresh.items())


def _relevant(sizes: Mapping[str, int], source: LocalModel | HubModel, inner: Collection[str] = ()) -> set[str]:
    """Choose the files of a model that are read or travel, by name and bytes; check that weights are among them.

    Args:
        sizes: bytes by name.
        source: the model.
        inner: paths of safetensors files in its subfolders, for the message where it has none itself.

    Raises:
        InputError: no weights.
    """
    names = [name for name in sizes if "/" not in name]
    chosen = {name for name in names if any(fnmatch(name, pattern) for pattern in READ)}
    chosen = {name for name in chosen if not fnmatch(name, FOREIGN)}
    if not any(fnmatch(name, WEIGHTS) for name in chosen):
        pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
        if pickles:
            raise InputError(
                f"model {source}: its weights are only in pickle form ({pickles[0]}), which can run code and is not "
                "read; load it with transformers in a place you trust, and use the folder that save_pretrained writes"
            )
        raise InputError(f"model {source}: no weights found at its top level; {_other_place(names, inner)}")
    return chosen | {name for name, size in sizes.items() if is_companion(name, size)}


def _other_place(names: Collection[str], inner: Collection[str]) -> str:
    """Return what to do about a model without weights at its top level.

    Args:
        names: of its files there.
        inner: paths of safetensors files in its subfolders.
    """
    if any(fnmatch(name, FOREIGN) for name in names):
        return (
            "its consolidated files are in Mistral's own layout; expected a copy in the Hugging Face layout "
            "(model*.safetensors)"
        )
    if inner:
        folders = sorted({path.rpartition("/")[0] for path in inner})
        return f"expected *.safetensors files; there are some in {', '.join(folders[:3])}: give a folder that has them"
    return "expected *.safetensors files"


def small_files(listing: Listing, cache: Path) -> Path:
    """Fetch and verify all but the weights of a model (configs, index, tokenizer) and return its folder.

    Raises:
        InputError: as `DownloadJob`.
    """
    fetch_files(listing, [file.name for file in listing.files if not fnmatch(file.name, WEIGHTS)], cache)
    return listing.folder


def fetch_files(listing: Listing, names: Collection[str], cache: Path) -> None:
    """Fetch and verify some files of a model.

    Raises:
        InputError: as `DownloadJob`.
    """
    if isinstance(listing.source, HubModel):
        with _hub(listing.source, cache) as api:
            for file in listing.files:
                if file.name in names:
                    _fetch(api, listing, file, cache)


def safetensors_header(listing: Listing, name: str, cache: Path) -> dict[str, TensorInfo]:
    """Return what the header of a safetensors file says; of a file not fetched yet, only the header is read.

    Raises:
        InputError: the model has no such file, its header cannot be parsed, or the hub cannot be reached.
    """
    if name not in {file.name for file in listing.files}:
        raise InputError(f"model {listing.source}: has no file {name!r}, which its index names; use another revision")
    if isinstance(listing.source, LocalModel) or (listing.folder / name).exists():
        return read_header(listing.folder / name)
    repo = listing.source.repo
    with _hub(listing.source, cache) as api:
        # The reading of a range tells of a lost connection only by an exception of the HTTP library; this call, which
        # asks for the size of the file, by one of the hub's own.
        api.hf_hub_download(repo, name, revision=listing.revision, cache_dir=cache, dry_run=True)
        try:
            header = api.parse_safetensors_file_metadata(repo, name, revision=listing.revision)
        except SafetensorsParsingError as error:
            raise InputError(f"model {listing.source}: {name} is not a safetensors file ({error})") from error
    return {
        tensor: tensor_info(tensor, info.dtype, info.shape, listing.folder / name)
        for tensor, info in header.tensors.items()
    }


@dataclass(frozen=True)
class DownloadJob(Job):
    """Brings all files of a model to this machine and verifies them; files of a local folder stay where they are."""

    stage = "download"
    version = 2
    uses_torch = False

    listing: Listing
    """the model's files, from `resolve`"""
    cache: Local[Path]
    """folder of the hub's cache"""

    def finish(self, out: Path) -> dict[str, Any]:
        """Write `files.json`: source, folder, revision, and the files with name, size in bytes and sha256.

        Returns:
            folder, revision and bytes (total size of the files).

        Raises:
            InputError: not enough room on the disk; a file's digest is wrong twice; a local file changed after it was
                listed; the hub cannot be reached and not everything is in the cache.
        """
        listing = self.listing
        sha256 = _verified(listing, self.cache)
        files = [
            {"name": file.name, "size": file.size, "sha256": sha256[file.name].partition(":")[2]}
            for file in listing.files
        ]
        summary = {"folder": str(listing.folder), "revision": listing.revision}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "files.json", {"source": str(listing.source), **summary, "files": files})
        return {**summary, "bytes": sum(file.size for file in listing.files)}


def _verified(listing: Listing, cache: Path) -> dict[str, str]:
    """Return the sha256 digests of a model's files, fetched where they lie on the hub."""
    if not isinstance(listing.source, LocalModel):
        return _download(listing, listing.source, cache)
    changed = {file.name for file in {*listing.files} ^ {*_local_files(listing.source, cache)}}
    if changed:
        raise InputError(
            f"model {listing.source}: {', '.join(sorted(changed))} changed after it was planned; run again"
        )
    return {file.name: file.digest for file in listing.files}


def _download(listing: Listing, source: HubModel, cache: Path) -> dict[str, str]:
    """Fetch a hub model, several files at a time, and return the sha256 digests of its files."""
    cache.mkdir(parents=True, exist_ok=True)
    blobs = _repo_folder(source, cache) / "blobs"  # named by digest, and shared by the commits of a repository
    needed = sum(file.size for file in listing.missing() if not (blobs / file.digest.partition(":")[2]).exists())
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise InputError(
            f"model {source}: {needed} bytes to download, but {cache} has room for {free}; make room there"
        )
    with _hub(source, cache) as api:
        names = [escape(file.name) for file in listing.files]
        api.snapshot_download(source.repo, revision=listing.revision, cache_dir=cache, allow_patterns=names)
        return {file.name: _fetch(api, listing, file, cache) for file in listing.files}


def _fetch(api: HfApi, listing: Listing, file: ListedFile, cache: Path) -> str:
    """Fetch a file of a hub model unless it is in the cache, verify it and return its sha256 digest."""
    assert isinstance(listing.source, HubModel), listing.source
    for _ in range(2):
        path = Path(api.hf_hub_download(listing.source.repo, file.name, revision=listing.revision, cache_dir=cache))
        kind = file.digest.partition(":")[0]
        found = ListedFile(file.name, path.stat().st_size, _digest(path, kind))
        if found == file:
            return found.digest if kind == "sha256" else _digest(path, "sha256")
        # The library trusts a file for its name alone, so a bad one must go, and the blob that it links to first.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise InputError(
        f"model {listing.source}: {file.name} is damaged: expected {file.size} bytes with {file.digest}, found twice "
        f"{found.size} bytes with {found.digest}; it was removed; try again later or from another mirror"
    )


def _digest(path: Path, kind: str) -> str:
    """Hash a file in bounded memory; a git blob id is the sha1 of the header `blob SIZE NUL` and the content."""
    start = b"blob %d\0" % path.stat().st_size if kind == "git" else b""
    algorithm = "sha1" if kind == "git" else "sha256"
    return f"{kind}:{hash_file(path, hashlib.new(algorithm, start))}"


@contextmanager
def _hub(source: HubModel, cache: Path) -> Iterator[HfApi]:
    """Give a client of the hub that `HF_ENDPOINT` names; the user's mistakes and a lost connection become InputErrors.

    Only errors of huggingface_hub are caught: the HTTP library under it changes from version to version.
    """
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
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        status = error.response.status_code
        raise InputError(f"model {source}: {api.endpoint} refuses access ({status}); {login}") from error


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
