"""What a config may say at most, before a network is built from it: no model has more, and more takes all memory."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from sensmerge.tasks.errors import InputError, shown

_AT_LEAST_ONE = {
    "vocab_size": 2**27,
    "hidden_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
}
_ANY = {
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "intermediate_size": 2**22,
    "type_vocab_size": 2**20,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "n_routed_experts": 2**14,
}
ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError, ImportError)
"""What transformers raises where settings make no sense together, or call for packages that are not there."""


def check_bounds(config: PretrainedConfig, path: Path) -> None:
    """Check the sizes that a config states, of its text model too.

    Raises:
        InputError: one that is no whole number, too small or beyond all use; it names the key.
    """
    for part in (config, config.get_text_config()):
        for keys, least in ((_AT_LEAST_ONE, 1), (_ANY, 0)):
            for key, most in keys.items():
                for value in _values(setting(part, key)):
                    if type(value) is not int or not least <= value <= most:
                        raise InputError(
                            f"{path}: {key} is {shown(value)}; expected a whole number from {least} to {most:,}"
                        )


def setting(config: PretrainedConfig, key: str) -> Any:
    """Return a setting of a config, None if it has none, and a list with that of each block where they differ."""
    try:
        return getattr(config, key, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return [getattr(layer, key, None) for layer in config.per_layer_config]


def _values(found: Any) -> list[Any]:
    """Return a setting as a list: some models have one value for each block."""
    return [] if found is None else [one for one in found if one is not None] if isinstance(found, list) else [found]
