"""What stands in the places of a network's blocks while the code around them runs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sensmerge.tasks.networks.blocks import Shell


class Stop(Exception):
    """The network need not run on."""


class Proxy(nn.Module):
    """Stands in the place of a block, whose attributes it has."""

    def __init__(self, shell: "Shell", index: int, block: nn.Module) -> None:
        """Stand for block `index` of a shell."""
        super().__init__()
        self._apart = (shell, index, block)  # in a tuple: no submodule

    def __getattr__(self, name: str) -> Any:
        """Return what the block has."""
        return getattr(self.__dict__["_apart"][2], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand what the block is given to the shell."""
        shell, index, _ = self._apart
        return shell.visit(index, hidden_states, (args, kwargs))


class AcrossBlocks(torch.autograd.Function):
    """All blocks in the eyes of autograd: what comes out of them, and what comes back, is known."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Return what came out of the blocks."""
        ctx.gradient = gradient
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of what goes into the blocks."""
        return ctx.gradient, None, None
