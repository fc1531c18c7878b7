"""One name for each tensor, though checkpoints of one architecture spell it in several ways."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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

from tasks.models.layers import in_block


@dataclass(frozen=True)
class Names:
    """The tensor names of one network.

    A tensor's *key* is its name as transformers spells it today, less the prefix that heads put before the trunk's
    names: the same for the base and all its experts, whatever transformers version or head they were saved with.
    """

    prefix: str
    """what heads put before the trunk's names, e.g. `bert.`"""
    parameters: Mapping[str, int]
    """key of each parameter → its place in the order of modules; tied parameters once"""
    trunk: frozenset[str]
    """keys of the parameters below the head"""
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
        return self._unless_known(name, apply_renamings(name, self.renamings).removeprefix(self.prefix))

    def parameter(self, name: str) -> str:
        """Return the key of the parameter that holds a checkpoint's tensor: several share a stacked one."""
        renamed = rename_source_key(name, self.renamings, self.converters)[0].removeprefix(self.prefix)
        renamed = self._unless_known(name, renamed)
        return self.tied.get(renamed, renamed)

    def _unless_known(self, name: str, renamed: str) -> str:
        """Return the new name of a tensor, but its own if only that is a parameter's, as `from_pretrained` does.

        Some patterns match today's names as well as the old ones: `shared_expert.` in `shared_experts.`, for one.
        """
        key = name.removeprefix(self.prefix)
        known = self.parameters.keys() | self.tied.keys()
        return key if key in known and renamed not in known else renamed

    def all_parameters(self, name: str) -> tuple[str, ...]:
        """Return the keys of all parameters that a tensor of a checkpoint is in: a fused one is split into several."""
        first, pattern = self.parameter(name), rename_source_key(name, self.renamings, self.converters)[1]
        if pattern is None or first not in self.parameters:
            return (first,)
        targets = next(one for one in self.converters if pattern in one.source_patterns).target_patterns
        return tuple(first.replace(targets[0], target, 1) for target in targets)

    def is_converted(self, name: str) -> bool:
        """Return whether the network holds a checkpoint's tensor in another form: stacked with others, for one."""
        return rename_source_key(name, self.renamings, self.converters)[1] is not None

    def convert(self, tensors: Mapping[str, Tensor], key: str) -> Tensor:
        """Return the parameter that holds some tensors of a checkpoint in another form.

        Args:
            tensors: all tensors of that parameter, by name.
            key: of the parameter.
        """
        converters = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        collected: Any = None
        for name in sorted(tensors, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, self.renamings, self.converters)
            collected = collected or copy.deepcopy(converters[pattern])
            collected.add_tensor(renamed, name, pattern, tensors[name])
        converted: Mapping[str, Tensor] = collected.convert(renamed)
        return next(tensor for name, tensor in converted.items() if name.removeprefix(self.prefix) == key)

    def by_key(self, names: Iterable[str]) -> dict[str, str]:
        """Return the tensors of a checkpoint by key, of tied ones only the first that it holds."""
        found = {self.key(name): name for name in names}
        for alias, original in self.tied.items():
            if alias in found:
                found.setdefault(original, found.pop(alias))
        return found

    def is_unread(self, name: str) -> bool:
        """Return whether transformers has no use for a tensor any more (causal masks, rotary frequencies)."""
        return in_block(name) and self.parameter(name) not in self.parameters and bool(self.unread.search(name))


def names_of(network: PreTrainedModel) -> Names:
    """Return the names of a network, which may lie on the meta device."""
    prefix = f"{network.base_model_prefix}." if network.base_model_prefix else ""
    transforms = get_model_conversion_mapping(network)
    # Some networks have the head before the trunk, and there the name that is tied to the trunk's comes first.
    full = [network.all_tied_weights_keys.get(name, name) for name in parameter_names(network)]
    inside = [name for name in full if name.startswith(prefix)]
    return Names(
        prefix=prefix,
        parameters={name.removeprefix(prefix): place for place, name in enumerate(full)},
        trunk=frozenset(name.removeprefix(prefix) for name in inside or full),
        has_task_head=type(network).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        tied={
            alias.removeprefix(prefix): name.removeprefix(prefix)
            for alias, name in network.all_tied_weights_keys.items()
        },
        renamings=tuple(each for each in transforms if isinstance(each, WeightRenaming)),
        converters=tuple(each for each in transforms if isinstance(each, WeightConverter)),
        # What `from_pretrained` passes over in silence.
        unread=re.compile(
            "|".join([*sorted(network._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"])
        ),
    )


def parameter_names(network: nn.Module) -> list[str]:
    """Return the names of a network's parameters in the order of its modules, each tied one once."""
    return [name for name, _ in network.named_parameters()]
