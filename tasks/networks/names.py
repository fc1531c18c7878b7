"""One name for each tensor, though checkpoints of one architecture spell it in several ways."""

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sensmerge.tasks.checkpoints.layers import in_block
from sensmerge.tasks.networks.networks import trunk_name

_ROTARY = re.compile(r"rotary_emb\.inv_freq")
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+|(?<=\.)_orig_mod\.")


@dataclass(frozen=True)
class Names:
    """The tensor names of one network.

    A tensor's *key* is its name as transformers spells it today, less the prefix that heads put before the trunk's
    names: the same for the base and all its experts, whatever transformers version or head they were saved with.
    """

    network: str
    """name of the network's class"""
    prefix: str
    """what heads put before the trunk's names, e.g. `bert.`"""
    has_prefix: bool
    """whether the network's own names have it: it is no bare trunk"""
    parameters: Mapping[str, int]
    """key of each parameter → its place in the order of modules; tied parameters once"""
    optional: frozenset[str]
    """keys of parameters that a checkpoint may lack: a pooler's, and what transformers computes"""
    statistics: frozenset[str]
    """keys of the floating-point buffers that checkpoints hold (running means, corrections of routers)"""
    trunk: frozenset[str]
    """keys of the parameters and statistics below the head"""
    tower: str
    """what a network of several towers puts before the keys of its language model, e.g. `language_model.`"""
    has_task_head: bool
    """whether what follows the trunk is made for one task (a classifier) and is no language model's"""
    tied: Mapping[str, str]
    """key that is only another name of a parameter → key of that parameter"""
    renamings: tuple[Any, ...]
    """of old names, by transformers"""
    converters: tuple[Any, ...]
    """of tensors that the network holds stacked (the experts of a mixture), by transformers"""
    unread: re.Pattern[str]
    """names of what older versions stored in blocks and transformers computes today"""

    def key(self, name: str) -> str:
        """Return the key of a tensor in a checkpoint."""
        name = plain(name)
        return self._unless_known(name, apply_renamings(name, self.renamings).removeprefix(self.prefix))

    def spelled(self, key: str) -> str:
        """Return the name of a parameter in the network by its key."""
        return self.prefix + key if self.has_prefix and key in self.trunk else key

    def parameter(self, name: str) -> str:
        """Return the key of the parameter that holds a checkpoint's tensor: several share a stacked one."""
        name = plain(name)
        renamed = rename_source_key(name, self.renamings, self.converters)[0].removeprefix(self.prefix)
        renamed = self._unless_known(name, renamed)
        return self.tied.get(renamed, renamed)

    def _unless_known(self, name: str, renamed: str) -> str:
        """Return the new name of a tensor, but its own if only that is a parameter's, as `from_pretrained` does.

        Some patterns match today's names as well as the old ones: `shared_expert.` in `shared_experts.`, for one.
        """
        key = name.removeprefix(self.prefix)
        return key if self._is_known(key) and not self._is_known(renamed) else renamed

    def _is_known(self, key: str) -> bool:
        return key in self.parameters or key in self.tied

    def all_parameters(self, name: str) -> tuple[str, ...]:
        """Return the keys of all parameters that a tensor of a checkpoint is in: a fused one is split into several."""
        first, pattern = self.parameter(name), rename_source_key(plain(name), self.renamings, self.converters)[1]
        if pattern is None or first not in self.parameters:
            return (first,)
        targets = next(one for one in self.converters if pattern in one.source_patterns).target_patterns
        return tuple(first.replace(targets[0], target, 1) for target in targets)

    def is_converted(self, name: str) -> bool:
        """Return whether the network holds a checkpoint's tensor in another form: stacked with others, for one."""
        return rename_source_key(plain(name), self.renamings, self.converters)[1] is not None

    def convert(self, tensors: Mapping[str, Tensor], key: str) -> Tensor:
        """Return the parameter that holds some tensors of a checkpoint in another form.

        Args:
            tensors: all tensors of that parameter, by name.
            key: of the parameter.
        """
        return self.conversion(tensors)[key]

    def conversion(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by key, the parameters that hold some tensors of a checkpoint in another form.

        Args:
            tensors: by name: all that are stacked in one parameter, or one that is split into several.
        """
        converters = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        collected: Any = None
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = rename_source_key(plain(name), self.renamings, self.converters)
            collected = collected or copy.deepcopy(converters[pattern])
            collected.add_tensor(renamed, name, pattern, tensors[name])
        found = {name.removeprefix(self.prefix): tensor for name, tensor in collected.convert(renamed).items()}
        return {self.tied.get(key, key): tensor for key, tensor in found.items()}

    def is_unread(self, name: str) -> bool:
        """Return whether transformers has no use for a tensor any more (causal masks, rotary frequencies)."""
        # Outside the blocks, what is passed over in silence may be a pooler, or a head that the base is meant to keep.
        computed = in_block(name) or bool(_ROTARY.search(name))
        return computed and self.parameter(name) not in self.parameters and bool(self.unread.search(name))


def plain(name: str) -> str:
    """Return a tensor's name without what torch.compile (`_orig_mod.`) and data parallelism (`module.`) put there."""
    return _WRAPPERS.sub("", name)


def names_of(network: PreTrainedModel) -> Names:
    """Return the names of a network, which may lie on the meta device."""
    name = trunk_name(network)
    prefix = f"{name}." if name else ""
    transforms = get_model_conversion_mapping(network)
    # Some networks have the head before the trunk, and there the name that is tied to the trunk's comes first.
    full = [network.all_tied_weights_keys.get(name, name) for name in parameter_names(network)]
    held = _statistics(network)
    inside = [name for name in full if prefix and name.startswith(prefix)]
    below = [name for name in (*full, *held) if name.startswith(prefix)] if inside else [*full, *held]
    return Names(
        network=type(network).__name__,
        prefix=prefix,
        has_prefix=bool(inside),
        parameters={name.removeprefix(prefix): place for place, name in enumerate(full)},
        optional=frozenset(name.removeprefix(prefix) for name in _optional(network, full)),
        statistics=frozenset(name.removeprefix(prefix) for name in held),
        trunk=frozenset(name.removeprefix(prefix) for name in below),
        tower=_tower(network, prefix),
        has_task_head=not (
            type(network).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or network.can_generate()
        ),
        tied={
            alias.removeprefix(prefix): name.removeprefix(prefix)
            for alias, name in network.all_tied_weights_keys.items()
        },
        renamings=tuple(each for each in transforms if isinstance(each, WeightRenaming)),
        converters=tuple(each for each in transforms if isinstance(each, WeightConverter)),
        # What `from_pretrained` passes over in silence.
        unread=re.compile("|".join([*sorted(network._keys_to_ignore_on_load_unexpected or ()), _ROTARY.pattern])),
    )


def parameter_names(network: nn.Module) -> list[str]:
    """Return the names of a network's parameters in the order of its modules, each tied one once."""
    return [name for name, _ in network.named_parameters()]


def _optional(network: PreTrainedModel, full: list[str]) -> list[str]:
    computed = re.compile("|".join(sorted(network._keys_to_ignore_on_load_missing or ())) or r"(?!)")
    found = {name for name in full if computed.search(name)}
    if "add_pooling_layer" in inspect.signature(type(network).__init__).parameters:
        # Trunks are often saved without the pooler that only some heads read.
        with torch.device("meta"):
            lean = type(network)(network.config, add_pooling_layer=False)
        found |= set(full) - set(parameter_names(lean))
    return sorted(found)


def _statistics(network: PreTrainedModel) -> list[str]:
    persistent = network.state_dict(keep_vars=True)
    buffers = dict(network.named_buffers())
    return [name for name, buffer in buffers.items() if name in persistent and buffer.is_floating_point()]


def _tower(network: PreTrainedModel, prefix: str) -> str:
    if network.config.get_text_config() is network.config:
        return ""
    decoder = network.get_decoder()
    names = (name for name, module in network.named_modules() if module is decoder)
    name = next(names, "")
    return f"{name.removeprefix(prefix)}." if name and f"{name}." != prefix else ""
