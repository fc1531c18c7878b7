"""Which part of a stacked parameter each tensor of a checkpoint is, as transformers stacks them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sensmerge.tasks.checkpoints.weights import View
from sensmerge.tasks.networks.names import Names


def regions(network: PreTrainedModel, names: Names, parameter: str) -> dict[str, View] | None:
    """Return the tensors that a parameter is stacked from, by their keys, as views of the parameter.

    transformers' own conversion for saving takes a stand-in without memory apart; strides and offsets of what comes
    out of it say which elements went where.

    Args:
        network: on the meta device.
        names: of the network.
        parameter: key of the parameter.

    Returns:
        None where the parts are no views: transformers computes them in another way than by cutting and transposing.
    """
    full = names.spelled(parameter)
    shape = network.get_parameter(full).shape
    whole = torch.empty(shape, device="meta").as_subclass(_Uncopied)
    found = revert_weight_conversion(network, {full: whole})
    views = {}
    for name, part in found.items():
        if part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return None
        views[names.key(name)] = View(tuple(part.shape), part.stride(), int(part.storage_offset()))
    return views


class _Uncopied(Tensor):
    """A tensor whose parts stay views of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
