"""The artifact store: one folder per step, found by the fingerprint of everything its content depends on.

A store at a URL has a folder on this machine as well, where artifacts are made and read. What is made is uploaded at
once; what others made is downloaded when it is needed, its small files as soon as the store is opened.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store.differences import differences
from sensmerge.pipeline.store.lock import LOCKS, RemoteClaims, alone, held, is_held
from sensmerge.pipeline.store.manifest import (
    FINGERPRINT,
    MANIFEST,
    PLANS,
    RUNS,
    SMALL,
    State,
    altered,
    file_sizes,
    read_fingerprint,
    read_manifest,
    tidy,
    what_is_wrong,
)
from sensmerge.pipeline.store.remote import SYNCED, Remote, lacking_at
from sensmerge.tasks.artifacts import checksum_file, ordered, sha256_text, write_json
from sensmerge.tasks.checkpoints.listing import DIGESTS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.remote import RemoteFile
from sensmerge.tasks.serving.lease import LEASES
from sensmerge.tasks.stages.job import Job

ROWS = "rows"
"""Folder of the rows that steps read."""
PARTIAL = ".partial"
"""Ending of the folder of an artifact under construction."""
RECEIPT = ".bundle-"
"""Begin of the name of a file, at a URL, that says which files of an artifact are there already (`store.sent`)."""
CACHE = "SENSMERGE_CACHE"
"""Environment variable: where the local folders of stores at URLs are."""
LOOKS = 16
"""How many folders at a URL are looked at side by side."""


def cache_folder() -> Path:
    """Return where local folders of stores at URLs are, and what else a user's runs leave on this machine."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "sensmerge")


@dataclass(frozen=True)
class Key:
    """What names an artifact: stage, readable name, and the canonical inputs whose sha256 is the fingerprint."""

    stage: str
    name: str
    inputs: Mapping[str, Any]
    """what the job's identity says: stage, version, and all that the result depends on"""

    @classmethod
    def of(cls, name: str, job: Job) -> "Key":
        """Return the key of the artifact that a job makes."""
        return cls(job.stage, name, job.identity())

    @property
    def fingerprint(self) -> str:
        """sha256 over the JSON of the inputs, in their order."""
        return sha256_text(ordered(self.inputs))


