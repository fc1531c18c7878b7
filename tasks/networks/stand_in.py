"""A small network of the same kind as a large one: fewer and narrower layers, random weights, the same code."""

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.checkpoints.layers import block_names
from sensmerge.tasks.networks.networks import trunk_or_self

LARGEST = 12_000_000
"""Parameters of a stand-in at most."""
VOCABULARY = 512
EXPERTS = 16
"""Of a mixture, at most: still several in each of DeepSeek's groups."""
_FACTORS = (1, 16, 8, 32, 4, 64, 2)
"""What widths are divided by, in the order of trial."""
_WIDTH = re.compile(r"size|dim|width|rank|inner|inter|d_model|d_ff|d_kv|n_embd|d_state|d_ssm|channels|expand_v")
_NO_WIDTH = re.compile(r"vocab|position|window|chunk|patch|image|kernel|num_|block_size|batch|max_|beam|n_groups|token")
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers)$")
_EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$")


def pattern(name: str) -> str:
    """Return a parameter's name with its numbers left out: the same for the same place of all blocks."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def stand_ins(config: PretrainedConfig, whole: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, bool]]:
    """Yield networks of at most `LARGEST` parameters that have every kind of block that a whole network has.

    They are in evaluation mode, float32, with random weights (the same every time) of which all are large enough to
    matter. Settings are made small by what their names say, in several ways, and a network is taken only if the kinds
    of its parameters are those of the whole one.

    Args:
        config: of the whole network.
        whole: the whole network; it may lie on the meta device.

    Yields:
        A network, and whether it is the whole one but for a smaller vocabulary: then whatever it cannot do, the whole
        one cannot do either.
    """
    cls, kinds, layers = type(whole), _kinds(whole), _layers(whole)
    for factor in _FACTORS:
        for cut in (layers, None):
            small = copy.deepcopy(config)
            _shrink(small, cut, factor)
            # Any exception: settings that do not go together fail in as many ways as there are architectures.
            with suppress(Exception):
                with torch.device("meta"):
                    hollow = cls(copy.deepcopy(small))
                if _kinds(hollow) == kinds and sum(one.numel() for one in hollow.parameters()) <= LARGEST:
                    yield _filled(cls, small), factor == 1 and cut is None


def _filled(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: PreTrainedModel = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
        for parameter in network.parameters():
            parameter.requires_grad_(False).add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


def _kinds(network: nn.Module) -> set[tuple[str, int]]:
    """Return the patterns and the numbers of dimensions of a network's parameters."""
    return {(pattern(name), one.dim()) for name, one in network.named_parameters(remove_duplicate=False)}


def _layers(network: PreTrainedModel) -> int:
    """Return how many of the first blocks have all kinds of parameters that a network's blocks have; at least 2.

    Of an encoder-decoder at least 3: what the first block makes for all others is handed on by the second.
    """
    seen: set[str] = set()
    is_pair, trunk = network.config.is_encoder_decoder, trunk_or_self(network)
    needed = 3 if is_pair else 2
    for place, block in enumerate(block_names(name for name, _ in trunk.named_parameters()), 1):
        number = int(block.rpartition(".")[2]) + 1 if is_pair else place
        kinds = {pattern(name) for name, _ in trunk.get_submodule(block).named_parameters()}
        if not kinds <= seen:
            seen, needed = seen | kinds, max(needed, number)
    return needed


def _shrink(config: PretrainedConfig, layers: int | None, factor: int) -> None:
    settings = dict(vars(config))
    old = next((value for name, value in settings.items() if _LAYERS.search(name) and value), None)
    for name, value in settings.items():
        if isinstance(value, PretrainedConfig):
            _shrink(value, layers, factor)
            continue
        new = _smaller(name, value, layers, factor, old)
        if new is not value:
            with suppress(Exception):  # a setting that cannot be set stays
                setattr(config, name, new)
    stages = getattr(config, "stage_names", None)
    if isinstance(stages, list) and layers and old and len(stages) == old + 1 > layers + 1:
        # One for each block and one before them: what a backbone gives has to be of those that are left.
        config.stage_names = stages[: layers + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=[layers])


def _smaller(name: str, value: Any, layers: int | None, factor: int, old: int | None) -> Any:
    if isinstance(value, list | tuple) and layers and old and len(value) == old > layers:
        return value[:layers]
    if isinstance(value, list | tuple) and "token" in name:
        return type(value)(_smaller(name, one, layers, factor, old) for one in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name.startswith("_"):
        return value
    if _LAYERS.search(name):
        return min(value, layers or value)
    if _EXPERTS.search(name):
        return min(value, EXPERTS)
    if "vocab" in name or "token" in name:
        return min(value, VOCABULARY if "vocab" in name else VOCABULARY - 1)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 2 * factor and value % factor == 0:
        return value // factor
    return value
