"""Nodes that share no disk: whether there are any, and what to do when one leaves with what it had made."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sensmerge.pipeline.store.store import Store

LOST = 3
"""How many nodes may leave while they are at work on one step; spot instances do."""


class Disks:
    """Which nodes see the folder that this process has of a store at a URL; Ray is connected."""

    def __init__(self, store: Store) -> None:
        """Ask no node yet."""
        self._store = store
        self._seen: dict[str, bool] = {}

    def are_apart(self) -> bool:
        """Return whether some node that is there now does not; a store in a folder is one that all nodes see.

        Every node is asked once, which takes a second or two.
        """
        new = [node for node in alive() if node not in self._seen]
        if self._store.remote is not None and new:
            mark = self._store.root / f".seen-{uuid4().hex}"
            mark.touch()
            try:
                sees = ray.remote(_sees)
                asked = {node: sees.options(num_cpus=0, scheduling_strategy=on_node(node)).remote(mark) for node in new}
                for node, answer in asked.items():
                    with suppress(ray.exceptions.RayError):  # it has left meanwhile
                        self._seen[node] = ray.get(answer)
            finally:
                mark.unlink()
        return not all(self._seen.values())


def _sees(path: Path) -> bool:
    return path.exists()


def alive() -> list[str]:
    """Return Ray's ids of the nodes that are there."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def with_room(wanted: Mapping[str, float]) -> list[str]:
    """Return Ray's ids of the nodes that could give so much, by Ray's names, whatever is at work there now."""
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return [name for name, has in nodes.items() if all(has.get(one, 0) >= amount for one, amount in wanted.items())]


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """Return what has work done on a node, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def is_gone(ended: ray.ObjectRef[Any], node: str) -> bool:
    """Return whether a piece of work has no answer because the node that had to do it is gone."""
    try:
        ray.get(ended)
    except ray.exceptions.RayTaskError:
        return False
    except ray.exceptions.TaskUnschedulableError:
        return True
    except ray.exceptions.RayError:
        return node not in alive()
    return False
