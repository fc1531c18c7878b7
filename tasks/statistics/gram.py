"""Gram: Σ x xᵀ over the inputs x of each linear layer, all tokens of all samples (arXiv 2212.09849)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic, Total

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS = 512
"""Inputs that are multiplied at a time: enough for a product to be fast, few enough to take little memory."""
PANEL = 512
"""Columns of the symmetric matrix that are worked on at a time: what lies below their diagonal block is left out."""


@STATISTICS.register("gram")
@dataclass(frozen=True)
class Gram(Statistic):
    """Σ x xᵀ of the inputs of each linear layer, float32, (in, in).

    Samples are run one by one, so that no token is padding and every token counts. Layers with the same inputs (query,
    key and value, say) share a matrix. An expert of a mixture counts the tokens that are routed to it: `read_tokens`
    says how many, and one that had none has no matrix.
    """

    hook = "inputs"
    by = "tensor"
    inputs_alone = True

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return seen.float().T @ seen.float()

    def total(self) -> Total:
        """See `Statistic`."""
        return GramTotal(self)

    @classmethod
    def restored(cls, stored: Tensor) -> Tensor:
        """See `Statistic`: of (tokens, in) inputs x their Σ x xᵀ, of a packed matrix the whole one."""
        if stored.ndim == 1:
            return unpacked(stored)
        inputs = stored.float()
        return inputs.T @ inputs

    def held_bytes(self, shape: Sequence[int]) -> int:
        """See `Statistic`: half of a float32 matrix, and as much of inputs, or those of `TOKENS` tokens."""
        return self.stored_bytes(shape) + max(self.stored_bytes(shape), 4 * TOKENS * shape[-1])

    def stored_bytes(self, shape: Sequence[int]) -> int:
        """See `Statistic`: half of a float32 matrix with its diagonal, 4 · in · (in + 1) / 2 bytes."""
        return 2 * shape[-1] * (shape[-1] + 1)


class GramTotal(Total):
    """Keeps inputs as they are while they are smaller than half of the matrix, and multiplies them then.

    So what is multiplied is many tokens long, however short the samples are: a few float32 additions to each element
    and not one for every sample, with a relative error below 1e-5 of √(Gᵢᵢ Gⱼⱼ) (`tests/tasks/statistics`). A float64
    sum would be twice as large, and methods read float32. Products of bfloat16 numbers are exact in float32; where the
    inputs are such, and the processor multiplies them as such, that is several times as fast.

    Memory, for inputs of n numbers: 2·n·(n + 1) bytes of inputs, of which those that are used are taken, and 2·n² +
    2·n·`PANEL` of the matrix, from the first time on that inputs are multiplied; 4·n·`TOKENS` meanwhile.
    """

    def __init__(self, statistic: Statistic) -> None:
        """Begin with nothing."""
        super().__init__(statistic)
        self._inputs: Tensor | None = None
        self._count = 0
        self._panels: list[Tensor] = []

    def add(self, parameter: Tensor, seen: Tensor) -> None:
        """See `Total`."""
        if self._inputs is None:
            width = seen.shape[1]
            self._inputs = seen.new_empty(max(TOKENS, _fewest(width, seen.dtype)), width)
        while len(seen):
            if self._count == len(self._inputs):
                self._multiply(self._inputs)
            fitting = seen[: len(self._inputs) - self._count]
            self._inputs[self._count : self._count + len(fitting)] = fitting
            self._count, seen = self._count + len(fitting), seen[len(fitting) :]

    def stored(self) -> Tensor:
        """See `Total`: the inputs, or the packed matrix where that is smaller."""
        assert self._inputs is not None, "a total begins with a sample"
        if not self._panels and self._count <= _fewest(self._inputs.shape[1], self._inputs.dtype):
            return self._inputs[: self._count].clone()
        self._multiply(self._inputs)
        self._inputs = None
        return packed(self._panels)

    def _multiply(self, inputs: Tensor) -> None:
        """Add all inputs to the matrix."""
        import torch

        with _exact_products(inputs.dtype):
            for some in torch.split(inputs[: self._count], TOKENS):
                add_outer(self._panels, some.float())
        self._count = 0


def _fewest(width: int, dtype: torch.dtype) -> int:
    """Return how many inputs take no more than half of a float32 matrix with its diagonal."""
    return 2 * (width + 1) // dtype.itemsize


def add_outer(panels: list[Tensor], inputs: Tensor) -> None:
    """Add Σ x xᵀ to the upper half of a symmetric matrix.

    Args:
        panels: its rows, `PANEL` at a time, each from its first diagonal element on, (rows, rest), float32; made if
            there are none.
        inputs: (tokens, in), float32.
    """
    width = inputs.shape[1]
    if not panels:
        starts = range(0, width, PANEL)
        panels += [inputs.new_zeros(min(PANEL, width - start), width - start) for start in starts]
    for number, panel in enumerate(panels):
        start = number * PANEL
        panel.addmm_(inputs[:, start : start + PANEL].T, inputs[:, start:])


def packed(panels: Sequence[Tensor]) -> Tensor:
    """Return the upper half of a symmetric matrix row by row, (n · (n + 1) / 2,), on the CPU; panels as above."""
    import torch

    return torch.cat([row[place:] for panel in panels for place, row in enumerate(panel.cpu())])


def unpacked(half: Tensor) -> Tensor:
    """Return a symmetric matrix, (n, n), from its upper half (`packed`)."""
    import torch

    width = (math.isqrt(8 * len(half) + 1) - 1) // 2
    whole = half.new_empty(width, width)
    for row, part in enumerate(torch.split(half, list(range(width, 0, -1)))):
        whole[row, row:] = part
    for start in range(0, width, PANEL):
        end = min(start + PANEL, width)
        block = whole[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).T)
        whole[end:, start:end] = whole[start:end, end:].T
    return whole


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Have float32 products computed in fewer bits within the block, where they are exact all the same.

    Of bfloat16 numbers they are: oneDNN multiplies them as such, tensor cores as TF32, and both add up in float32.
    """
    import torch

    backends: Any = torch.backends
    modes = [(backends.mkldnn.matmul, "bf16"), (backends.cuda.matmul, "tf32")]
    before = [where.fp32_precision for where, _ in modes]
    try:
        if dtype == torch.bfloat16:
            for where, mode in modes:
                where.fp32_precision = mode
        yield
    finally:
        for (where, _), mode in zip(modes, before, strict=True):
            where.fp32_precision = mode
