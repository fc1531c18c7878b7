"""Where a model comes from, a folder, a commit of a hub repository or a URL; which of its files are read or travel."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.companions import WEIGHTS, is_companion, is_plain, local_files
from sensmerge.tasks.checkpoints.stems import (
    ADAPTER,
    CONSOLIDATED,
    MODEL,
    SAFETENSORS,
    find_stem,
    is_of_stem,
    single_stems,
)
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.urls import public

CONFIGS = ["config.json", "adapter_config.json"]
READ = [WEIGHTS, "*.safetensors.index.json", *CONFIGS]
"""What is read of a model, at its top level; beside it, what travels into merged models (`is_companion`)."""
DIGESTS = ".digests"
"""Folder, in the hub's cache, for the digests of local files."""
LOOKED_UP = 2**20
"""Bytes: of smaller files, weights apart, no digest is kept, since they are read as fast as its record."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PICKLES = ["pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.ckpt"]


@dataclass(frozen=True)
class LocalModel:
    """A model in a folder of this machine (or of storage that all workers share)."""

    folder: Path

    def __str__(self) -> str:
        """Return the folder."""
        return str(self.folder)


@dataclass(frozen=True)
class HubModel:
    """A model in a repository of the hub."""

    repo: str
    revision: str
    """branch, tag or commit"""
    subfolder: str = ""
    """where in the repository the model is; empty: at its top"""

    def __str__(self) -> str:
        """Return the source as a recipe spells it."""
        return f"hub:{self.repo}@{self.revision}" + (f" (subfolder {self.subfolder})" if self.subfolder else "")

    def path(self, name: str) -> str:
        """Return the path in the repository of a file of the model."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def inside(self, paths: Iterable[str]) -> dict[str, str]:
        """Return the files of the model by name, of all paths in the repository."""
        start = self.path("")
        return {path.removeprefix(start): path for path in paths if path.startswith(start)}


@dataclass(frozen=True)
class UrlModel:
    """A model in a folder below a URL, such as s3://bucket/models/expert."""

    url: str
    """any that fsspec knows, without a slash at the end"""

    def __str__(self) -> str:
        """Return the URL."""
        return self.url


ModelSource = LocalModel | HubModel | UrlModel


@dataclass(frozen=True)
class ListedFile:
    """One file of a model.

    Raises:
        InputError: the name is not that of a file in the model's folder or a known subfolder of it.
    """

    name: str
    size: int
    """bytes"""
    digest: str
    """of a local file `blake3:…`, or empty while nobody has read it; of one of the hub what that states: `sha256:…`, or
    `git:…` (git blob id) of a small one; of one at a URL `etag:…`, by which the server tells its contents apart"""

    def __post_init__(self) -> None:
        """Refuse a name with a drive, `..`, or a folder that no model has."""
        if not is_plain(self.name):
            raise InputError(f"listed file {self.name!r} is not a plain file name; do not use this model")


@dataclass(frozen=True)
class Listing:
    """The files of a model, and where they lie or will lie."""

    source: Local[ModelSource]
    folder: Local[Path]
    """for a hub model, the snapshot folder of its commit in the cache; for one at a URL, that of its state"""
    revision: Local[str | None]
    """commit of a hub model"""
    files: tuple[ListedFile, ...]

    def unhashed(self) -> tuple[ListedFile, ...]:
        """Return the local weights whose digest nobody has computed yet."""
        return tuple(file for file in self.files if not file.digest)

    def hashed(self, name: str, cache: Path) -> "Listing":
        """Return the listing with the digest of one more file, read unless its digest is kept in the cache.

        Raises:
            InputError: the file changes meanwhile.
        """
        digest = digests.compute_once(self.folder / name, cache / DIGESTS)
        files = (replace(file, digest=digest) if file.name == name else file for file in self.files)
        return replace(self, files=tuple(files))

    def missing(self) -> tuple[ListedFile, ...]:
        """Return the files that are not in the folder yet."""
        return tuple(file for file in self.files if not (self.folder / file.name).exists())


