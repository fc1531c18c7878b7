"""How much memory networks take in each placement, from what headers tell. All numbers are bytes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sensmerge.tasks.checkpoints.layers import in_block, layer_of
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.placement import shares
from sensmerge.tasks.stages.cross_task import CHUNK_TOKENS

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """What the networks of a stage take.

    The activations of a sample of t tokens are what goes into and comes out of each matrix, t · (rows + columns), and
    three times its logits in float32, 3 · 4 · t · vocabulary.
    """

    base: Base
    dtype: torch.dtype
    """of the networks"""
    tokens: int
    """of the longest sample"""
    gradients: bool
    """whether there is a way back: then a gradient as large as the largest tensor exists, and the activations of all
    matrices that take part; else those of one matrix at a time"""

    def whole(self) -> int:
        """Return what a whole network takes: weights + gradient + activations in all blocks + logits."""
        return sum(self._blocks.values()) + self._shell + self._beside(list(self._blocks))

    def streamed(self) -> int:
        """Return what a network block by block takes: shell + two blocks + gradient + activations in one + logits.

        Hidden states between blocks lie on disk, and not in this sum.
        """
        largest = max(self._blocks, key=self._blocks.__getitem__)
        return self._shell + min(2, len(self._blocks)) * self._blocks[largest] + self._beside([largest])

    def actor(self, count: int) -> int:
        """Return what the largest of some actors takes: its share of the weights + gradient + activations + logits."""
        names, sizes = list(self._blocks), list(self._blocks.values())
        parts = [names[part] for part in shares(self._shell, sizes, count)]
        taken = [sum(self._blocks[name] for name in part) + self._beside(part) for part in parts]
        return max(taken[0] + self._shell, *taken[1:], 0)

    def heads(self, experts: int) -> int:
        """Return what the heads of all experts take that are compared: K · vocabulary · width + two chunks of logits.

        The width is that of the embedding, which is as large as the head.
        """
        text = self.base.config.get_text_config()
        head = self._vocabulary * int(getattr(text, "hidden_size", 0))
        return experts * head * self.dtype.itemsize + 2 * CHUNK_TOKENS * self._vocabulary * 4

    @cached_property
    def _blocks(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for name in filter(in_block, self.base.weights):
            found[layer_of(name)] = found.get(layer_of(name), 0) + self.base.info(name).numel * self.dtype.itemsize
        return found

    @cached_property
    def _shell(self) -> int:
        outside = (self.base.info(name).numel for name in self.base.weights if not in_block(name))
        return sum(outside) * self.dtype.itemsize

    @property
    def _vocabulary(self) -> int:
        return int(getattr(self.base.config.get_text_config(), "vocab_size", 0))

    def _beside(self, blocks: list[str]) -> int:
        """Return what some blocks take beside their weights, the head included."""
        infos = {name: self.base.info(name) for name in self.base.weights}
        chosen = set(blocks)
        inner = [sum(info.shape) for name, info in infos.items() if len(info.shape) == 2 and layer_of(name) in chosen]
        states = self.tokens * (sum(inner) if self.gradients else max(inner, default=0))
        gradient = max(info.numel for info in infos.values()) if self.gradients else 0
        return (gradient + states) * self.dtype.itemsize + 3 * self.tokens * self._vocabulary * 4


def machine_memory() -> int:
    """Return the bytes of memory that this machine, or the container that this is, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))
