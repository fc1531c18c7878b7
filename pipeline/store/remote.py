"""A store at a URL, such as s3://bucket/team: what machines without a disk in common share, through fsspec."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from sensmerge.pipeline.store.manifest import MANIFEST, file_sizes, read_manifest
from sensmerge.tasks.artifacts import read_json, write_json
from sensmerge.tasks.remote import RemoteFile, RemoteFolder

SYNCED = ".synced"
"""In a local folder: which state of each remote file its files are."""


@dataclass(frozen=True)
class Remote(RemoteFolder):
    """A store's files below a URL. A local folder that mirrors one of its folders keeps in mind which states it has."""

    @property
    def title(self) -> str:
        """See `RemoteFolder`."""
        return f"--store {self.url}"

    def read_with_time(self, path: str) -> tuple[bytes, datetime] | None:
        """Return the content of a file, and when the server wrote it; None if it is not there."""
        fs, root = self._place

        def read() -> tuple[bytes, datetime] | None:
            try:
                fs.invalidate_cache()
                return fs.cat_file(f"{root}/{path}"), fs.modified(f"{root}/{path}")
            except FileNotFoundError:
                return None

        return self._tried(read)

    def write(self, path: str, content: bytes) -> None:
        """Write a file."""
        fs, root = self._place
        self._tried(lambda: fs.pipe_file(f"{root}/{path}", content))

    def exists(self, path: str) -> bool:
        """Return whether a file is there."""
        fs, root = self._place

        def exists() -> bool:
            fs.invalidate_cache()
            return bool(fs.exists(f"{root}/{path}"))

        return self._tried(exists)

    def download(self, files: Mapping[str, RemoteFile], folder: str, target: Path) -> None:
        """Bring files of a remote folder to a local one, each whole or not at all; those it has already stay.

        Args:
            files: by their path from the root, as `files` lists them.
            folder: the remote folder, which they are in.
            target: the local folder.
        """
        synced = read_json(target / SYNCED) if (target / SYNCED).is_file() else {}
        names = {str(PurePosixPath(path).relative_to(folder)): file for path, file in files.items()}
        wanted = {
            name: file
            for name, file in names.items()
            if synced.get(name) != file.state or not (target / name).is_file()
        }
        if not wanted:
            return
        paths = {f"{folder}/{name}": file for name, file in wanted.items()}
        self.bring(paths, {f"{folder}/{name}": target / name for name in wanted})
        write_json(target / SYNCED, synced | {name: file.state for name, file in wanted.items()})

    def upload(self, source: Path, folder: str, names: Collection[str], last: str | None = None) -> None:
        """Write files of a local folder.

        Args:
            source: the local folder.
            folder: the remote one.
            names: of the files.
            last: the one that says that all are there: it is removed first and written last.
        """
        fs, root = self._place
        target = f"{root}/{folder}"

        def put() -> None:
            if last is not None and fs.exists(f"{target}/{last}"):
                fs.rm_file(f"{target}/{last}")
            for some in ([name for name in names if name != last], [last] if last is not None else []):
                if some:
                    fs.put([str(source / name) for name in some], [f"{target}/{name}" for name in some])

        self._tried(put)
        states = {str(PurePosixPath(path).relative_to(folder)): file.state for path, file in self.files(folder).items()}
        synced = read_json(source / SYNCED) if (source / SYNCED).is_file() else {}
        write_json(source / SYNCED, synced | {name: states[name] for name in names})

    def abandon(self, folder: str = "") -> None:
        """Delete the parts of files below a folder whose writers were killed; nobody else may be writing any."""
        fs, root = self._place
        if not hasattr(fs, "list_multipart_uploads"):
            return
        bucket, _, start = f"{root}/{folder}".strip("/").partition("/")

        def abandon() -> None:
            for upload in fs.list_multipart_uploads(bucket):
                if upload["Key"].startswith(f"{start}/" if start else ""):
                    fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])

        self._tried(abandon)

    def remove(self, path: str, first: str | None = None) -> None:
        """Delete a file or folder; of a folder the file `first` goes first. What is not there is none."""
        fs, root = self._place

        def remove() -> None:
            fs.invalidate_cache()
            for one in ([f"{path}/{first}"] if first is not None else []) + [path]:
                if fs.exists(f"{root}/{one}"):
                    fs.rm(f"{root}/{one}", recursive=True)

        self._tried(remove)


def lacking_at(uri: str) -> str | None:
    """Say what the artifact at a URI lacks, by its manifest and the sizes of its files; None if it is whole."""
    if uri.startswith("file:"):
        folder = Path(url2pathname(urlparse(uri).path))
        place, sizes = str(folder), file_sizes(folder) if folder.is_dir() else {}
        manifest: Any = read_manifest(folder)
    else:
        remote = Remote(uri)
        place, sizes = uri, {name: file.size for name, file in remote.files().items()}
        manifest = json.loads(remote.read(MANIFEST)) if MANIFEST in sizes else None
    if manifest is None:
        return f"{place} is not there"
    for name, size in manifest["files"].items():
        if name not in sizes:
            return f"{place}/{name} is not there"
        if sizes[name] != size:
            return f"{place}/{name} has {sizes[name]} bytes instead of {size}"
    for name in manifest.get("freed", {}):
        return f"{place}/{name} was freed (`keep: best` of its sweep; with `keep: all` a run makes it again)"
    return None
