"""In which settings of the computation an expert's config differs from its base's."""

import importlib
import inspect
import json
import re
from collections.abc import Container, Mapping
from functools import cache
from typing import Any

from transformers import PretrainedConfig

from sensmerge.tasks.checkpoints.settings import NO_SETTING, SettingDifference, unequal
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import after_padding, describe

_OF_HEAD = re.compile(r"(classifier|summary|pooler|cls)_.*|use_mean_pooling")
"""Settings that only the head of a task reads."""

_PATTERNS = re.compile(r"use_sliding_window|max_window_layers|_?sliding_window_pattern")
"""What transformers turns into `layer_types` when it reads a config."""

_UNSCALED_ROPE = {"default", "linear", "llama3", "proportional"}
"""Kinds of rotary positions whose angles do not depend on how many positions there are at most."""


def check_sizes(config: PretrainedConfig, base: PretrainedConfig, where: str, but: Container[str] = ()) -> None:
    """Check that an expert's network is of the base's architecture and size.

    Args:
        config: the expert's.
        base: the base's.
        where: names the expert.
        but: settings that may differ.

    Raises:
        InputError: they are not; it names what the expert has and what the base has.
    """
    ours, theirs = describe(base), describe(config)
    wrapped = [one.get_text_config() is not one for one in (config, base)]
    # Where both are, neither can be the language model inside the other; where one is, the other may be another part.
    if all(wrapped) or ours["model_type"] != theirs["model_type"]:
        ours["model_type"], theirs["model_type"] = base.model_type, config.model_type
    for setting, expected in ours.items():
        if theirs[setting] == expected or setting in but:
            continue
        wanted = "a fine-tune of the base"
        if setting == "model_type" and type(config) in base.sub_configs.values():
            wanted += ", not of a part of it: give that part alone as the base"
            wanted += ", or give the tasks zero_shot" if base.model_type == "clip" else ""
        if setting == "model_type" and type(base) in config.sub_configs.values():
            wanted += ", and not what that is a part of: give that part of the expert alone"
        if setting == "vocab_size":
            wanted += f" with its vocabulary: save a copy of the expert after model.resize_token_embeddings({expected})"
        raise InputError(f"{where} has {setting} {theirs[setting]!r}, the base has {expected!r}; expected {wanted}")


def differences(expert: PretrainedConfig, base: PretrainedConfig, own_head: bool) -> list[SettingDifference]:
    """Return the settings of the computation in which an expert's config differs from its base's.

    Both are configs as transformers parsed them, so old and new spellings and unstated defaults are equal. Where one
    is the config of the language model inside the other, the language models' are compared.

    A limit of positions counts where the network reads it: fine-tunes often state a longer one for the same rotary
    angles. A table of positions of another length has another shape, which is seen without the config.

    Args:
        expert: the expert's config.
        base: the base's.
        own_head: whether the expert's head stays its own; then so do the head's settings.
    """
    if type(expert) is not type(base):
        expert, base = expert.get_text_config(), base.get_text_config()
    return _compare(expert, base, own_head)[0]


def with_settings_of(base: PretrainedConfig, expert: PretrainedConfig, own_head: bool) -> PretrainedConfig:
    """Return an expert's config with the base's value of every setting in `differences`; both are of one class."""
    return type(expert).from_dict(_compare(expert, base, own_head)[1])


def _compare(
    expert: PretrainedConfig, base: PretrainedConfig, own_head: bool
) -> tuple[list[SettingDifference], dict[str, Any]]:
    """Return the differences, and the expert's config as JSON has it with the base's values of them."""
    ours, theirs = (json.loads(config.to_json_string(use_diff=False)) for config in (base, expert))
    found, adopted = [], dict(theirs)
    for key in sorted(ours.keys() | theirs.keys()):
        shifts = key == "pad_token_id" and after_padding(base)
        if (NO_SETTING.fullmatch(key) and not shifts) or (own_head and _OF_HEAD.fullmatch(key)):
            continue
        inner = [getattr(config, key, None) for config in (expert, base)] if key in type(base).sub_configs else []
        if inner and all(isinstance(one, PretrainedConfig) for one in inner) and type(inner[0]) is type(inner[1]):
            inside, adopted[key] = _compare(inner[0], inner[1], own_head)
            found += [SettingDifference(f"{key}.{one.setting}", one.expert, one.base) for one in inside]
        elif _is_read(key, type(expert), theirs) or _is_read(key, type(base), ours):
            # An old spelling of `rope_type`, which stands beside it.
            unlike = unequal(key, theirs.get(key), ours.get(key), ignored=("type",))
            if unlike:
                adopted[key] = ours.get(key)
            found += unlike
    return found, adopted


def _is_read(key: str, kind: type[PretrainedConfig], settings: Mapping[str, Any]) -> bool:
    """Return whether the network reads a setting: tools leave remarks of their own in configs (`unsloth_version`)."""
    layers = settings.get("layer_types")
    if layers and (_PATTERNS.fullmatch(key) or (key == "sliding_window" and not any("slid" in one for one in layers))):
        return False
    if key in ("max_position_embeddings", "original_max_position_embeddings"):
        return not _rope_kinds(settings.get("rope_parameters")) <= _UNSCALED_ROPE
    return key in inspect.signature(kind).parameters or bool(
        re.search(rf'config\.{re.escape(key)}\b|"{re.escape(key)}"', _code(kind.__module__))
    )


def _rope_kinds(parameters: Any) -> set[str]:
    """Return the kinds of rotary positions, of which layers may have several; without any, a kind of its own."""
    if not parameters:
        return {"none"}
    several = [one for one in parameters.values() if isinstance(one, dict)]
    return {str(one.get("rope_type", "default")) for one in several or [parameters]}


@cache
def _code(module: str) -> str:
    """Return the source of the networks of a config's module: a few settings are read that no config declares."""
    try:
        return inspect.getsource(importlib.import_module(module.replace(".configuration_", ".modeling_")))
    except ModuleNotFoundError:  # its networks are another architecture's, whose own config declares what they read
        return ""
