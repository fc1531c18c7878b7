"""Models that were opened before: the steps of a stage open the same ones, one after the other in a process.

Headers and tokenizers are kept, which are small; weights are not. Whoever changes tensors or a tokenizer in place must
open a model anew: what is read twice is one tensor.
"""

import os
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.expert import Expert, open_expert
from sensmerge.tasks.networks.networks import load_tokenizer

_Files = tuple[tuple[str, int, int, int], ...]
"""Of each file its name, inode, size and time of the last change."""


def opened_base(artifact: Artifact) -> Base:
    """Return the headers of a base or of a merged model; see `open_base`."""
    return _base(artifact, _files(artifact.folder))


def opened_expert(artifact: Artifact, base: Artifact, key: str, base_config: bool) -> Expert:
    """Return the headers of an expert; see `open_expert`."""
    return _expert(artifact, _files(artifact.folder), base, _files(base.folder), key, base_config)


def opened_tokenizer(artifact: Artifact) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; see `load_tokenizer`."""
    return _tokenizer(artifact, _files(artifact.folder))


@lru_cache(maxsize=2)  # the base, and the model that is scored
def _base(artifact: Artifact, _: _Files) -> Base:
    return open_base(artifact.folder)


@lru_cache(maxsize=16)
def _expert(artifact: Artifact, _: _Files, base: Artifact, of_base: _Files, key: str, base_config: bool) -> Expert:
    return open_expert(artifact.folder, _base(base, of_base), key, base_config=base_config)


@lru_cache(maxsize=1)
def _tokenizer(artifact: Artifact, _: _Files) -> PreTrainedTokenizerBase:
    return load_tokenizer(artifact.folder)


def _files(folder: Path) -> _Files:
    found = ((entry.name, entry.stat()) for entry in os.scandir(folder))
    return tuple(sorted((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in found))
