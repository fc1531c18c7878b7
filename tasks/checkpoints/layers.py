"""Which tensor belongs to which layer."""

import re
from collections.abc import Iterable

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
