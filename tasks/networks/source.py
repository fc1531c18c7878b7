"""Where an expert's network comes from, and the weights of any part of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sensmerge.tasks.checkpoints.checkpoint import FilesNeeded
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.checkpoints.weights import View, by_file
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import Expert, load_network, open_expert
from sensmerge.tasks.networks.networks import Head, for_one_pass, hollow_network, skeleton
from sensmerge.tasks.networks.regions import regions

if TYPE_CHECKING:  # what serves a model does without
    from sensmerge.tasks.checkpoints.unchanged import PlannedModels


@dataclass(frozen=True)
class Source:
    """An expert's network on storage: all that a worker must know to load it or a part of it."""

    base: Path
    """folder of the base"""
    folder: Path
    """folder of the expert"""
    key: str
    """recipe key of the expert, for messages"""
    head: Head
    """what the network ends in"""
    dtype: torch.dtype
    """of the weights in memory"""
    device: str
    """torch device"""
    base_config: bool = False
    """whether the expert runs with the base's settings where its own config differs"""
    models: "PlannedModels | None" = None
    """base and expert, if of their files what is read comes to this machine when it is"""

    @cached_property
    def expert(self) -> Expert:
        """The expert's headers."""
        if self.models is None:
            return self._opened()
        self.models.bring({self.base: (), self.folder: ()})
        try:
            return self._opened()
        except FilesNeeded:
            self.models.bring()
            return self._opened()

    def _opened(self) -> Expert:
        return open_expert(self.folder, open_base(self.base), self.key, base_config=self.base_config)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was read behind when travelling to another process, which may have other files open."""
        return {name: vars(self)[name] for name in self.__dataclass_fields__}

    def network(self) -> PreTrainedModel:
        """Return the whole network, made `for_one_pass`.

        Raises:
            InputError: parameters are left without weights.
        """
        expert = self.expert
        self._bring((*expert.base.weights, *expert.base.buffers))
        network = load_network(expert, self.head, self.dtype, self.device, head_of=expert if expert.head else None)
        return for_one_pass(network)

    def hollow(self) -> PreTrainedModel:
        """Return the network with its parameters on the meta device."""
        return hollow_network(self.expert.config, self.head, self.dtype, self.base)

    def layer(self, parameter: str) -> str | None:
        """Return the layer of a parameter; None where it is of a head of the expert's own, which is no layer.

        Raises:
            InputError: neither the base nor the head of the expert has it.
        """
        names = self.expert.base.names
        key = names.parameter(parameter)
        if key in {names.parameter(name) for name in self.expert.head}:
            return None
        if key not in self._tensors:
            raise InputError(f"{self.base}: no tensor is the parameter {parameter}, so it belongs to no layer")
        return layer_of(self._tensors[key][0])

    def tensors(self, parameter: str) -> Sequence[str]:
        """Return the tensors of the base's checkpoint that a parameter or buffer holds; none if no file has it."""
        return self._tensors.get(self.expert.base.names.parameter(parameter), ())

    def parts(self, parameter: str) -> Mapping[str, View] | None:
        """Return the tensors of the base's checkpoint that a parameter holds, as views of it.

        Returns:
            None where they are no parts of it: one tensor is split into several parameters, say.
        """
        names, tensors = self.expert.base.names, self.tensors(parameter)
        if self.is_one_tensor(parameter):
            shape = self.expert.base.info(tensors[0]).shape
            return {tensors[0]: View(shape, torch.empty(shape, device="meta").stride(), 0)}
        if any(len(names.all_parameters(one)) > 1 for one in tensors):
            return None
        by_key = {names.key(one): one for one in tensors}
        found = regions(self._skeleton, names, names.parameter(parameter))
        if found is None or found.keys() != by_key.keys():
            return None
        return {by_key[key]: view for key, view in found.items()}

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return skeleton(self.expert.base.config, None, self.base)

    def is_one_tensor(self, parameter: str) -> bool:
        """Return whether a parameter is a tensor of the checkpoint as it is."""
        several = self.tensors(parameter)
        return len(several) == 1 and not self.expert.base.names.is_converted(several[0])

    def load(self, module: nn.Module, prefix: str, names: Mapping[int, str] | None = None, copied: bool = True) -> None:
        """Give a module its weights in their dtype and on their device.

        Args:
            module: hollow; parameters that are tied get one tensor.
            prefix: its name in the network with a dot behind, empty for the network itself.
            names: by `id`, the names in the network of parameters that are tied to others outside the module.
            copied: whether all are copied; else those stay in the files, mapped into memory, that need not be: read
                when they are used, and no memory of this process.

        Raises:
            InputError: a parameter is left without a value of its shape.
        """
        weights: dict[str, Tensor] = {}
        read: dict[int, Tensor] = {}
        lacking = []
        state = module.state_dict(keep_vars=True)
        called = {name: (names or {}).get(id(hollow), prefix + name) for name, hollow in state.items()}
        self._bring(one for name in called.values() for one in self.tensors(name))
        for name, hollow in state.items():
            tensor = read.get(id(hollow))  # of a parameter that is tied to this one
            if tensor is None:
                tensor = self._read(called[name], copied)
                if tensor is None or tensor.shape != hollow.shape:
                    if isinstance(hollow, nn.Parameter):
                        lacking.append(prefix + name)
                    continue
                read[id(hollow)] = tensor
            weights[name] = tensor
        if lacking:
            raise InputError(f"{self.base}: no fitting weights for {', '.join(lacking[:5])} of {type(module).__name__}")
        module.load_state_dict(weights, strict=False, assign=True)
        for child in module.modules():
            for name, buffer in child._buffers.items():  # those that are in no checkpoint
                child._buffers[name] = None if buffer is None else buffer.to(self.device)

    def _bring(self, names: Iterable[str]) -> None:
        """Have what is read for some tensors of the base's checkpoint on this machine, and the expert's own head."""
        if self.models is not None and self.models.listings:
            head = [(self.expert.source, name) for name in self.expert.head.values()]
            self.models.bring(by_file([*head, *(one for name in names for one in self.expert.read_for(name))]))

    @cached_property
    def _tensors(self) -> Mapping[str, Sequence[str]]:
        """Key of a parameter or buffer → the tensors of the base's checkpoint that it holds."""
        base = self.expert.base
        found: dict[str, list[str]] = {}
        for name in (*base.weights, *base.buffers):
            for key in base.names.all_parameters(name):
                found.setdefault(key, []).append(name)
        return found

    @cached_property
    def _head(self) -> Mapping[str, Tensor]:
        return self.expert.head_tensors()

    def _read(self, name: str, copied: bool) -> Tensor | None:
        """Return the value of a parameter or buffer of the network; None where no file has it."""
        if name in self._head:
            return self._placed(self._head[name], copied)
        names = self.expert.base.names
        key = names.parameter(name)
        found = {one: self._placed(self._tensor(one), copied) for one in self._tensors.get(key, ())}
        if any(names.is_converted(one) for one in found):
            return names.convert(found, key)
        return next(iter(found.values()), None)

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the base's checkpoint as the expert has it."""
        return self.expert.read(name)

    def _placed(self, tensor: Tensor, copied: bool) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, copy=copied)
