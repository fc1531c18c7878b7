"""Where a network runs: whole, block by block, or with its blocks on several workers; and which of them fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Actors:
    """The blocks of a network are shared out among several workers."""

    count: int
    """how many"""
    num_cpus: float
    """CPU cores of each"""
    num_gpus: float
    """GPUs of each"""
    custom: Mapping[str, float] = field(default_factory=dict)
    """what each takes beside these, by Ray's names"""


Placement = Literal["whole", "streamed"] | Actors


def shares(shell: int, blocks: Sequence[int], count: int) -> list[slice]:
    """Share blocks out in ranges of about the same size.

    Args:
        shell: size of the shell, which is in the first share.
        blocks: size of each block, in order.
        count: how many shares, at most as many as blocks.

    Returns:
        The blocks of each share, one at least.
    """
    ends: list[int] = []
    for number in range(1, count):
        goal = (shell + sum(blocks)) * number / count
        first, last = (ends[-1] if ends else 0) + 1, len(blocks) - (count - number)
        ends.append(min(range(first, last + 1), key=lambda end: abs(shell + sum(blocks[:end]) - goal)))
    return [slice(start, end) for start, end in zip([0, *ends], [*ends, len(blocks)], strict=True)]
