"""PEFT LoRA adapters: which tensors their factors belong to, scaled exactly as peft scales them."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.errors import InputError
from tasks.models.checkpoint import Checkpoint, TensorInfo
from tasks.models.names import Names
from tasks.models.weights import LowRank

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Settings that change the applied weights in no way, or in the way this module implements.
_UNDERSTOOD = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "ensure_weight_tying"),
}
# Initialisations that leave the base's weights alone; the others (pissa, olora, …) need the base changed as well.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by the parameter names of the network it was trained on."""

    low_rank: Mapping[str, LowRank]
    """key (`Names.key`) of each adapted parameter → its task vector"""
    saved: Mapping[str, str]
    """name of each parameter stored whole (modules_to_save) → its name in the adapter"""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration with peft's defaults, checked to hold nothing that is not applied.

    Raises:
        InputError: another adapter type than LoRA, or a setting that cannot be handled, by name.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); get the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{path}: peft_type is {found!r}; only LORA adapters can be merged")
    defaults: dict[str, Any] = LoraConfig().to_dict()
    for key, value in config.items():
        if key in _UNDERSTOOD or value == defaults.get(key) or not value:
            continue
        raise InputError(
            f"{path}: {key} = {value!r} cannot be handled; merge the adapter into its base with peft first"
        )
    config = defaults | config
    if config["init_lora_weights"] not in _HARMLESS_INITS:
        raise InputError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r} changes the base's own weights; "
            "convert the adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )
    return config


def parse_adapter(checkpoint: Checkpoint, config: Mapping[str, Any], network: PreTrainedModel, names: Names) -> Adapter:
    """Match an adapter's tensors with the parameters of the network it was trained on.

    Args:
        checkpoint: the adapter's headers.
        config: as `read_adapter_config` returns it.
        network: the network on the meta device; module types and shapes are read from it.
        names: of the network.

    Raises:
        InputError: a tensor that belongs to no module of the network or does not fit it: another base's adapter; one
            that unties tied parameters.
    """
    path = checkpoint.folder / ADAPTER_WEIGHTS
    modules = {names.key(name): module for name, module in network.named_modules()}
    pairs: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in checkpoint.tensors:
        if not name.startswith(_PREFIX):
            raise InputError(f"{path}: tensor {name} does not start with {_PREFIX}; expected a PEFT adapter")
        stripped = name.removeprefix(_PREFIX)
        if stripped.endswith(".base_layer.weight"):
            continue  # peft's copy of the base's own embedding
        module, kind = _split_lora_name(stripped)
        if _is_tied(path, config, names, stripped if kind is None else f"{module}.weight"):
            continue
        if kind is not None:
            pairs.setdefault(module, {})[kind] = name
        elif _is_saved(stripped, config["modules_to_save"] or ()):
            saved[stripped] = name
        else:
            raise InputError(
                f"{path}: tensor {name} is neither a LoRA factor nor in modules_to_save; it cannot be handled"
            )
    low_rank = {}
    for module, pair in pairs.items():
        key = names.key(module)
        if key not in modules:
            raise InputError(
                f"{path}: adapts {module}, which the base does not have; the adapter was made for another base"
            )
        low_rank[f"{key}.weight"] = _low_rank(path, checkpoint.tensors, config, module, modules[key], pair)
    return Adapter(low_rank, saved)


def _is_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """Return whether a tensor is in one of the modules: peft compares the ends of module names."""
    parts = name.split(".")
    modules = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(module.endswith(saved) for module in modules for saved in modules_to_save)


def _is_tied(path: Path, config: Mapping[str, Any], names: Names, parameter: str) -> bool:
    """Return whether a parameter is only the second name of another, which the adapter changes in the same way.

    Raises:
        InputError: the adapter changes one of two tied parameters, or each in its own way.
    """
    key = names.key(parameter)
    if key in {*names.tied, *names.tied.values()} and not config["ensure_weight_tying"]:
        raise InputError(
            f"{path}: changes {parameter}, which the base ties to another parameter, without ensure_weight_tying; "
            "train without it, or with ensure_weight_tying"
        )
    return key in names.tied


def _split_lora_name(name: str) -> tuple[str, str | None]:
    """Split `a.b.lora_A.weight` into module `a.b` and factor `A`; the factor is None where the tensor is none."""
    for suffix, kind in (
        (".lora_A.weight", "A"),
        (".lora_B.weight", "B"),
        (".lora_embedding_A", "embedding_A"),
        (".lora_embedding_B", "embedding_B"),
    ):
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return name, None


def _low_rank(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    name: str,
    module: nn.Module,
    pair: Mapping[str, str],
) -> LowRank:
    embedding = isinstance(module, nn.Embedding)
    if not (embedding or isinstance(module, nn.Linear | Conv1D)):
        raise InputError(
            f"{path}: adapts {name}, a {type(module).__name__}; only linear layers and embeddings are handled"
        )
    try:
        first, second = (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
    except KeyError as missing:
        raise InputError(f"{path}: {name} has no factor {missing}; get the adapter again") from missing
    rank_pattern, alpha_pattern = config["rank_pattern"] or {}, config["alpha_pattern"] or {}
    rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), name), config["r"])
    alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), name), config["lora_alpha"])
    transpose = embedding or isinstance(module, Conv1D)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = reversed(weight.shape) if transpose else weight.shape
    found, expected = (tensors[first].shape, tensors[second].shape), ((rank, columns), (rows, rank))
    if found != expected:
        raise InputError(
            f"{path}: the factors of {name} have shapes {found[0]} and {found[1]}, expected {expected[0]} and "
            f"{expected[1]} for the base's weight and the rank of {ADAPTER_CONFIG}; it was made for another base"
        )
    # peft: LoraLayer.update_layer
    scaling = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
    return LowRank(first, second, scaling, transpose)
