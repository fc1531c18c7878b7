"""The two small files that say what an artifact is, whatever has become of them; and the folders that are beside."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import has_checksum, is_partial, parse_json

MANIFEST = "manifest.json"
"""What an artifact holds, and what its step took; an artifact without it does not exist. `files` are those it has,
`freed` those it had, which were deleted on purpose: its step need not run as long as nothing reads them."""
FINGERPRINT = "fingerprint.json"
"""What the result depends on."""
RUNS = "runs"
"""Folder of what `pipeline.store.history` writes."""
PLANS = "plans"
"""Folder of the store with a file for each recipe that has nothing left to do, written by `pipeline.plan.kept`."""
SMALL = 2**23
"""Bytes of the files of which the content is looked at before they are used; at a URL, they are downloaded first."""
State = tuple[str, int, int]
"""Path, size and modification time of a file."""


def tidy(partial: Path) -> None:
    """Delete what killed writes have left in a folder under construction, and let others read what they may.

    Libraries write weights that only their owner can read; all files get the rights that the umask left the folder.
    """
    rights = partial.stat().st_mode & 0o666
    for path in list(partial.rglob("*")):
        if is_partial(path):
            path.unlink()
            continue
        found = path.lstat()
        # Who has a second name for a file, such as an earlier artifact, has given it its rights.
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_mode & 0o666 != rights:
            path.chmod(rights)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in an artifact's folder; None if it is none, damaged or absent."""
    try:
        found = parse_json((folder / MANIFEST).read_bytes())
        sizes, fingerprint, checksums = found["files"], found["fingerprint"], found.get("checksums", {})
        is_manifest = isinstance(found.get("result", {}), dict) and isinstance(fingerprint, str)
        is_manifest &= all(isinstance(size, int) for size in sizes.values()) and checksums.keys() <= sizes.keys()
        return found if is_manifest and all(isinstance(one, str) for one in checksums.values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def altered(folder: Path, manifest: Mapping[str, Any], intact: set[State]) -> str | None:
    """Return the first small file of an artifact that has another content than was written.

    Args:
        folder: the artifact, which has all files.
        manifest: its manifest.
        intact: files that need not be read again; those that are as they were written are added.
    """
    for name, checksum in manifest.get("checksums", {}).items():
        stat = (folder / name).stat()
        state = (str(folder / name), stat.st_size, stat.st_mtime_ns)
        if stat.st_size > SMALL or state in intact:
            continue
        if not has_checksum(folder / name, checksum):
            return str(name)
        intact.add(state)
    return None


def what_is_wrong(folder: Path) -> str:
    """Say why a folder that has the name of an artifact is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is damaged"
    if any(not (folder / name).is_file() for name in manifest["files"]):
        return "files are gone"
    damaged = altered(folder, manifest, set())
    return "files were cut" if damaged is None else f"{damaged} is damaged"


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """Return what an artifact's result depends on; None if that cannot be read."""
    try:
        found = parse_json((folder / FINGERPRINT).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every whole file below a folder, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_partial(path)]
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}
