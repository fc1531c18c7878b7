"""Which tensor belongs to which layer."""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def layer_of(name: str) -> str:
    """Return the layer of a tensor: its transformer block, or, outside the blocks, its own module.

    The block is the name up to its first numeric component: `model.layers.0.mlp.up_proj.weight` is in
    `model.layers.0`, `model.embed_tokens.weight` in `model.embed_tokens`.
    """
    block = _BLOCK.match(name)
    if block:
        return block[1]
    module, _, parameter = name.rpartition(".")
    return module or parameter


def in_block(name: str) -> bool:
    """Return whether a tensor lies in a numbered block."""
    return _BLOCK.match(name) is not None


def block_names(names: Iterable[str]) -> list[str]:
    """Return the transformer blocks that tensors lie in, in order."""
    return list(dict.fromkeys(layer_of(name) for name in names if in_block(name)))


def group_by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the tensors of each layer, layers in the order of their first tensor."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of(name), []).append(name)
    return groups


def depths(layers: Sequence[str]) -> dict[str, float]:
    """Return how deep each layer lies in its stack of blocks: from 0, the first block, evenly to 1, the last.

    A layer outside the blocks counts with the stack whose name it has most in common with: 0 if it comes before the
    first block there, such as an embedding, and 1 if it comes later, such as a final norm or a head.

    Args:
        layers: in the order of the network.
    """
    stacks: dict[str, list[str]] = {}
    for layer in layers:
        if in_block(f"{layer}."):
            stacks.setdefault(layer.rpartition(".")[0], []).append(layer)
    found = {}
    for place, layer in enumerate(layers):
        stack = layer.rpartition(".")[0]
        if layer in stacks.get(stack, ()):
            last = len(stacks[stack]) - 1
            found[layer] = stacks[stack].index(layer) / last if last else 1.0
        elif stacks:
            nearest = max(stacks, key=lambda one: _modules_in_common(one, layer))
            found[layer] = float(place > layers.index(stacks[nearest][0]))
    return found


def depths_of_blocks(layers: Sequence[str]) -> dict[str, float]:
    """Return how deep each layer lies in its stack of blocks, as `depths`; 0 outside the blocks, as mergekit has it."""
    found = depths(layers)
    return {layer: found[layer] if in_block(f"{layer}.") else 0.0 for layer in layers}


def _modules_in_common(name: str, other: str) -> int:
    """Return how many modules, from the outermost on, two names share."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
