"""The network that peft loads an adapter of a base into: which of the base's tensors an adapter can hold, and how."""

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.networks import skeleton


@dataclass(frozen=True)
class AdaptedNetwork:
    """The network that peft loads an adapter of the base into, and the base's tensors in it."""

    base: Base

    @cached_property
    def network(self) -> PreTrainedModel:
        """The network on the meta device."""
        return skeleton(self.base.config, None, self.base.folder)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """All modules by name."""
        return dict(self.network.named_modules())

    @cached_property
    def places(self) -> dict[str, str]:
        """Name of each tensor in the network, less those that are stored in another form."""
        names, by_key = self.base.names, self.base.by_key()
        found = {by_key.get(names.key(name)): name for name in self.network.state_dict()}
        return {tensor: name for tensor, name in found.items() if tensor is not None}

    @property
    def task_type(self) -> str | None:
        """What peft calls the kind of the network; None for any other kind: of classifiers, peft retrains the head."""
        config, cls = type(self.base.config), type(self.network)
        if cls is modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None):
            return "CAUSAL_LM"
        return "SEQ_2_SEQ_LM" if cls is modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(config, None) else None

    @cached_property
    def tied(self) -> dict[str, str]:
        """Other names of tied parameters in the network, each with the name that its tensor is stored under."""
        names = self.base.names
        return {names.spelled(alias): names.spelled(key) for alias, key in names.tied.items()}

    def module(self, tensor: str) -> str:
        """Return the name of the module that a tensor belongs to."""
        return self.places[tensor].rpartition(".")[0]

    def is_transposed(self, tensor: str) -> bool:
        """Return whether the weight of a linear layer has the shape (in, out)."""
        return isinstance(self.modules[self.module(tensor)], Conv1D)

    def why_not(self, tensor: str) -> str:
        """Say why there can be no factors of a tensor; "" if there can be."""
        module, _, parameter = self.places.get(tensor, "").rpartition(".")
        if parameter != "weight" or not isinstance(self.modules[module], nn.Linear | Conv1D):
            return "it is not the weight of a linear layer"
        other = self._taken_for(module)
        return f"peft would adapt {other} by its name, too" if other else ""

    def whole_module(self, tensor: str, adapted: Collection[str]) -> tuple[str, dict[str, str]] | None:
        """Return the module that peft can store whole for a tensor, and its tensors by their names in the network.

        Returns:
            None where it cannot: the module has parts of its own, factors, or a tensor that the base stores otherwise.
        """
        module = self.places.get(tensor, "").rpartition(".")[0]
        if not module or module in adapted or self._taken_for(module):
            return None
        if any(self.modules[module].children()):
            return None
        stored = {name: one for one, name in self.places.items() if name.rpartition(".")[0] == module}
        expected = {f"{module}.{name}" for name in self.modules[module].state_dict()}
        return (module, stored) if stored.keys() == expected else None

    def _taken_for(self, name: str) -> str | None:
        """Return another module that peft takes a name for: it takes it for all whose own names end in it."""
        place = bisect_right(self._backwards, name[::-1])  # behind it come, first, those that begin with it
        found = self._backwards[place] if place < len(self._backwards) else ""
        return found[::-1] if found.startswith(name[::-1]) else None

    @cached_property
    def _backwards(self) -> list[str]:
        return sorted(name[::-1] for name in self.modules)
