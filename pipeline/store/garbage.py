"""What a store does not need: artifacts that no alias, pinned version, server or recent run uses."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from huggingface_hub import CachedRepoInfo, scan_cache_dir

from sensmerge.pipeline.store.history import past_runs, unfinished_runs
from sensmerge.pipeline.store.manifest import FINGERPRINT
from sensmerge.pipeline.store.store import PARTIAL, Store, stages
from sensmerge.tasks.artifacts import parse_json
from sensmerge.tasks.serving import lease


class RegisteredVersion(Protocol):
    """A version of a registered model, of which the store may hold the weights."""

    @property
    def artifact(self) -> str:
        """The artifact that it loads, `stage/name-hash8`."""

    @property
    def stays(self) -> str | None:
        """Why the artifact has to stay; None if it need not."""


@dataclass(frozen=True)
class Garbage:
    """What can be freed."""

    folders: list[Path]
    """artifacts, and what is left of some that were never finished"""
    revisions: list[str]
    """commits of hub models that no kept artifact is of"""
    rows: list[Path]
    """files of rows that no kept artifact was made with"""
    freed: dict[str, int]
    """bytes, by each of both; what hard links share counts where its last link goes"""


def needed_artifacts(store: Store, last: int, registered: Iterable[RegisteredVersion]) -> dict[str, str]:
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


def find_garbage(store: Store, needed: Iterable[str]) -> Garbage:
    """Return what of a store is not needed; the store is locked, so nothing in it is at work."""
    keep = set(needed)
    keep |= {f"{name}{PARTIAL}" for name in keep}  # from where an interrupted step goes on
    folders = [folder for stage in stages() for folder in store.folders(stage) if f"{stage}/{folder.name}" not in keep]
    freed = dict(zip((f"{one.parent.name}/{one.name}" for one in folders), _freed_bytes(store, folders), strict=True))
    revisions: list[str] = []
    used = _used_revisions(store, keep)
    if used is not None and store.hub_cache.is_dir():
        for repo in sorted(scan_cache_dir(store.hub_cache).repos, key=lambda repo: repo.repo_id):
            unused = sorted(revision.commit_hash for revision in repo.revisions if revision.commit_hash not in used)
            revisions += unused
            freed |= {f"hub:{repo.repo_id}@{commit[:12]}": _size(repo, commit) for commit in unused}
    rows = _unused_rows(store, keep)
    freed |= {f"rows/{file.name}": file.stat().st_size for file in rows}
    return Garbage(folders, revisions, rows, freed)


def delete(store: Store, garbage: Garbage) -> set[str]:
    """Delete what was found, and the leases of servers that are gone; return the artifacts, `stage/name-hash8`."""
    for folder in garbage.folders:
        store.remove(folder)
    if store.remote is not None:
        store.remote.abandon()
    for file in garbage.rows:
        store.remove_file(file)
    for one in lease.held(str(store)):
        if not one.is_live:
            lease.release(str(store), one)
    if garbage.revisions:
        scan_cache_dir(store.hub_cache).delete_revisions(*garbage.revisions).execute()
    return {f"{folder.parent.name}/{folder.name}" for folder in garbage.folders}


def _unused_rows(store: Store, keep: set[str]) -> list[Path]:
    """Return the files of rows whose digest is in no kept fingerprint; an unfinished run writes its rows again."""
    prints = [store.root / name / FINGERPRINT for name in keep]
    used = [path.read_text() for path in prints if path.is_file()]
    return [file for file in sorted(store.rows.glob("*.json")) if not any(file.stem in one for one in used)]


def _used_revisions(store: Store, keep: set[str]) -> set[str] | None:
    """Return the commits of hub models that are needed; None if some are not known, since a download goes on."""
    files = [store.root / name / "files.json" for name in keep if name.startswith("download/")]
    files = [path for path in files if not path.parent.name.endswith(PARTIAL)]
    if not all(path.is_file() for path in files):
        return None
    try:
        return {parse_json(path.read_bytes())["revision"] for path in files}
    except (ValueError, KeyError, TypeError):  # damaged: what it needs is not known either
        return None


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
