"""How much memory networks take in each placement, from what headers tell. All numbers are bytes."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sensmerge.tasks.checkpoints.layers import in_block, layer_of
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.blocks import blocks_of
from sensmerge.tasks.networks.linear import linear_weights, loose_weights
from sensmerge.tasks.networks.networks import skeleton
from sensmerge.tasks.networks.placement import shares
from sensmerge.tasks.networks.watching import Statistics, needs_gradients
from sensmerge.tasks.stages.cross_task import CHUNK_TOKENS
from sensmerge.tasks.statistics.statistic import Statistic

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """What the networks of a stage take.

    The activations of a sample of t tokens are what goes into and comes out of each matrix, t · (rows + columns), and
    three times its logits in float32, 3 · 4 · t · vocabulary. Statistics by tensor hold the totals of what is in memory
    (`Statistic.held_bytes`): gram 4 · in · (in + 1) bytes for each linear layer, of each expert of a mixture too, as if
    none had the same inputs as another; fisher 4 bytes for each element.
    """

    base: Base
    dtype: torch.dtype
    """of the networks"""
    tokens: int
    """of the longest sample"""
    statistics: Statistics
    """what sees the samples, by name. If some need gradients, there is a way back: then a gradient as large as the
    largest tensor exists, and the activations of all matrices that take part; else those of one matrix at a time"""

    def whole(self) -> int:
        """Return what a whole network takes: weights + gradient + activations in all blocks + logits + totals."""
        blocks = list(self._blocks)
        return sum(self._blocks.values()) + self._shell + self._beside(blocks) + self._totals([*blocks, None])

    def streamed(self) -> int:
        """Return what a network block by block takes: shell + blocks + gradient + activations in one + logits + totals.

        There are two blocks, or one where statistics are taken that need no gradients. Hidden states between blocks lie
        on disk, and not in this sum.
        """
        largest = max(self._blocks, key=self._blocks.__getitem__)
        count = 1 if self.statistics and not self._gradients else min(2, len(self._blocks))
        totals = max(self._totals([name, None]) for name in self._blocks)
        return self._shell + count * self._blocks[largest] + self._beside([largest]) + totals

    def actor(self, count: int) -> int:
        """Return what the largest of some actors takes: its weights + gradient + activations + logits + totals."""
        names, sizes = list(self._blocks), list(self._blocks.values())
        parts = [names[part] for part in shares(self._shell, sizes, count)]
        taken = [sum(self._blocks[name] for name in part) + self._beside(part) + self._totals(part) for part in parts]
        return max(taken[0] + self._shell + self._totals([None]), *taken[1:], 0)

    def heads(self, experts: int) -> int:
        """Return what the heads of all experts take that are compared: K · vocabulary · width + two chunks of logits.

        The width is that of the embedding, which is as large as the head.
        """
        text = self.base.config.get_text_config()
        head = self._vocabulary * int(getattr(text, "hidden_size", 0))
        return experts * head * self.dtype.itemsize + 2 * CHUNK_TOKENS * self._vocabulary * 4

    def _is_apart(self, name: str) -> bool:
        """Return whether a tensor lies in a block that can be run apart from the shell."""
        return in_block(name) and layer_of(name) not in self._inside

    @cached_property
    def _inside(self) -> frozenset[str]:
        """Blocks that are in the shell: an encoder's beside a decoder."""
        if not self.base.config.is_encoder_decoder:
            return frozenset()
        apart = blocks_of(skeleton(self.base.config, None, self.base.folder))
        keys = tuple(self.base.network_name(f"{name}.") for name in apart)
        inner = [name for name in self.base.weights if in_block(name)]
        return frozenset(layer_of(name) for name in inner if not self.base.network_name(name).startswith(keys))

    @cached_property
    def _blocks(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for name in filter(self._is_apart, self.base.weights):
            found[layer_of(name)] = found.get(layer_of(name), 0) + self.base.info(name).numel * self.dtype.itemsize
        return found

    @cached_property
    def _shell(self) -> int:
        outside = (self.base.info(name).numel for name in self.base.weights if not self._is_apart(name))
        return sum(outside) * self.dtype.itemsize

    @cached_property
    def _gradients(self) -> bool:
        return needs_gradients(self.statistics)

    @cached_property
    def _held(self) -> Mapping[str | None, int]:
        return totals_of(self.base, self.statistics, lambda statistic, shape: statistic.held_bytes(shape))

    def _totals(self, blocks: Iterable[str | None]) -> int:
        """Return what the totals of some blocks take; None stands for all that is outside."""
        every = [one for name in blocks for one in ((None, *self._inside) if name is None else (name,))]
        return sum(self._held.get(name, 0) for name in every)

    @property
    def _vocabulary(self) -> int:
        return int(getattr(self.base.config.get_text_config(), "vocab_size", 0))

    def _beside(self, blocks: list[str]) -> int:
        """Return what some blocks take beside their weights, the head included."""
        infos = {name: self.base.info(name) for name in self.base.weights}
        chosen = {*blocks, *self._inside}
        inner = [sum(info.shape) for name, info in infos.items() if len(info.shape) == 2 and layer_of(name) in chosen]
        states = self.tokens * (sum(inner) if self._gradients else max(inner, default=0))
        gradient = max(info.numel for info in infos.values()) if self._gradients else 0
        return (gradient + states) * self.dtype.itemsize + 3 * self.tokens * self._vocabulary * 4


def totals_of(
    base: Base, statistics: Statistics, size: Callable[[Statistic, Sequence[int]], int]
) -> dict[str | None, int]:
    """Return what all totals by tensor take in each block at most; None stands for all that is outside.

    Args:
        base: the base's headers.
        statistics: by name.
        size: of a total, from the shape of its weight, inputs last.
    """
    found: dict[str | None, int] = {}
    by_tensor = [one for one in statistics.values() if one.by == "tensor"]
    shapes = {name: base.info(name).shape for name in base.weights}
    seen = _linear_shapes(base) if any(one.hook == "inputs" for one in by_tensor) else {}
    for one in by_tensor:
        for name, shape in (shapes if one.hook == "gradients" else seen).items():
            block = layer_of(name) if in_block(name) else None
            count = shape[0] if one.hook == "inputs" and len(shape) == 3 else 1
            found[block] = found.get(block, 0) + count * size(one, shape)
    return found


def _linear_shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Return the shapes of matrices that inputs are seen of, (out, in), or stacks of them, each by a tensor of it."""
    network = skeleton(base.config, None, base.folder)
    shapes = {one.name: one.view.shape for _, one in linear_weights(network)}
    shapes |= {name: tuple(one.shape) for name, one in loose_weights(network)}
    keys = {base.names.parameter(name): shape for name, shape in shapes.items()}
    first = {base.names.parameter(name): name for name in reversed(base.weights)}
    return {first[key]: shape for key, shape in keys.items() if key in first}


def machine_memory() -> int:
    """Return the bytes of memory that this machine, or the container that this is, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))
