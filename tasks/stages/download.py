"""The stage that brings a model's files to this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.source import verified
from sensmerge.tasks.identity import Local
from sensmerge.tasks.stages.job import Job


@dataclass(frozen=True)
class DownloadJob(Job):
    """Brings all files of a model to this machine and verifies them; files of a local folder stay where they are."""

    stage = "download"
    version = 2
    uses_torch = False

    listing: Listing
    """the model's files, from `tasks.checkpoints.source.resolve`"""
    cache: Local[Path]
    """folder of the hub's cache"""

    def finish(self, out: Path) -> dict[str, Any]:
        """Write `files.json`: source, folder, revision, and the files with name, size in bytes and sha256.

        Returns:
            folder, revision and bytes (total size of the files).

        Raises:
            InputError: as `tasks.checkpoints.source.verified`.
        """
        listing, sha256 = self.listing, verified(self.listing, self.cache)
        files = [
            {"name": file.name, "size": file.size, "sha256": sha256[file.name].partition(":")[2]}
            for file in listing.files
        ]
        summary = {"folder": str(listing.folder), "revision": listing.revision}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "files.json", {"source": str(listing.source), **summary, "files": files})
        return {**summary, "bytes": sum(file.size for file in listing.files)}
