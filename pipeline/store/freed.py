"""Artifacts whose large files were deleted on purpose: all else of them stays, so their steps need not run.

The manifest of such an artifact lists these files as `freed`. They are made again where another step reads them.
"""

from collections.abc import Collection

from sensmerge.pipeline.store.manifest import MANIFEST
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import write_json

FREED = "its weights were freed"
"""Why a step runs again of whose artifact files were freed."""


def is_freed(store: Store, key: Key) -> bool:
    """Return whether an artifact is in a store, but for files that were freed."""
    return bool((store.manifest(key) or {}).get("freed"))


def free(store: Store, key: Key, names: Collection[str]) -> int:
    """Delete files of an artifact that is in a store, and return the bytes of those that were not freed before.

    The manifest says so first: who is killed in between leaves files that no manifest knows, and the next call deletes
    them. A store at a URL has to `look` again afterwards.
    """
    folder, manifest = store.folder(key), store.manifest(key)
    assert manifest is not None, f"{key.stage} {key.name} is in the store"
    before = manifest.get("freed", {})
    now = {name: size for name, size in manifest["files"].items() if name in names}
    if now:
        kept = {
            part: {name: value for name, value in manifest.get(part, {}).items() if name not in now}
            for part in ("files", "checksums")
        }
        write_json(folder / MANIFEST, manifest | kept | {"freed": before | now})
        store.upload(folder, MANIFEST)
    for name in {**before, **now}:
        (folder / name).unlink(missing_ok=True)
        if store.remote is not None:
            store.remote.remove((folder / name).relative_to(store.root).as_posix())
    return sum(now.values())
