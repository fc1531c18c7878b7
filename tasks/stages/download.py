"""The stage that brings a model's files to this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.listing import ListedFile, Listing
from sensmerge.tasks.checkpoints.source import verify
from sensmerge.tasks.identity import Local
from sensmerge.tasks.stages.job import Job


@dataclass(frozen=True)
class DownloadJob(Job):
    """Brings all files of a model to this machine and verifies them; files of a local folder stay where they are."""

    stage = "download"
    version = 3
    uses_torch = False

    listing: Listing
    """the model's files, from `tasks.checkpoints.source.resolve`"""
    cache: Local[Path]
    """folder of the hub's cache"""

    def finish(self, out: Path) -> dict[str, Any]:
        """Write `files.json`: source, folder, revision, and the files with name, size in bytes and digest.

        Returns:
            folder, revision and bytes (total size of the files).

        Raises:
            InputError: as `tasks.checkpoints.source.verify`.
        """
        listing = self.listing
        verify(listing, self.cache)
        files = [{"name": file.name, "size": file.size, "digest": file.digest} for file in listing.files]
        summary = {"folder": str(listing.folder), "revision": listing.revision}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "files.json", {"source": str(listing.source), **summary, "files": files})
        return {**summary, "bytes": sum(file.size for file in listing.files)}


def listed_files(model: Mapping[str, Any]) -> list[ListedFile]:
    """Return the files that a `files.json` lists; before version 3 it had the sha256 of each."""
    return [
        ListedFile(file["name"], file["size"], file.get("digest") or f"sha256:{file['sha256']}")
        for file in model["files"]
    ]
