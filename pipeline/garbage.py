"""What a store could do without: artifacts that no champion, no challenger and none of the last runs needs."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from huggingface_hub import CachedRepoInfo, scan_cache_dir

from pipeline.history import past_runs, public, unfinished_runs
from pipeline.recipe import Stage
from pipeline.registry import Registered, mark_freed, registered_versions
from pipeline.store import PARTIAL, Store
from pipeline.tracking_uri import SQLITE, TRACKING_URI, check_server, default_uri
from tasks import lease
from tasks.artifacts import read_json
from tasks.errors import InputError


@dataclass(frozen=True)
class Garbage:
    """What can be freed."""

    folders: list[Path]
    """artifacts, and what is left of some that were never finished"""
    revisions: list[str]
    """commits of hub models that no kept artifact is of"""
    freed: dict[str, int]
    """bytes, by each of both; what hard links share counts where its last link goes"""


def needed_artifacts(store: Store, last: int, registered: Iterable[Registered]) -> dict[str, str]:
    """Return by `stage/name-hash8` what has to stay, and why.

    Args:
        store: the store.
        last: how many runs of each recipe to keep.
        registered: versions of models in the registry.
    """
    needed: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for run in reversed(past_runs(store)):
        seen[run.recipe] += 1
        if seen[run.recipe] <= last:
            needed |= dict.fromkeys(run.artifacts, f"run of {run.recipe}, {run.ended}")
    for run in unfinished_runs(store):
        needed |= dict.fromkeys(run.artifacts, f"unfinished run of {run.recipe}")
    served = [one for one in lease.held(str(store)) if one.is_live]
    needed |= {one.artifact: f"served by {one.host}" for one in served}
    # Another machine may have the store elsewhere; what an artifact is called in it is the same.
    return needed | {version.artifact: version.stays for version in registered if version.stays is not None}


def known_versions(store: Store, tracking_uri: str | None) -> dict[str, list[Registered]]:
    """Return the versions of models that MLflow knows, by tracking URI.

    Args:
        store: the store.
        tracking_uri: whom to ask; None for every place where runs of the store were recorded, and that which
            `MLFLOW_TRACKING_URI` names.

    Raises:
        InputError: one of them cannot be asked.
    """
    asked = {run.tracking_uri for run in past_runs(store)} if tracking_uri is None else {tracking_uri}
    named = os.environ.get(TRACKING_URI) if tracking_uri is None else None
    if named:  # with the password that the history leaves out
        asked = asked - {public(named)} | {named}
    uris = {uri or default_uri(store) for uri in asked}
    versions = {}
    for uri in sorted(uris):
        check_server(uri)
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
            raise InputError(
                f"--tracking-uri, or {TRACKING_URI}, is {uri}: no such file; name the MLflow that knows the store's "
                "champions"
            )
        versions[uri] = registered_versions(uri)
    return versions


def find_garbage(store: Store, needed: Iterable[str]) -> Garbage:
    """Return what of a store is not needed; the store is locked, so nothing in it is at work."""
    keep = set(needed)
    keep |= {f"{name}{PARTIAL}" for name in keep}  # from where an interrupted step goes on
    folders = [
        folder
        for stage in get_args(Stage)
        for folder in sorted((store.root / stage).glob("*/"))
        if f"{stage}/{folder.name}" not in keep
    ]
    freed = dict(zip((f"{one.parent.name}/{one.name}" for one in folders), _freed_bytes(store, folders), strict=True))
    revisions: list[str] = []
    used = _used_revisions(store, keep)
    if used is not None and store.hub_cache.is_dir():
        for repo in sorted(scan_cache_dir(store.hub_cache).repos, key=lambda repo: repo.repo_id):
            unused = sorted(revision.commit_hash for revision in repo.revisions if revision.commit_hash not in used)
            revisions += unused
            freed |= {f"hub:{repo.repo_id}@{commit[:12]}": _size(repo, commit) for commit in unused}
    return Garbage(folders, revisions, freed)


def delete(store: Store, garbage: Garbage, versions: Mapping[str, Sequence[Registered]]) -> list[Registered]:
    """Delete what was found, and mark the versions in MLflow that lose their weights by it; return these.

    Args:
        store: the store.
        garbage: what to delete.
        versions: by tracking URI, as `known_versions` returns them.
    """
    for folder in garbage.folders:
        store.remove(folder)
    for one in lease.held(str(store)):
        if not one.is_live:
            lease.release(str(store), one)
    if garbage.revisions:
        scan_cache_dir(store.hub_cache).delete_revisions(*garbage.revisions).execute()
    deleted = {f"{folder.parent.name}/{folder.name}" for folder in garbage.folders}
    marked: list[Registered] = []
    for uri, some in versions.items():
        # Another store may have an artifact of the same name, which is as good.
        freed = [one for one in some if one.artifact in deleted and not one.is_marked and store.lacking(one.folder)]
        mark_freed(uri, freed)
        marked += freed
    return marked


def _used_revisions(store: Store, keep: set[str]) -> set[str] | None:
    """Return the commits of hub models that are needed; None if some are not known, since a download goes on."""
    files = [store.root / name / "files.json" for name in keep if name.startswith("download/")]
    files = [path for path in files if not path.parent.name.endswith(PARTIAL)]
    if not all(path.is_file() for path in files):
        return None
    return {read_json(path)["revision"] for path in files}


def _size(repo: CachedRepoInfo, commit: str) -> int:
    """Return what a commit takes that no other commit of its repository has."""
    others = {file.blob_path for one in repo.revisions if one.commit_hash != commit for file in one.files}
    (revision,) = (one for one in repo.revisions if one.commit_hash == commit)
    return sum(file.size_on_disk for file in revision.files if file.blob_path not in others)


def _freed_bytes(store: Store, folders: Iterable[Path]) -> list[int]:
    if store.remote is not None:
        return [store.remote_bytes(folder) for folder in folders]
    removed: Counter[tuple[int, int]] = Counter()
    freed = []
    for folder in folders:
        size = 0
        for path in folder.rglob("*"):
            if path.is_file():
                stat = path.stat()
                removed[stat.st_dev, stat.st_ino] += 1
                size += stat.st_size if removed[stat.st_dev, stat.st_ino] == stat.st_nlink else 0
        freed.append(size)
    return freed
