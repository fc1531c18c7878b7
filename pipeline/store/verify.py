"""Reads artifacts again and compares them with what was published."""

from collections.abc import Iterator
from pathlib import Path

from sensmerge.pipeline.store.manifest import MANIFEST, read_manifest
from sensmerge.pipeline.store.store import Store, stages
from sensmerge.tasks.artifacts import has_checksum, read_json
from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.hub import doubt
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages.download import listed_files
from sensmerge.tasks.stages.written import weights_digest


def find_damage(store: Store) -> Iterator[tuple[Path, list[str]]]:
    """Read every artifact, and the hub models that were downloaded; yield each folder with what is wrong in it."""
    for stage in stages():
        for folder in store.artifacts(stage):
            with store.copy(folder) as copy:
                wrong = list(damaged_files(copy))
                if stage == "download" and not wrong:
                    wrong += _damaged_model(copy, store.hub_cache)
            yield folder, wrong


def damaged_files(folder: Path) -> Iterator[str]:
    """Read an artifact again and yield what is wrong in it."""
    manifest = read_manifest(folder)
    if manifest is None:
        yield f"{MANIFEST} cannot be read"
        return
    checksums, by_tensor = manifest.get("checksums", {}), manifest.get("result", {}).get("by_tensor", [])
    is_whole = True
    for name, size in manifest["files"].items():
        wrong = _damage(folder / name, size, checksums.get(name))
        if wrong is not None:
            is_whole = False
            yield f"{name} {wrong}"
    if by_tensor and is_whole and not manifest.get("freed") and not _has_digest(folder, manifest["result"]["digest"]):
        yield f"{', '.join(by_tensor)}: other weights than were written"


def is_intact(folder: Path, name: str) -> bool:
    """Return whether one file of an artifact, which has a checksum, is as it was written."""
    manifest = read_manifest(folder) or {"files": {}}
    size, checksum = manifest["files"].get(name), manifest.get("checksums", {}).get(name)
    return size is not None and checksum is not None and _damage(folder / name, size, checksum) is None


def _damage(path: Path, size: int, checksum: str | None) -> str | None:
    if not path.is_file():
        return "is gone"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if checksum is not None and not has_checksum(path, checksum):
        return "has other content"
    return None


def _has_digest(folder: Path, digest: str) -> bool:
    try:
        return weights_digest(open_checkpoint(folder), like=digest) == digest
    except InputError:  # a header that cannot be read
        return False


def _damaged_model(folder: Path, cache: Path) -> Iterator[str]:
    """Compare a model from the hub with its digests; a local one is the user's, who may change it."""
    model = read_json(folder / "files.json")
    if model["revision"] is None:
        return
    for file in listed_files(model):
        path = Path(model["folder"]) / file.name
        if not path.is_file():
            yield f"{path} is gone"
        elif digests.compute(path, file.digest.partition(":")[0]) != file.digest:
            doubt(path, cache)
            yield f"{path} has other content"
