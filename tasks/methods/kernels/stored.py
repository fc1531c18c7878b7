"""Arithmetic in float32 on elements in the dtypes that files have; of bfloat16 on a CPU in compiled loops."""

import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels import loops


def subtract(left: Tensor, right: Tensor, difference: Tensor) -> None:
    """Write left − right.

    Args:
        left: flat, in any float dtype.
        right: likewise, as long.
        difference: gets it; float32, as long.
    """
    if _is_plain(left) and _is_plain(right):
        loops.subtract_bfloat16(_bits(left), _bits(right), difference.numpy())
    else:
        difference.copy_(left).sub_(right.float())


def add(total: Tensor, summand: Tensor) -> Tensor:
    """Add elements in any float dtype to float32 ones in place, and return these."""
    if _is_plain(summand):
        loops.add_bfloat16(total.numpy(), _bits(summand))
        return total
    return total.add_(summand.float())


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return flat values in another dtype, and whether all are finite in it; NaN and Inf may become others."""
    if values.is_cpu and values.dtype == torch.float32 and dtype == torch.bfloat16:
        narrow = torch.empty_like(values, dtype=dtype)
        return narrow, bool(loops.round_bfloat16(values.numpy(), _bits(narrow)))
    # Rounding keeps the order, so the extremes tell of all; NaN is an extreme.
    extremes = torch.stack(values.aminmax())
    return values.to(dtype), bool(extremes.to(dtype).isfinite().all())


def _is_plain(values: Tensor) -> bool:
    return values.is_cpu and values.dtype == torch.bfloat16


def _bits(values: Tensor) -> loops.UInt16:
    """Return the bits of bfloat16 elements, in the same memory."""
    bits: loops.UInt16 = values.view(torch.uint16).numpy()
    return bits
