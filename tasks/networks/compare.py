"""In which settings of the computation an expert's config differs from its base's."""

import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PretrainedConfig

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import after_padding, describe

_NO_SETTING = re.compile(
    # where a config comes from, and the format of the weights
    r"architectures|transformers_version|_?name_or_path|auto_map|dtype|torch_dtype|tokenizer_class|finetuning_task"
    # classes, tokens and limits of generation, which have rules of their own
    r"|id2label|label2id|num_labels|problem_type|.*_token_(id|ids|index)|max_length"
    # parameters: their shapes and which are one are compared tensor by tensor
    r"|tie_\w+|head_dim|pruned_heads"
    # what is given back or kept, and how the same numbers are worked out
    r"|use_cache|return_dict|use_return_dict|torchscript|output_(attentions|hidden_states|router_logits|past)"
    r"|out_(features|indices)|stage_names"
    r"|_?attn_implementation\w*|_?experts_implementation\w*|attn_impl|gradient_checkpointing|pretraining_tp"
    r"|slow_but_exact|chunk_size_(feed_forward|lm_head)|use_mamba_kernels|use_mambapy|use_associative_scan"
    # training: starting values, dropout (a token dropout scales hidden states in evaluation too), losses, masks
    r"|(.*_)?(init|initializer)(_.*)?|(?!(.*_)?token_dropout).*(dropout|pdrop|layerdrop|droppath|drop_(rate|prob|path)).*"
    r"|.*(^|_)loss(_.*)?|.*_coef|eos_coefficient|label_smoothing\w*|gradient_clipping|freeze_.*"
    r"|apply_spec_augment|mask_(time|feature)_.*"
)
"""Keys that say nothing of what a network computes from its weights. All others count, known to us or not."""

_OF_HEAD = re.compile(r"(classifier|summary|pooler|cls)_.*|use_mean_pooling")
"""Settings that only the head of a task reads."""

_PATTERNS = re.compile(r"use_sliding_window|max_window_layers|_?sliding_window_pattern")
"""What transformers turns into `layer_types` when it reads a config."""

_UNSCALED_ROPE = {"default", "linear", "llama3", "proportional"}
"""Kinds of rotary positions whose angles do not depend on how many positions there are at most."""


@dataclass(frozen=True)
class SettingDifference:
    """A setting of the computation that two configs do not share."""

    setting: str
    """its path, e.g. `rope_parameters.rope_theta`"""
    expert: Any
    base: Any
    """None where a config does not state it"""

    def __str__(self) -> str:
        """Name the setting with both values."""
        return f"{self.setting} {_short(self.expert)} (the base has {_short(self.base)})"


def check_sizes(config: PretrainedConfig, base: PretrainedConfig, where: str) -> None:
    """Check that an expert's network is of the base's architecture and size.

    Raises:
        InputError: they are not; it names what the expert has and what the base has.
    """
    ours, theirs = describe(base), describe(config)
    wrapped = [one.get_text_config() is not one for one in (config, base)]
    if all(wrapped):  # neither can be the language model inside the other
        ours["model_type"], theirs["model_type"] = base.model_type, config.model_type
    for setting, expected in ours.items():
        if theirs[setting] == expected:
            continue
        wanted = "a fine-tune of the base"
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


def listed(unlike: Sequence[SettingDifference]) -> str:
    """Return differences in a line, the first ten of them in full."""
    shown = [str(one) for one in unlike[:10]]
    return ", ".join(shown) + (f" and {len(unlike) - 10} more" if unlike[10:] else "")


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
        if (_NO_SETTING.fullmatch(key) and not shifts) or (own_head and _OF_HEAD.fullmatch(key)):
            continue
        inner = [getattr(config, key, None) for config in (expert, base)] if key in type(base).sub_configs else []
        if inner and all(isinstance(one, PretrainedConfig) for one in inner) and type(inner[0]) is type(inner[1]):
            inside, adopted[key] = _compare(inner[0], inner[1], own_head)
            found += [SettingDifference(f"{key}.{one.setting}", one.expert, one.base) for one in inside]
        elif _is_read(key, type(expert), theirs) or _is_read(key, type(base), ours):
            unequal = _unequal(key, theirs.get(key), ours.get(key))
            if unequal:
                adopted[key] = ours.get(key)
            found += unequal
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


def _unequal(path: str, expert: Any, base: Any) -> list[SettingDifference]:
    """Return where two values differ, down to the entries of mappings and of lists of one length."""
    if isinstance(expert, dict) and isinstance(base, dict):
        keys = sorted((expert.keys() | base.keys()) - {"type"})  # an old spelling beside `rope_type`
        return [one for key in keys for one in _unequal(f"{path}.{key}", expert.get(key), base.get(key))]
    if isinstance(expert, list) and isinstance(base, list) and len(expert) == len(base):
        pairs = enumerate(zip(expert, base, strict=True))
        return [one for place, pair in pairs for one in _unequal(f"{path}.{place}", *pair)]
    return [] if expert == base else [SettingDifference(path, expert, base)]


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