def parse_model_id(text: str, folder: Path, subfolder: str = "") -> ModelSource:
    """Read a recipe's `model:` string: a folder, `hub:ORG/NAME@REVISION` (branch, tag or commit; main), or a URL.

    Args:
        text: the string; a relative path starts at `folder`, `~` is the home folder.
        folder: the recipe's folder.
        subfolder: where the model is in it: a plain relative path.

    Raises:
        InputError: no such folder, no valid id or revision, or a URL that lets somebody in.
    """
    parts = subfolder.strip("/").split("/") if subfolder else []
    if any(part in {"", ".", ".."} or "\\" in part for part in parts):
        raise InputError(f"subfolder {subfolder!r} is no path inside the model; expected one such as unet")
    if text.startswith("hub:"):
        repo, _, revision = text.removeprefix("hub:").strip().partition("@")
        if not _is_repo_id(repo):
            raise InputError(f"model {text!r}: {repo!r} is not the id of a repository; write hub:ORG/NAME@REVISION")
        # A revision becomes a file name in the cache; git itself allows no `..` in one.
        if not re.fullmatch(r"\w[\w./+-]*", revision or "main") or ".." in revision:
            raise InputError(f"model {text!r}: {revision!r} cannot be a revision; give a branch, a tag or a commit")
        return HubModel(repo, revision or "main", "/".join(parts))
    if _URL.match(text):
        if public(text) != text:
            raise InputError(
                f"model {text!r}: the URL holds a password or token; leave it out, and give it where fsspec looks: in "
                "the provider's own variables"
            )
        return UrlModel("/".join([text.rstrip("/"), *parts]))
    try:
        path = (folder / os.path.expanduser(text)).resolve()
        exists = path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"model {text!r}: cannot be a folder ({error})") from error
    if not exists:
        hint = f"; for a model on the hub write hub:{text}" if _is_repo_id(text.partition("@")[0]) else ""
        raise InputError(f"model {text!r}: no such folder {path}{hint}")
    inner = path.joinpath(*parts)
    if not inner.is_dir():
        found = ", ".join(sorted(one.name for one in path.iterdir() if one.is_dir())[:5]) or "none"
        raise InputError(f"model {text!r}: has no subfolder {subfolder}; its folders: {found}")
    return LocalModel(inner)


def _is_repo_id(text: str) -> bool:
    try:
        repo_folder_name(repo_id=text, repo_type="model")  # checks the id first
    except HFValidationError:
        return False
    return True


def list_folder(source: LocalModel, cache: Path) -> Listing:
    """List a folder; weights have the digest that is kept of them as they are, or none.

    Raises:
        InputError: no such folder, or no weights in it.
    """
    folder = source.folder
    if not folder.is_dir():
        raise InputError(f"model {source}: no such folder on this machine; workers must see it at the same path")
    stats = {name: path.stat() for name, path in local_files(folder).items()}
    inner = [path.relative_to(folder).as_posix() for path in folder.glob(f"*/{WEIGHTS}")]
    files = []
    for name in sorted(relevant({name: stat.st_size for name, stat in stats.items()}, source, inner)):
        size = stats[name].st_size
        if fnmatch(name, WEIGHTS):
            digest = digests.find(folder / name, stats[name], cache / DIGESTS) or ""
        elif size < LOOKED_UP:
            digest = digests.compute(folder / name, "blake3")
        else:
            digest = digests.compute_once(folder / name, cache / DIGESTS)
        files.append(ListedFile(name, size, digest))
    return Listing(source, folder, None, tuple(files))


def relevant(sizes: Mapping[str, int], source: ModelSource, inner: Collection[str] = ()) -> set[str]:
    """Choose the files of a model that are read or travel, by name and bytes; check that weights are among them.

    Args:
        sizes: bytes by name.
        source: the model.
        inner: paths of safetensors files in its subfolders, for the message where it has none itself.

    Raises:
        InputError: no weights.
    """
    names = [name for name in sizes if "/" not in name]
    chosen = {name for name in names if any(fnmatch(name, pattern) for pattern in READ)}
    stem = find_stem(names)
    if stem == MODEL:  # an index may call its shards as it likes; Mistral's repositories hold every weight twice
        chosen = {name for name in chosen if not name.startswith(CONSOLIDATED)}
    elif stem is not None and f"{ADAPTER}{SAFETENSORS}" not in names:
        chosen = {name for name in chosen if name in CONFIGS or is_of_stem(name, stem)}
    if stem is None and len(several := single_stems(names)) > 1 and f"{ADAPTER}{SAFETENSORS}" not in names:
        raise InputError(
            f"model {source}: has several files of weights ({', '.join(several[:3])}), and no index says that they are "
            f"one model's; put the one to merge into a folder of its own{_or_subfolder(inner)}"
        )
    if not any(fnmatch(name, WEIGHTS) for name in chosen):
        pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
        if pickles:
            raise InputError(
                f"model {source}: its weights are only in pickle form ({pickles[0]}), which can run code and is not "
                "read; load it with transformers in a place you trust, and use the folder that save_pretrained writes"
            )
        raise InputError(f"model {source}: no weights found at its top level; {_other_place(inner)}")
    return chosen | {name for name, size in sizes.items() if is_companion(name, size)}


def _other_place(inner: Collection[str]) -> str:
    """Return what to do about a model without weights at its top level.

    Args:
        inner: paths of safetensors files in its subfolders.
    """
    return f"expected *.safetensors files{_or_subfolder(inner)}"


def _or_subfolder(inner: Collection[str]) -> str:
    """Return the other way out of a model whose subfolders hold weights."""
    folders = sorted({path.rpartition("/")[0] for path in inner})
    if not folders:
        return ""
    return (
        f", or name one of the folders {', '.join(folders[:5])} with the model's key subfolder, as in "
        f"{{model: …, subfolder: {folders[0]}}}"
    )
