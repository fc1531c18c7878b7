"""Where a network runs: whole, block by block, or with its blocks on several workers; and which of them fits."""

from dataclasses import dataclass
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


Placement = Literal["whole", "streamed"] | Actors