@dataclass(frozen=True)
class Store:
    """Artifacts under one root folder: `stage/name-hash8/`, manifest written last, then renamed into place."""

    root: Path
    """on this machine"""
    remote: Remote | None = None
    """of a store at a URL"""
    cache: Path | None = None
    """for what comes from the hub, and digests, where there is no root yet (`pipeline.store.unmade`)"""
    _listed: dict[str, RemoteFile] = field(default_factory=dict, init=False, repr=False, compare=False)
    """files of the remote store when it was last looked at, by their path"""
    _intact: set[State] = field(default_factory=set, init=False, repr=False, compare=False)
    """of small files that have been found to be as they were written"""
    _claim: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """token of the claim by which this run holds a store at a URL"""

    @classmethod
    def open(cls, place: str) -> "Store":
        """Return the store at a URL that fsspec knows, or in a folder; neither need exist."""
        if "://" not in place:
            return cls(Path(place).absolute())
        url = place.rstrip("/")
        return cls(cache_folder().absolute() / f"{url.rpartition('/')[2]}-{sha256_text(url)[:8]}", Remote(url))

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was listed behind when travelling to a worker, which does not look at the URL."""
        return {"root": self.root, "remote": self.remote, "_listed": {}, "_intact": set(), "_claim": self._claim}

    def __str__(self) -> str:
        """Return what `open` takes."""
        return str(self.root) if self.remote is None else self.remote.url

    def uri(self, folder: Path) -> str:
        """Return the URI of an artifact for all who may read the store."""
        if self.remote is None:
            return folder.resolve().as_uri()
        return f"{self.remote.url}/{self.path_of(folder)}"

    def lacking(self, uri: str) -> str | None:
        """Say what an artifact lacks, by its manifest and the sizes of its files; None if it is whole.

        Another machine may have the store elsewhere: what is whole under the same name in this one is whole.

        Args:
            uri: of the artifact's folder, as `uri` gives it.
        """
        gone = lacking_at(uri)
        stage, name = uri.rstrip("/").split("/")[-2:]
        here = self.uri(self.root / stage / name)
        return gone if gone is None or here == uri or lacking_at(here) else None

    def path_of(self, folder: Path) -> str:
        """Return the path of something in the store from its root, here and at the URL."""
        return folder.relative_to(self.root).as_posix()

    @property
    def hub_cache(self) -> Path:
        """Folder of the models that come from the hub, and of the digests of those that do not."""
        return self.cache or self.root / "hub"

    @property
    def rows(self) -> Path:
        """Folder of the rows that steps read; every run writes those that it needs."""
        return self.root / ROWS

    def folder(self, key: Key) -> Path:
        """Return the folder of an artifact, whether it exists or not."""
        return self.root / key.stage / f"{key.name.replace('/', '--')}-{key.fingerprint[:8]}"

    def named(self, key: Key) -> Key:
        """Return a key with the name under which the store has the artifact, if it has it: variants are renamed."""
        if not self.folder(key).exists():
            for path in sorted(self.root.glob(f"{key.stage}/*-{key.fingerprint[:8]}/{MANIFEST}")):
                other = replace(key, name=str((read_manifest(path.parent) or {}).get("name")))
                if self.folder(other) == path.parent and self.manifest(other) is not None:
                    return other
        return key

    def partial(self, key: Key, bundle: int | None = None) -> Path:
        """Return the folder where an artifact, or a bundle of it, is under construction, beside the final one."""
        folder = self.folder(key)
        return folder.with_name(f"{folder.name}{'' if bundle is None else f'.{bundle}'}{PARTIAL}")

    def manifest(self, key: Key) -> dict[str, Any] | None:
        """Return an artifact's manifest; None if it does not exist: without a manifest, or with files gone or cut.

        At a URL, what was there when it was last looked at counts, not what is in the local folder.
        """
        if self.remote is None:
            return self.local_manifest(key)
        listed = self._listed
        return self._manifest(
            key, lambda path: listed[self.path_of(path)].size if self.path_of(path) in listed else None
        )

    def local_manifest(self, key: Key) -> dict[str, Any] | None:
        """Return the manifest of an artifact that is whole on this machine, its small files as they were written."""
        manifest = self._manifest(key, lambda path: path.stat().st_size if path.is_file() else None)
        return None if manifest is None or altered(self.folder(key), manifest, self._intact) else manifest

    def _manifest(self, key: Key, size_of: Callable[[Path], int | None]) -> dict[str, Any] | None:
        folder = self.folder(key)
        if size_of(folder / MANIFEST) is None:
            return None
        manifest = read_manifest(folder)
        whole = manifest is not None and all(size_of(folder / name) == size for name, size in manifest["files"].items())
        return manifest if whole and manifest is not None and manifest["fingerprint"] == key.fingerprint else None

    def publish(
        self,
        key: Key,
        manifest: Mapping[str, Any],
        by_tensor: Collection[str] = (),
        sent: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Turn the partial folder into the artifact: fingerprint and manifest written last, then one rename.

        Args:
            key: the artifact.
            manifest: what else its manifest says.
            by_tensor: large files that the stage has read back itself, and of which it has a digest by tensor.
            sent: bytes of those of them that are at the URL and not here (`store.sent`).
        """
        partial, folder = self.partial(key), self.folder(key)
        tidy(partial)
        write_json(partial / FINGERPRINT, key.inputs)
        about = {"stage": key.stage, "name": key.name, "fingerprint": key.fingerprint}
        files = file_sizes(partial)
        checksums = {name: checksum_file(partial / name) for name in files if name not in by_tensor}
        files = dict(sorted((files | dict(sent)).items()))
        write_json(partial / MANIFEST, about | dict(manifest) | {"files": files, "checksums": checksums})
        if folder.exists():  # an artifact that lost files
            shutil.rmtree(folder)
        partial.rename(folder)
        self.upload(folder)

    def upload(self, folder: Path, *names: str, source: Path | None = None) -> None:
        """Write an artifact, or some files of it, which may lie in another folder, to where all see it."""
        if self.remote is None:
            return
        self._check_claim(self.remote)
        files = names or [name for name in file_sizes(folder) if name != SYNCED]
        self.remote.upload(source or folder, self.path_of(folder), files, last=None if names else MANIFEST)

    def upload_digests(self) -> None:
        """Write the digests of local files, by which all know them, to where all see them."""
        self._upload_new(self.hub_cache / DIGESTS)

    def upload_rows(self) -> None:
        """Write the rows that steps read to where all see them."""
        self._upload_new(self.rows)

    def _upload_new(self, folder: Path) -> None:
        if self.remote is not None:
            names = [path.name for path in folder.glob("*.json") if self.path_of(path) not in self._listed]
            if names:
                self.remote.upload(folder, self.path_of(folder), names)

    def _check_claim(self, remote: Remote) -> None:
        """Check that the store at the URL is still this run's, if it was.

        Raises:
            InputError: another run took it over.
        """
        if any(not is_held(remote, token) for token in self._claim):
            raise InputError(
                f"--store {remote.url}: another run took it over, since this one could not renew its lock in time (its "
                "machine slept, or the server did not answer); nothing more is written; run again"
            )

    def look(self) -> None:
        """See what is at the URL by now, and download the small files of it; nothing to do for a store in a folder."""
        if self.remote is None:
            return
        found = self.remote.files()
        self._listed.clear()
        self._listed.update(found)
        folders: dict[str, dict[str, RemoteFile]] = {}
        for path, file in found.items():
            stage, _, rest = path.partition("/")
            is_receipt = rest.rpartition("/")[2].startswith(RECEIPT)
            if rest and stage not in (LEASES, LOCKS) and file.size <= SMALL and not is_receipt:
                folders.setdefault(RUNS if stage == RUNS else "/".join(path.split("/")[:-1][:2]), {})[path] = file
        download = self.remote.download
        with ThreadPoolExecutor(LOOKS) as pool:
            for done in [pool.submit(download, files, one, self.root / one) for one, files in folders.items()]:
                done.result()
        for local in (self.root / RUNS).rglob("*.json"):
            if self.path_of(local) not in found:
                local.unlink()

    def fetch(self, key: Key, patterns: Sequence[str] = ("*",)) -> None:
        """Have an artifact, or those files that a pattern matches, on this machine; a store in a folder has them."""
        if self.remote is not None:
            folder = self.path_of(self.folder(key))
            listed = {path: file for path, file in self._listed.items() if path.startswith(f"{folder}/")}
            files = {
                path: file
                for path, file in listed.items()
                if any(fnmatch(path.removeprefix(f"{folder}/"), pattern) for pattern in patterns)
            }
            self.remote.download(files, folder, self.folder(key))

    @contextmanager
    def copy(self, folder: Path) -> Iterator[Path]:
        """Give an artifact as it is where all see it: the folder itself, or a fresh download, one at a time."""
        path, copy = self.path_of(folder), self.root / f".copy{PARTIAL}"
        shutil.rmtree(copy, ignore_errors=True)  # who was killed at one has left it
        try:
            if self.remote is not None:
                self.remote.download(self.remote.files(path), path, copy)
            yield folder if self.remote is None else copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def remote_bytes(self, folder: Path) -> int:
        """Return the bytes that an artifact takes at the URL."""
        return sum(file.size for path, file in self._listed.items() if path.startswith(f"{self.path_of(folder)}/"))

    def remove(self, folder: Path) -> None:
        """Delete an artifact, or what is left of one: manifest first, so that none looks whole; and all kept plans."""
        if self.remote is not None:
            self._check_claim(self.remote)
            self.remote.remove(self.path_of(folder), first=MANIFEST)
        (folder / MANIFEST).unlink(missing_ok=True)
        if folder.exists():  # of what was sent, nothing need be here
            shutil.rmtree(folder)
        shutil.rmtree(self.root / PLANS, ignore_errors=True)

    def write_run(self, path: Path, run: Mapping[str, Any]) -> None:
        """Write a JSON file below `runs`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        if self.remote is not None:
            self._check_claim(self.remote)
            self.remote.upload(self.root / RUNS, RUNS, [path.relative_to(self.root / RUNS).as_posix()])

    def remove_file(self, path: Path) -> None:
        """Delete a file, if it is there."""
        path.unlink(missing_ok=True)
        if self.remote is not None:
            self._check_claim(self.remote)
            self.remote.remove(self.path_of(path))

    def why(self, key: Key) -> str:
        """Say why an artifact has to be made: what differs from the newest artifact of the same stage and name."""
        if self.partial(key).exists():
            return "was interrupted"
        if self.folder(key).exists():
            return what_is_wrong(self.folder(key))
        last = self.last(key)
        before = None if last is None else read_fingerprint(last)
        if before is None:
            return "new"
        if before.keys() != key.inputs.keys():
            return "made by another version of sensmerge"
        return "; ".join(differences(before, dict(key.inputs))[:3]) or "the order of its settings changed"

    def last(self, key: Key) -> Path | None:
        """Return the newest artifact of the same stage and name, whatever its fingerprint; None if there is none."""
        stem = f"{key.name.replace('/', '--')}-"
        found = [
            path for path in self.root.glob(f"{key.stage}/{stem}*/{MANIFEST}") if len(path.parent.name) == len(stem) + 8
        ]
        return max(found, key=lambda path: path.stat().st_mtime).parent if found else None

    def artifacts(self, stage: str) -> list[Path]:
        """Return the folders of all artifacts of a stage; those at the URL, of a store at one."""
        found = [
            path.parent for path in sorted(self.root.glob(f"{stage}/*/{MANIFEST}")) if path.parent.suffix != PARTIAL
        ]
        return [one for one in found if self.remote is None or f"{self.path_of(one)}/{MANIFEST}" in self._listed]

    def folders(self, stage: str) -> list[Path]:
        """Return the folders of a stage here and at the URL: artifacts, and what is left of some never finished."""
        here = set((self.root / stage).glob("*/"))
        names = {tuple(path.split("/")[:2]) for path in self._listed if path.startswith(f"{stage}/")}
        return sorted(here | {self.root.joinpath(*parts) for parts in names})

    def make(self) -> None:
        """Make the root folder.

        Raises:
            InputError: it cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--store {self.root}: cannot be made ({error.strerror}); choose another one") from error

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """Hold the store for one run.

        Args:
            wait: seconds to wait for another run to end.

        Raises:
            InputError: another run holds it after that time, or it cannot be made or written.
        """
        self.make()
        begin = time.monotonic()
        with alone(self.root, wait):
            if self.remote is None:
                yield
                return
            left = max(0.0, begin + wait - time.monotonic())
            with held(RemoteClaims(self.remote), self.remote.url, left) as claim:
                self._claim.append(claim.token)
                try:
                    self.look()
                    yield
                finally:
                    self._claim.clear()


def stages() -> tuple[str, ...]:
    """Return the names of the folders that artifacts are in, those of earlier versions included."""
    return (*get_args(Stage), "sensitivity")
