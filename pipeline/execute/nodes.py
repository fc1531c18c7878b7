"""Nodes that share no disk: whether there are any, and what to do when one leaves with what it had made."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sensmerge.pipeline.store.store import Store

LOST = 3
"""How many nodes may leave while they are at work on one step; spot instances do."""


def disks_are_apart(store: Store) -> bool:
    """Return whether some node of the cluster does not see the folder that this process has of a store at a URL.

    Ray is connected. Every node is asked, which takes a second or two; a store in a folder is one that all nodes see.
    """
    nodes = alive()
    if store.remote is None or len(nodes) == 1:
        return False
    mark = store.root / f".seen-{uuid4().hex}"
    mark.touch()
    try:
        asked = ray.remote(_sees).options(num_cpus=0)
        seen = [asked.options(scheduling_strategy=on_node(node)).remote(mark) for node in nodes]
        return not all(ray.get(seen))
    finally:
        mark.unlink()


def _sees(path: Path) -> bool:
    return path.exists()


def alive() -> list[str]:
    """Return Ray's ids of the nodes that are there."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


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
