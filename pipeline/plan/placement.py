"""Where the networks of a stage run, and why."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from sensmerge.pipeline.plan.memory import Memory, machine_memory
from sensmerge.pipeline.plan.statistics import wanted_statistics
from sensmerge.pipeline.recipe.resources import ActorPlacement
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.blocks import blocks_of
from sensmerge.tasks.networks.endings import WRITING_HEADS
from sensmerge.tasks.networks.networks import skeleton
from sensmerge.tasks.networks.placement import Actors, Placement

MARGIN = 2
"""A network runs whole if a worker has this many times the memory that it needs: headers do not tell everything."""


@dataclass(frozen=True)
class PlacementChoice:
    """A placement and the reason for it."""

    placement: Placement
    why: str

    @property
    def name(self) -> str:
        """The placement as recipes say it."""
        if isinstance(self.placement, Actors):
            return f"{{actors: {self.placement.count}}}"
        return self.placement


@dataclass(frozen=True)
class _Room:
    """The memory of a worker."""

    total: int
    """of the machine, or of the GPU"""
    most: int
    """how many workers are at once on it, at most"""
    whose: str

    @property
    def each(self) -> int:
        return self.total // self.most

    def said(self, human: Callable[[int], str]) -> str:
        return f"the {human(self.each)} of {self.whose}"


def choose(recipe: Recipe, stage: Stage, base: Base, tokens: int, human: Callable[[int], str]) -> PlacementChoice:
    """Return where the networks of a stage run.

    Args:
        recipe: its `placement`, and `auto` by the memory of a worker of the stage.
        stage: statistics or cross_task.
        base: the base's headers.
        tokens: length of the longest calibration sample.
        human: how to write a number of bytes.

    Raises:
        InputError: blocks of this network cannot be run apart, or are fewer than actors; what `auto` or a number of
            actors takes does not fit in the memory of workers on machines like this one.
    """
    asked, room = recipe.placement, _room(recipe, stage)
    statistics = wanted_statistics(recipe) if stage == "statistics" else {}
    memory = Memory(base, getattr(torch, recipe.dtype), tokens, statistics)
    completes = any(task.head in WRITING_HEADS for task in recipe.tasks.values())
    if room and stage == "cross_task" and completes and asked not in ("whole", "streamed"):
        _check_heads(memory, len(recipe.experts), room, human)
    if isinstance(asked, ActorPlacement):
        return _actors(recipe, stage, memory, room, human)
    if asked == "whole":
        return PlacementChoice("whole", f"as the recipe says: {human(memory.whole())} of memory")
    if asked == "streamed":
        _blocks(base)
        return PlacementChoice("streamed", f"as the recipe says: {human(memory.streamed())} of memory")
    if room is None:
        return PlacementChoice("whole", "auto: this machine has no GPU, so the memory of the workers' GPUs is unknown")
    return _auto(memory, stage, room, human)


def _auto(memory: Memory, stage: Stage, room: _Room, human: Callable[[int], str]) -> PlacementChoice:
    whole = f"auto: a whole network with the activations of {memory.tokens} tokens takes {human(memory.whole())}"
    if memory.whole() * MARGIN <= room.each:
        return PlacementChoice("whole", f"{whole}, at most half of {room.said(human)}")
    _blocks(memory.base)
    needed = memory.streamed()
    if needed > room.each:
        fitting = room.total // needed
        fewer = f"set resources.{stage}.max_in_flight: {fitting}, " if fitting else ""
        raise InputError(
            f"placement: {whole}, block by block {human(needed)}, more than {room.said(human)}; {fewer}"
            "set placement: {actors: N} on several machines, or dtype: bfloat16, or shorter samples"
        )
    return PlacementChoice("streamed", f"{whole}, more than half of {room.said(human)}; block by block {human(needed)}")


def _actors(
    recipe: Recipe, stage: Stage, memory: Memory, room: _Room | None, human: Callable[[int], str]
) -> PlacementChoice:
    assert isinstance(recipe.placement, ActorPlacement)
    count, blocks, resources = recipe.placement.actors, len(_blocks(memory.base)), recipe.resources_of(stage)
    if count > blocks:
        raise InputError(
            f"placement.actors is {count}; the base has {blocks} blocks, and each actor takes one or more: "
            f"set it to {blocks} at most"
        )
    placement = Actors(count, resources.num_cpus, resources.num_gpus, resources.custom)
    if room is None:
        return PlacementChoice(placement, "as the recipe says")
    fitting = [one for one in range(count, blocks + 1) if memory.actor(one) <= room.each]
    if count not in fitting:
        way = f"set it to {fitting[0]}" if fitting else f"{blocks} are not enough either; set placement: streamed"
        raise InputError(
            f"placement.actors is {count}; the largest takes {human(memory.actor(count))}, more than "
            f"{room.said(human)}; {way}, or fewer at once by resources.{stage}.num_cpus"
        )
    return PlacementChoice(placement, f"as the recipe says: {human(memory.actor(count))} of memory for the largest")


def _check_heads(memory: Memory, experts: int, room: _Room, human: Callable[[int], str]) -> None:
    needed = memory.heads(experts)
    if needed > room.total:
        raise InputError(
            f"placement: the heads of {experts} experts, whose logits are compared, take {human(needed)}, more than "
            f"the {human(room.total)} of memory; set dtype: bfloat16 or merge fewer experts at a time"
        )


def _room(recipe: Recipe, stage: Stage) -> _Room | None:
    """Return the memory of the workers of a stage; None where this machine has no GPU that tells it."""
    resources = recipe.resources_of(stage)
    if resources.num_gpus:
        if not torch.cuda.is_available():
            return None
        share = min(1, resources.num_gpus)
        return _Room(int(torch.cuda.mem_get_info()[1] * share), 1, "the GPU of a worker")
    actors = recipe.placement.actors if isinstance(recipe.placement, ActorPlacement) else 1
    # An expert's statistics and its trunk for the distances may both be under way.
    steps = min(resources.max_in_flight, 2 * len(recipe.experts))
    most = max(1, min(steps * actors, int((os.cpu_count() or 1) / resources.num_cpus)))
    return _Room(machine_memory(), most, f"a worker ({most} at once on a machine like this one)")


def _blocks(base: Base) -> Collection[str]:
    try:
        return blocks_of(skeleton(base.config, None, base.folder))
    except InputError as error:
        raise InputError(f"placement: {error}") from error
