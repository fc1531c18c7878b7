"""Arithmetic in float32 on elements in the dtypes that files have; on a CPU in compiled loops."""

import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels import loops

_NARROW = (torch.float16, torch.bfloat16)


def subtract(left: Tensor, right: Tensor, difference: Tensor) -> None:
    """Write left − right.

    Args:
        left: flat, in any float dtype.
        right: likewise, as long.
        difference: gets it; float32, as long.
    """
    if left.is_cpu and left.dtype == right.dtype == torch.float32:
        loops.subtract_float32(left.numpy(), right.numpy(), difference.numpy())
    elif _is_narrow(left) and left.dtype == right.dtype:
        loops.subtract_narrow(_bits(left), _bits(right), left.dtype == torch.float16, difference.numpy())
    else:
        difference.copy_(left).sub_(right.float())


def add(total: Tensor, summand: Tensor) -> Tensor:
    """Add elements in any float dtype to float32 ones in place, and return these."""
    if _is_narrow(summand):
        loops.add_narrow(total.numpy(), _bits(summand), summand.dtype == torch.float16)
        return total
    return total.add_(summand.float())


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return flat values in another dtype, and whether all are finite in it; NaN and Inf may become others."""
    if values.is_cpu and values.dtype == torch.float32:
        if dtype in _NARROW:
            narrow = torch.empty_like(values, dtype=dtype)
            return narrow, bool(loops.round_narrow(values.numpy(), dtype == torch.float16, _bits(narrow)))
        if dtype == torch.float32:
            return values, loops.largest_magnitude(values.numpy()) < loops.INFINITE
    # Rounding keeps the order, so the extremes tell of all; NaN is an extreme.
    extremes = torch.stack(values.aminmax())
    return values.to(dtype), bool(extremes.to(dtype).isfinite().all())


def _is_narrow(values: Tensor) -> bool:
    return values.is_cpu and values.dtype in _NARROW


def _bits(values: Tensor) -> loops.UInt16:
    """Return the bits of float16 or bfloat16 elements, in the same memory."""
    bits: loops.UInt16 = values.view(torch.uint16).numpy()
    return bits
