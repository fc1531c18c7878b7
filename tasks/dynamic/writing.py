"""Writing the weights of a dynamic model: its task vectors group by group, and the digests of all files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sensmerge.tasks.artifacts import is_partial, partial_of, sha256_file, sync, write_json
from sensmerge.tasks.dynamic.vectors import VECTORS, Vector, save_vectors
from sensmerge.tasks.errors import InputError

FILES = "files.json"
"""sha256 of every other file, by its path in the folder."""

_LATER = {FILES, "manifest.json", "fingerprint.json"}
"""Files that come after the digests; they lie there when an interrupted try is repeated."""


def vectors_file(out: Path, part: int) -> Path:
    """Return the file of the task vectors of a group of layers; it is there once it is whole."""
    return out / VECTORS / f"group-{part:05d}.safetensors"


def write_vectors(out: Path, part: int, vectors: Mapping[str, Mapping[str, Vector]]) -> None:
    """Write the task vectors of a group of layers, by tensor and expert, beside their file and then rename it."""
    target = vectors_file(out, part)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    save_vectors({name: by_expert for name, by_expert in vectors.items() if by_expert}, partial)
    sync(partial)
    partial.replace(target)


def finite_as(values: Tensor, dtype: torch.dtype, expert: str, name: str) -> Tensor:
    """Return what an expert adds to a tensor as it is.

    Raises:
        InputError: some of it is NaN or Inf as `dtype`.
    """
    if not bool(values.to(dtype).isfinite().all()):
        raise InputError(
            f"tensor {name}: what experts.{expert} adds has NaN or Inf as {dtype}; expected finite weights"
        )
    return values


def seal(out: Path) -> dict[str, Any]:
    """Write the digests of all files of a folder.

    Returns:
        `digest`: sha256 over the names and digests of the files; `bytes`: size of all weights, heads included.
    """
    found = sorted(path for path in out.rglob("*") if path.is_file() and not is_partial(path))
    paths = [path for path in found if str(path.relative_to(out)) not in _LATER]
    digests = {str(path.relative_to(out)): sha256_file(path) for path in paths}
    write_json(out / FILES, digests)
    size = sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")
    return {"digest": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(), "bytes": size}
