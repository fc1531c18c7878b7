"""Arithmetic in float32 on elements in the dtypes that files have; on a CPU in compiled loops."""

from collections.abc import Sequence

import numpy as np
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
    elif is_narrow(left) and left.dtype == right.dtype:
        loops.subtract_narrow(bits(left), bits(right), left.dtype == torch.float16, difference.numpy())
    else:
        difference.copy_(left).sub_(right.float())


def add(total: Tensor, summand: Tensor) -> Tensor:
    """Add elements in any float dtype to float32 ones in place, and return these."""
    if is_narrow(summand):
        loops.add_narrow(total.numpy(), bits(summand), summand.dtype == torch.float16)
        return total
    return total.add_(summand.float())


def can_sum(base: Tensor, experts: int) -> bool:
    """Return whether `sum_differences` can sum those of so many experts."""
    return base.is_cpu and base.dtype in (torch.float32, *_NARROW) and 1 <= experts <= 4


def sum_differences(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ weight · (expert − base) in float32, flat.

    Args:
        base: flat, on a CPU, in float16, bfloat16 or float32.
        experts: one to four, likewise, each as long.
        weights: of the experts.
    """
    lacking = 4 - len(experts)
    four, factors = [*experts, *[base] * lacking], np.array([*weights, *[-1] * lacking], np.float32)
    mixed = torch.empty(len(base))
    if base.dtype == torch.float32:
        loops.sum_float32(base.numpy(), tuple(one.numpy() for one in four), factors, mixed.numpy())
    else:
        every = tuple(map(bits, four))
        loops.sum_narrow(bits(base), every, base.dtype == torch.float16, factors, mixed.numpy())
    return mixed


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return flat values in another dtype, and whether all are finite in it; NaN and Inf may become others."""
    if values.is_cpu and values.dtype == torch.float32:
        if dtype in _NARROW:
            narrow = torch.empty_like(values, dtype=dtype)
            return narrow, bool(loops.round_narrow(values.numpy(), dtype == torch.float16, bits(narrow)))
        if dtype == torch.float32:
            return values, loops.largest_magnitude(values.numpy()) < loops.INFINITE
    # Rounding keeps the order, so the extremes tell of all; NaN is an extreme.
    extremes = torch.stack(values.aminmax())
    return values.to(dtype), bool(extremes.to(dtype).isfinite().all())


def is_narrow(values: Tensor) -> bool:
    """Return whether elements are of float16 or bfloat16, on a CPU."""
    return values.is_cpu and values.dtype in _NARROW


def bits(values: Tensor) -> loops.UInt16:
    """Return the bits of float16 or bfloat16 elements, in the same memory."""
    found: loops.UInt16 = values.view(torch.uint16).numpy()
    return found
