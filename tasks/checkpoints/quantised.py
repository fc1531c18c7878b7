"""Quantised weights: those in fp8 with scales are read as bfloat16 where a recipe allows it, all others refused."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.errors import InputError

QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv|_2)?|weight_packed|weight_zero_point|input_scale|SCB"
    r"|weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*))$"
)
"""What GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes store beside or instead of weights."""
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By safetensors' code."""
CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of a config, at any depth, that say how weights are quantised."""
WAY_OUT = (
    "set dequantize: true for this model if its weights are fp8, or merge a copy of it that is saved in bfloat16 or "
    "float32"
)

_SCALES = ("_scale_inv", "_scale")
"""Behind a weight's name: what it is multiplied by, whatever the name of the first says."""
_OF_ACTIVATIONS = re.compile(r"\.(input|activation)_scale$")
"""Scales of what a layer is given, which no weight depends on."""
_SOME_SCALE = re.compile(r"(^|[._])q?scale_[^.]*$|_scale[^.]*$")


@dataclass(frozen=True)
class Scale:
    """What a tensor in fp8 is multiplied by."""

    file: str = ""
    """in the checkpoint's folder"""
    name: str = ""
    """of the tensor with the scales; empty: it is stored without any"""
    block: tuple[int, int] = (0, 0)
    """rows and columns that share a scale; zeros where the scales are broadcast"""

    def times(self, stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor as bfloat16: the product in float32, rounded once."""
        values = stored.float()
        if scales is not None:
            factors = scales.float()
            if self.block != (0, 0):
                for dim, size in zip((-2, -1), self.block, strict=True):
                    factors = factors.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
            values = values.mul_(factors)
        return values.bfloat16()


def quantisation(value: Any, path: str = "") -> str | None:
    """Return where a config says, at any depth, that weights are quantised."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        here = f"{path}{key}"
        if key in CONFIG_KEYS and inner:
            return here
        if found := quantisation(inner, f"{here}."):
            return found
    return None


def is_fp8(info: TensorInfo) -> bool:
    """Return whether a tensor is stored in 8-bit floating point."""
    return info.dtype in FP8


def dequantised(tensors: Mapping[str, TensorInfo], folder: Path) -> tuple[dict[str, TensorInfo], dict[str, Scale]]:
    """Return the tensors of a checkpoint as they are read, and the scale of each that is stored in fp8.

    Args:
        tensors: as the headers have them.
        folder: the checkpoint's, whose config says which blocks share a scale.

    Raises:
        InputError: a tensor whose scales are not found, or do not fit it.
    """
    found, scales, block = dict(tensors), dict[str, Scale](), _block(folder)
    for name, info in tensors.items():
        if not is_fp8(info):
            continue
        scales[name] = _scale(name, info, tensors, folder, block)
        found[name] = replace(info, dtype="BF16")
        found.pop(scales[name].name, None)
    stems = {name.removesuffix("weight") for name in scales}
    found = {
        name: info
        for name, info in found.items()
        if not (_OF_ACTIVATIONS.search(name) and name[: name.rindex(".") + 1] in stems)
    }
    return found, scales


def _scale(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], folder: Path, block: tuple[int, int] | None
) -> Scale:
    names = [name + end for end in _SCALES if name + end in tensors]
    if not names:
        others = [one for one in tensors if _SOME_SCALE.search(one)]
        if others:
            raise InputError(
                f"{folder}: tensor {name} is stored as {info.dtype} without {name}{_SCALES[0]} or {name}{_SCALES[1]}, "
                f"but there are other scales, such as {others[0]}; merge a copy of the model that is saved in bfloat16"
            )
        return Scale()
    of = tensors[names[0]]
    if of.is_floating_point and _broadcasts(of.shape, info.shape):
        return Scale(of.file, names[0])
    if of.is_floating_point and block is not None and len(of.shape) == len(info.shape) >= 2:
        expected = [-(-size // step) for size, step in zip(info.shape[-2:], block, strict=True)]
        if list(of.shape[-2:]) == expected and of.shape[:-2] == info.shape[:-2]:
            return Scale(of.file, names[0], block)
    said = "its config.json names no weight_block_size" if block is None else f"blocks of {block[0]} × {block[1]}"
    raise InputError(
        f"{folder}: {names[0]} is {of.dtype} of shape {of.shape}, which does not fit {name} of shape {info.shape} "
        f"({said}); merge a copy of the model that is saved in bfloat16"
    )


def _broadcasts(scales: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether there is one scale for a tensor, or one for each of its rows or matrices."""
    if all(size == 1 for size in scales):
        return len(scales) <= len(shape)
    fit = all(size in (1, of) for size, of in zip(scales, shape, strict=False))
    return fit and len(scales) == len(shape) and scales[-1] == 1


def _block(folder: Path) -> tuple[int, int] | None:
    """Return how many rows and columns share a scale, as a model's config says."""
    path = folder / CONFIG
    block = _find("weight_block_size", load_object(path)) if path.is_file() else None
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _find(key: str, value: Any) -> Any:
    for name, inner in value.items() if isinstance(value, dict) else ():
        found = inner if name == key else _find(key, inner)
        if found is not None:
            return found
    return None


def without_quantisation(value: Any) -> Any:
    """Return a JSON value without the keys, at any depth, that say how weights are quantised."""
    if not isinstance(value, dict):
        return value
    return {key: without_quantisation(inner) for key, inner in value.items() if key not in CONFIG_KEYS}
