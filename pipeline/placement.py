"""Where the networks of a stage run, and why."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.recipe import ActorPlacement, Recipe, Stage
from tasks.errors import InputError
from tasks.models.blocks import blocks_of
from tasks.models.expert import Base
from tasks.models.layers import in_block
from tasks.models.networks import skeleton
from tasks.models.placement import Actors, Placement

MARGIN = 2
"""A network runs whole if a worker has this many times the memory that it needs: headers do not tell everything."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Choice:
    """A placement and the reason for it."""

    placement: Placement
    why: str

    @property
    def name(self) -> str:
        """The placement as recipes say it."""
        if isinstance(self.placement, Actors):
            return f"{{actors: {self.placement.count}}}"
        return self.placement


def choose(recipe: Recipe, stage: Stage, base: Base, tokens: int, human: Callable[[int], str]) -> Choice:
    """Return where the networks of a stage run.

    Args:
        recipe: its `placement`, and `auto` by the memory of a worker of the stage.
        stage: sensitivity or cross_task.
        base: the base's headers.
        tokens: length of the longest calibration sample.
        human: how to write a number of bytes.

    Raises:
        InputError: blocks of this network cannot be run apart, or are fewer than actors.
    """
    asked, resources = recipe.placement, recipe.resources_of(stage)
    if isinstance(asked, ActorPlacement):
        blocks = len(_blocks(base))
        if asked.actors > blocks:
            raise InputError(
                f"placement.actors is {asked.actors}; the base has {blocks} blocks, and each actor takes one or more: "
                f"set it to {blocks} at most"
            )
        return Choice(Actors(asked.actors, resources.num_cpus, resources.num_gpus), "as the recipe says")
    if asked != "auto":
        if asked == "streamed":
            _blocks(base)
        return Choice(asked, "as the recipe says")
    needed = whole_bytes(base, getattr(torch, recipe.dtype), tokens, gradients=stage == "sensitivity")
    if resources.num_gpus:
        if not torch.cuda.is_available():
            return Choice("whole", "auto: this machine has no GPU that tells how much memory those of workers have")
        memory, whose = int(torch.cuda.mem_get_info()[1] * min(1, resources.num_gpus)), "the GPU of a worker"
    else:
        at_once = max(1, min(resources.max_in_flight, int((os.cpu_count() or 1) / resources.num_cpus)))
        memory, whose = machine_memory() // at_once, f"a worker ({at_once} at once on a machine like this one)"
    fits = needed * MARGIN <= memory
    if not fits:
        _blocks(base)
    return Choice(
        "whole" if fits else "streamed",
        f"auto: a whole network with the activations of {tokens} tokens takes {human(needed)}, "
        f"{'at most' if fits else 'more than'} half of the {human(memory)} of {whose}",
    )


def _blocks(base: Base) -> Collection[str]:
    try:
        return blocks_of(skeleton(base.config, None, base.folder))
    except InputError as error:
        raise InputError(f"placement: {error}") from error


def whole_bytes(base: Base, dtype: torch.dtype, tokens: int, gradients: bool) -> int:
    """Return the memory that a whole network takes: weights, one gradient, and the activations of one sample.

    Activations are what goes into and comes out of each matrix, in all blocks for gradients and else in one at a time,
    and three times the logits in float32.
    """
    infos = {name: base.info(name) for name in base.weights}
    weights = sum(info.numel for info in infos.values())
    inner = [sum(info.shape) for name, info in infos.items() if in_block(name) and len(info.shape) == 2]
    states = tokens * (sum(inner) if gradients else max(inner, default=0))
    vocabulary = getattr(base.config.get_text_config(), "vocab_size", 0)
    largest = max(info.numel for info in infos.values()) if gradients else 0
    return (weights + largest + states) * dtype.itemsize + 3 * tokens * vocabulary * 4


def machine_memory() -> int:
    """Return the bytes of memory that this machine, or the container that this is, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))
