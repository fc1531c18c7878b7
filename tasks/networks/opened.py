"""Models that were opened before: the steps of a stage open the same ones, one after the other in a process.

Headers and tokenizers are kept, which are small. Weights are not: each time, files are opened, and mapped, anew.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.expert import Expert, open_expert
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.networks.readers import load_reader

_Files = tuple[tuple[str, int, int, int], ...]
"""Of each file its name, inode, size and time of the last change."""


def opened_base(artifact: Artifact) -> Base:
    """Return the headers of a base or of a merged model; see `open_base`."""
    return _unread(_base(artifact, _files(artifact.folder)))


def opened_expert(artifact: Artifact, base: Artifact, base_config: bool) -> Expert:
    """Return the headers of an expert; see `open_expert`."""
    found = _expert(artifact, _files(artifact.folder), base, _files(base.folder), base_config)
    return replace(found, base=_unread(found.base), source=replace(found.source))


def opened_reader(artifact: Artifact, reads: Reads) -> Any:
    """Return the tokenizer, or the image processor, of a model; see `load_reader`."""
    return _reader(artifact, _files(artifact.folder), reads)


@lru_cache(maxsize=2)  # the base, and the model that is scored
def _base(artifact: Artifact, _: _Files) -> Base:
    return _unread(open_base(artifact.folder))


@lru_cache(maxsize=32)
def _expert(artifact: Artifact, _: _Files, base: Artifact, of_base: _Files, base_config: bool) -> Expert:
    found = open_expert(artifact.folder, _unread(_base(base, of_base)), "expert", base_config=base_config)
    return replace(found, base=_unread(found.base), source=replace(found.source))


def _unread(base: Base) -> Base:
    """Return a base without open files."""
    return replace(base, checkpoint=replace(base.checkpoint))


@lru_cache(maxsize=1)
def _reader(artifact: Artifact, _: _Files, reads: Reads) -> Any:
    return load_reader(artifact.folder, reads)


def _files(folder: Path) -> _Files:
    # A link that leads to itself is no file; of `os.scandir`, it would raise.
    found = ((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return tuple(sorted((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in found))
