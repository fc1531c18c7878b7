"""What the header of a safetensors file says, validated; read without torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from sensmerge.tasks.errors import InputError

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes of an element by safetensors' code of its dtype: all dtypes that are read."""
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    """safetensors code, e.g. BF16"""
    shape: tuple[int, ...]
    file: str
    """file name inside the checkpoint's folder"""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * SIZES[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        """Whether the tensor holds weights (and not, say, position ids)."""
        return self.dtype.startswith(("F", "BF"))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the header of one safetensors file says, checked against the file's size.

    Raises:
        InputError: the file is truncated, its header is corrupt or lies about its size, or a dtype is not supported.
    """
    handle = open_file(path, "np")  # numpy and no torch: a download reads headers, and should start at once
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
        entry = handle.get_slice(name)
        tensors[name] = tensor_info(name, entry.get_dtype(), entry.get_shape(), path)
    return tensors


def tensor_info(name: str, dtype: str, shape: Iterable[int], path: Path) -> TensorInfo:
    """Return a header entry as `TensorInfo`.

    Raises:
        InputError: the dtype is one that cannot be merged (quantised formats).
    """
    if dtype not in SIZES:
        raise InputError(
            f"{path}: tensor {name} has dtype {dtype}, which is quantised or unknown; expected one of "
            f"{', '.join(SIZES)}: merge a copy of the model that is saved in bfloat16 or float32"
        )
    return TensorInfo(dtype, tuple(shape), path.name)


def open_file(path: Path, framework: Literal["np", "pt"]) -> Any:
    """Open a safetensors file whose tensors become those of numpy or torch.

    Raises:
        InputError: the file is gone, truncated or corrupt.
    """
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise InputError(
                    f"{path}: is a Git LFS pointer and not the file itself; run `git lfs pull` where it was cloned"
                ) from error
        raise InputError(f"{path}: truncated or corrupt safetensors file ({error}); get the file again") from error
