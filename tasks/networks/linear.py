"""Linear layers: where in parameters their matrices are, and what is given to those that no module of their own has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.checkpoints.weights import View


@dataclass(frozen=True)
class LinearWeight:
    """The matrix of a linear layer."""

    name: str
    """of the parameter in the network"""
    view: View
    """where it is in the parameter, (out, in)"""

    @property
    def label(self) -> str:
        """What tells it from others, which may be in the same parameter."""
        return f"{self.name}[{self.view.offset}]" if self.view.offset else self.name

    def input_dims(self, parts: Mapping[str, View] | None) -> dict[str, int]:
        """Return the tensors that are some of its rows, and the dimension of each that inputs run along.

        Args:
            parts: of the parameter, by tensor of the checkpoint (`Source.parts`); None if they are no parts of it.
        """
        (outputs, inputs), (step, stride) = self.view.shape, self.view.stride
        found = {}
        for tensor, part in (parts or {}).items():
            first, odd = divmod(part.offset - self.view.offset, step)
            for dim in (1, 0) if len(part.shape) == 2 else ():
                rows, fits = part.shape[1 - dim], part.shape[dim] == inputs
                same = part.stride[dim] == stride and part.stride[1 - dim] == step
                if tensor not in found and fits and same and not odd and 0 <= first <= outputs - rows:
                    found[tensor] = dim
        return found


def linear_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Linear | Conv1D, LinearWeight]]:
    """Yield the linear layers of a network or a part of it, and their matrices.

    Args:
        module: the network or the part; it may be on the meta device.
        prefix: its name in the network with a dot behind, empty for the network itself.
    """
    names = {id(parameter): prefix + name for name, parameter in module.named_parameters()}
    for layer in module.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            weight: Any = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            yield layer, LinearWeight(names[id(layer.weight)], View(tuple(weight.shape), weight.stride(), 0))


def loose_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield matrices, and stacks of them, that may be a linear layer's without being a module's of that kind.

    A router's are, and those of a mixture's experts, which transformers stacks. Arguments as in `linear_weights`.
    """
    names = {id(parameter): prefix + name for name, parameter in module.named_parameters()}
    for owner in module.modules():
        if not isinstance(owner, nn.Linear | Conv1D | nn.Embedding):
            for parameter in owner.parameters(recurse=False):
                if parameter.ndim in (2, 3):
                    yield names[id(parameter)], parameter


def run_experts_apart(module: nn.Module) -> None:
    """Have the experts of mixtures run one after the other, each on the tokens that are routed to it.

    What transformers runs otherwise is one kernel for all, of which nothing can be seen.
    """
    for child in module.modules():
        if hasattr(child, "_is_expert_parallel"):  # what transformers can run in several ways
            child.config._experts_implementation = "eager"  # type: ignore[union-attr]


class LinearCalls(TorchFunctionMode):
    """Sees calls of `linear` with some matrices, or with one of a stack of them."""

    def __init__(self, names: Mapping[int, str], see: Callable[[LinearWeight, Tensor, Tensor], None]) -> None:
        """Watch some parameters.

        Args:
            names: of the parameters in the network, by their `id`.
            see: called with a matrix, its values and the inputs of a call, before it.
        """
        super().__init__()
        self._names, self._see = names, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See a call, and let it be done."""
        if func is functional.linear and len(args) > 1 and args[1].ndim == 2:
            weight: Tensor = args[1]
            whole = weight if id(weight) in self._names else weight._base
            name = self._names.get(id(whole))
            if whole is not None and name is not None:
                offset = int(weight.storage_offset() - whole.storage_offset())
                self._see(LinearWeight(name, View(tuple(weight.shape), weight.stride(), offset)), weight, args[0])
        return func(*args, **(kwargs or {}))
