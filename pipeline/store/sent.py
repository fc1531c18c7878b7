"""Files of an artifact that several machines make: each sends its own to the store's URL, with a receipt for them.

They lie where the artifact will, which has no manifest yet, so nothing takes them for one. A receipt is written after
its files; it says what the server answers of them, and what they were made from. The manifest is written when all
receipts are there, and then these go.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensmerge.pipeline.store.manifest import MANIFEST
from sensmerge.pipeline.store.remote import Remote, lacking_at
from sensmerge.pipeline.store.store import RECEIPT, Key, Store
from sensmerge.tasks.artifacts import parse_json
from sensmerge.tasks.remote import RemoteFile


@dataclass(frozen=True)
class Bundle:
    """Parts of a step whose files one machine makes and sends."""

    number: int
    parts: tuple[int | str, ...]
    made_from: str
    """what the parts read: files of another state made other bytes"""

    def __str__(self) -> str:
        """Return its parts, as messages name them."""
        return f"parts {self.parts[0]} to {self.parts[-1]}"

    @property
    def name(self) -> str:
        """Name of its receipt."""
        return f"{RECEIPT}{self.number}.json"


@dataclass(frozen=True)
class Receipt:
    """What is known of a bundle's files at the URL."""

    files: Mapping[str, int]
    """bytes by name"""
    packed: Mapping[str, Any]
    """what `Job.pack` told of them"""


def send(store: Store, key: Key, bundle: Bundle, source: Path, names: Sequence[str], packed: Mapping[str, Any]) -> None:
    """Write the files of a bundle to the URL, and then its receipt.

    Args:
        store: at a URL.
        key: the artifact.
        bundle: whose files they are.
        source: the folder that they are in.
        names: of the files.
        packed: what `Job.pack` told of them.

    Raises:
        InputError: the URL cannot be used, or another run has taken the store over.
    """
    remote, folder = _place(store, key)
    remote.remove(f"{folder}/{MANIFEST}")  # of an artifact that lost files
    store.upload(store.folder(key), *names, source=source)
    there = remote.files(folder)
    files = {name: [there[f"{folder}/{name}"].size, there[f"{folder}/{name}"].state] for name in names}
    content = {"parts": bundle.parts, "made_from": bundle.made_from, "files": files, "packed": packed}
    remote.write(f"{folder}/{bundle.name}", json.dumps(content).encode())


def received(store: Store, key: Key, bundles: Sequence[Bundle]) -> dict[int, Receipt]:
    """Return the receipts of those bundles whose files are at the URL as they were sent."""
    remote, folder = _place(store, key)
    there = remote.files(folder)
    found = {bundle.number: _receipt(remote, folder, bundle, there) for bundle in bundles}
    return {number: receipt for number, receipt in found.items() if receipt is not None}


def _receipt(remote: Remote, folder: str, bundle: Bundle, there: Mapping[str, RemoteFile]) -> Receipt | None:
    if f"{folder}/{bundle.name}" not in there:
        return None
    try:
        found = parse_json(remote.read(f"{folder}/{bundle.name}"))
        files = {name: RemoteFile(size, state) for name, (size, state) in found["files"].items()}
        is_of = tuple(found["parts"]) == bundle.parts and found["made_from"] == bundle.made_from
        packed = found["packed"]
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged, or of another version
        return None
    is_there = all(there.get(f"{folder}/{name}") == file for name, file in files.items())
    return Receipt({name: file.size for name, file in files.items()}, packed) if is_of and is_there else None


def forget(store: Store, key: Key, bundles: Sequence[Bundle]) -> None:
    """Delete the receipts of an artifact that is whole."""
    remote, folder = _place(store, key)
    for bundle in bundles:
        remote.remove(f"{folder}/{bundle.name}")


def abandon(store: Store, key: Key) -> None:
    """Delete what killed writers left of files that they had begun; no other may be writing files of the artifact."""
    remote, folder = _place(store, key)
    remote.abandon(folder)


def published(store: Store, key: Key) -> dict[str, Any] | None:
    """Return the manifest of an artifact that is whole at the URL; None if it is not."""
    remote, folder = _place(store, key)
    if lacking_at(store.uri(store.folder(key))) is not None:
        return None
    manifest: dict[str, Any] = json.loads(remote.read(f"{folder}/{MANIFEST}"))
    return manifest if manifest["fingerprint"] == key.fingerprint else None


def _place(store: Store, key: Key) -> tuple[Remote, str]:
    assert store.remote is not None, "in a folder, all machines see what each makes"
    return store.remote, store.path_of(store.folder(key))
