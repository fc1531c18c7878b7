"""The artifact store: one folder per step, found by the fingerprint of everything its content depends on."""

import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.artifacts import canonical, checksum_file, read_json, sha256_text, write_json
from tasks.errors import InputError

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"
PARTIAL = ".partial"
"""Ending of the folder of an artifact under construction."""


@dataclass(frozen=True)
class Key:
    """What names an artifact: stage, readable name, and the canonical inputs whose sha256 is the fingerprint."""

    stage: str
    name: str
    inputs: Mapping[str, Any]
    """stage, version of the stage, semantic settings, digests of what is read"""

    @property
    def fingerprint(self) -> str:
        """sha256 over the canonical JSON of the inputs."""
        return sha256_text(canonical(self.inputs))


@dataclass(frozen=True)
class Store:
    """Artifacts under one root folder: `stage/name-hash8/`, manifest written last, then renamed into place."""

    root: Path

    @property
    def hub_cache(self) -> Path:
        """Folder of the models that come from the hub, and of the digests of those that do not."""
        return self.root / "hub"

    def folder(self, key: Key) -> Path:
        """Return the folder of an artifact, whether it exists or not."""
        return self.root / key.stage / f"{key.name.replace('/', '--')}-{key.fingerprint[:8]}"

    def partial(self, key: Key) -> Path:
        """Return the folder where an artifact is under construction; it lies beside the final one."""
        folder = self.folder(key)
        return folder.with_name(f"{folder.name}{PARTIAL}")

    def manifest(self, key: Key) -> dict[str, Any] | None:
        """Return an artifact's manifest; None if it does not exist: without a manifest, or with files gone or cut."""
        folder = self.folder(key)
        if not (folder / MANIFEST).is_file():
            return None
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        files = ((folder / name, size) for name, size in manifest["files"].items())
        whole = all(path.is_file() and path.stat().st_size == size for path, size in files)
        return manifest if whole and manifest["fingerprint"] == key.fingerprint else None

    def publish(self, key: Key, manifest: Mapping[str, Any], by_tensor: Collection[str] = ()) -> None:
        """Turn the partial folder into the artifact: fingerprint and manifest written last, then one rename.

        Args:
            key: the artifact.
            manifest: what else its manifest says.
            by_tensor: large files that the stage has read back itself, and of which it has a digest by tensor.
        """
        partial, folder = self.partial(key), self.folder(key)
        write_json(partial / FINGERPRINT, key.inputs)
        about = {"stage": key.stage, "name": key.name, "fingerprint": key.fingerprint}
        files = file_sizes(partial)
        checksums = {name: checksum_file(partial / name) for name in files if name not in by_tensor}
        write_json(partial / MANIFEST, about | dict(manifest) | {"files": files, "checksums": checksums})
        if folder.exists():  # an artifact that lost files
            shutil.rmtree(folder)
        partial.rename(folder)

    def remove(self, folder: Path) -> None:
        """Delete an artifact or what is left of one; the manifest goes first, so that none is left that looks whole."""
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)

    def why(self, key: Key) -> str:
        """Say why an artifact has to be made: what differs from the newest artifact of the same stage and name."""
        if self.partial(key).exists():
            return "was interrupted"
        if self.folder(key).exists():
            return "files are gone"
        last = self.last(key)
        if last is None:
            return "new"
        return "; ".join(_differences(read_json(last / FINGERPRINT), dict(key.inputs))[:3]) or "changed"

    def last(self, key: Key) -> Path | None:
        """Return the newest artifact of the same stage and name, whatever its fingerprint; None if there is none."""
        stem = f"{key.name.replace('/', '--')}-"
        found = [
            path for path in self.root.glob(f"{key.stage}/{stem}*/{MANIFEST}") if len(path.parent.name) == len(stem) + 8
        ]
        return max(found, key=lambda path: path.stat().st_mtime).parent if found else None

    def artifacts(self, stage: str) -> list[Path]:
        """Return the folders of all artifacts of a stage."""
        return [
            path.parent for path in sorted(self.root.glob(f"{stage}/*/{MANIFEST}")) if path.parent.suffix != PARTIAL
        ]

    def make(self) -> None:
        """Make the root folder.

        Raises:
            InputError: it cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise InputError(f"--store {self.root}: cannot be made ({reason}); choose another folder") from error

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """Hold the store for one run.

        Args:
            wait: seconds to wait for another run to end.

        Raises:
            InputError: another run holds it after that time, or it cannot be made or written.
        """
        self.make()
        lock = FileLock(self.root / ".lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if wait:
                    sys.stderr.write(f"{self.root}: locked by another run; waiting for it, {wait:g} s at most\n")
                lock.acquire(timeout=wait, poll_interval=0.2)
        except Timeout as error:
            waited = f" still, after {wait:g} s" if wait else ""
            raise InputError(
                f"{self.root}: locked by another run{waited}; wait longer (--wait SECONDS) or pass another --store"
            ) from error
        except OSError as error:
            reason = error.strerror
            raise InputError(f"--store {self.root}: cannot be written ({reason}); choose another folder") from error
        try:
            yield
        finally:
            lock.release()


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List where two JSON values differ, `settings.weight: 0.4 → 0.5`; digests are only said to have changed."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            inner = f"{path}.{key}" if path else str(key)
            if key not in old:
                found.append(f"{inner} is new")
            elif key not in new:
                found.append(f"{inner} is gone")
            else:
                found += _differences(old[key], new[key], inner)
        return found
    if old == new:
        return []
    if path.startswith("reads."):
        return [f"{path.removeprefix('reads.')} changed"]
    return [f"{path}: {old} → {new}"]
