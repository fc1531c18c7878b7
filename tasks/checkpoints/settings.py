"""In which settings two configs differ, as their JSON has them."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_SETTING = re.compile(
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
_OF_LIBRARIES = re.compile(r"_diffusers_version|pretrained_cfg|label_(names|descriptions)")
"""Keys of diffusers and timm that say where a model comes from, and what it was trained on."""


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


def listed(unlike: Sequence[SettingDifference]) -> str:
    """Return differences in a line, the first ten of them in full."""
    shown = [str(one) for one in unlike[:10]]
    return ", ".join(shown) + (f" and {len(unlike) - 10} more" if unlike[10:] else "")


def unequal(path: str, expert: Any, base: Any, ignored: Collection[str] = ()) -> list[SettingDifference]:
    """Return where two values differ, down to the entries of mappings and of lists of one length.

    Args:
        path: of the values.
        expert: the expert's.
        base: the base's.
        ignored: keys that count in no mapping.
    """
    if isinstance(expert, dict) and isinstance(base, dict):
        keys = sorted((expert.keys() | base.keys()) - set(ignored))
        return [one for key in keys for one in unequal(f"{path}.{key}", expert.get(key), base.get(key), ignored)]
    if isinstance(expert, list) and isinstance(base, list) and len(expert) == len(base):
        pairs = enumerate(zip(expert, base, strict=True))
        return [one for place, (ours, theirs) in pairs for one in unequal(f"{path}.{place}", ours, theirs, ignored)]
    return [] if expert == base else [SettingDifference(path, expert, base)]


def stated_differences(expert: Mapping[str, Any], base: Mapping[str, Any]) -> list[SettingDifference]:
    """Return the settings in which an expert's config differs from its base's, of an architecture that is not known.

    All keys count but those that say nothing of the computation: what defaults are is not known, nor what is read.
    """
    keys = [key for key in sorted(expert.keys() | base.keys()) if not _is_remark(key)]
    return [one for key in keys for one in unequal(key, expert.get(key), base.get(key))]


def _is_remark(key: str) -> bool:
    return NO_SETTING.fullmatch(key) is not None or _OF_LIBRARIES.fullmatch(key) is not None


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
