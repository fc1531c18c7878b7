"""What a block of a network is given beside the hidden states, and how it is called with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given beside the hidden states: positional arguments and those with names."""
Calls = Sequence[Call]
"""All calls of one block, which is called again with what it gives where a network has one block for all layers."""
Learned = Sequence[Tensor]
"""What blocks are given that depends on weights outside them (embeddings of relative positions, say), detached."""


@dataclass(frozen=True)
class Slot:
    """The place of one of the tensors that are learned."""

    index: int


def run_block(block: nn.Module, hidden: Tensor, calls: Calls, learned: Learned) -> Tensor:
    """Return the hidden states behind a block, (B, T, width); all is on the block's device.

    Args:
        block: with its weights.
        hidden: hidden states before it.
        calls: with a `Slot` in the place of what is learned.
        learned: what is put there.
    """

    def given(leaf: Any) -> Any:
        return learned[leaf.index] if isinstance(leaf, Slot) else leaf

    for args, kwargs in tree_map(given, calls):
        output = block(hidden, *args, **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
    return hidden
