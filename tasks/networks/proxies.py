"""What stands in the places of a network's blocks while the rest of it runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, autograd, nn

from sensmerge.tasks.networks.calls import Call

Visit = Callable[[int, Tensor, Call], Any]
"""Answers a call of a block: its number, the hidden states, and what it is given beside them."""


class Stop(Exception):
    """The network need not run on."""


BESIDE = object()
"""Stands for what a block gives beside hidden states: no other block may be given it."""
ANSWERS: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, BESIDE),
    lambda hidden: (hidden, BESIDE, BESIDE),
)
"""Forms in which networks expect what blocks give."""


class Proxy(nn.Module):
    """Stands in the place of a block, whose attributes it has."""

    def __init__(self, visit: Visit, index: int, block: nn.Module) -> None:
        """Stand for block number `index`, whose calls `visit` answers."""
        super().__init__()
        self._apart = (visit, index, block)  # in a tuple: no submodule

    def __getattr__(self, name: str) -> Any:
        """Return what the block has."""
        return getattr(self.__dict__["_apart"][2], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Answer as `visit` says."""
        visit, index, _ = self._apart
        return visit(index, hidden_states, (args, kwargs))


class AcrossBlocks(autograd.Function):
    """All blocks in the eyes of autograd: what comes out of them, and what comes back, is known."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Return the hidden states behind the blocks, and keep the gradient before them."""
        ctx.gradient = gradient
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient that is known."""
        return ctx.gradient, None, None
