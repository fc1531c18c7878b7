"""A base and its experts by one set of tensor names: full fine-tunes and LoRA adapters alike."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tasks.errors import InputError
from tasks.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, parse_adapter, read_adapter_config
from tasks.models.checkpoint import Checkpoint, open_checkpoint, read_header
from tasks.models.layers import in_block
from tasks.models.names import Names, names_of, parameter_names
from tasks.models.networks import Head, describe, fill_network, load_config, network_class, skeleton
from tasks.models.weights import BaseWeights, ExpertWeights


@dataclass(frozen=True)
class Base(BaseWeights):
    """The model that all experts were fine-tuned from; merged models have the same form."""

    config: PretrainedConfig
    names: Names
    """of the network that the base was saved as"""

    def network_name(self, name: str) -> str:
        """Return the key of the parameter that a tensor, or another network's parameter of some name, is or is in."""
        return self.names.parameter(name)

    def only_weights(self) -> BaseWeights:
        """Return what merging needs to know, without open files."""
        return BaseWeights(replace(self.checkpoint), self.weights, self.buffers)


@dataclass(frozen=True)
class Expert(ExpertWeights):
    """One expert, by the base's tensor names."""

    base: Base
    config: PretrainedConfig

    @property
    def is_adapter(self) -> bool:
        """Whether the expert is a LoRA adapter and no whole checkpoint."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    def has_trunk_in_head(self) -> bool:
        """Return whether a part of a classifier's head lies in its trunk: a pooler that the base lacks, say."""
        prefix = network_class(self.config, "classification", self.folder).base_model_prefix
        return any(name.startswith(f"{prefix}.") for name in self.head)

    def only_weights(self, base: BaseWeights) -> ExpertWeights:
        """Return what merging needs to know, without open files; `base` is its base's `only_weights`."""
        return ExpertWeights(base, replace(self.source), self.own, self.low_rank, self.head)


def open_base(folder: Path, checkpoint: Checkpoint | None = None) -> Base:
    """Read the headers and config of a base, or of a merged model.

    Args:
        folder: the model's folder; its JSON files are read from here.
        checkpoint: the headers, where the weights are not in the folder yet.

    Raises:
        InputError: what `open_checkpoint` and `load_config` raise.
    """
    config = load_config(folder)
    checkpoint = checkpoint or open_checkpoint(folder)
    names = names_of(skeleton(config, None, folder))
    last = len(names.parameters)
    kept = sorted(
        names.by_key(checkpoint.tensors).values(),
        key=lambda name: (names.parameters.get(names.parameter(name), last), name),
    )
    merged = {name: checkpoint.tensors[name].is_floating_point and not names.is_unread(name) for name in kept}
    weights = tuple(name for name in kept if merged[name])
    return Base(checkpoint, weights, tuple(name for name in kept if not merged[name]), config, names)


def open_expert(folder: Path, base: Base, key: str, checkpoint: Checkpoint | None = None) -> Expert:
    """Read the headers of an expert (checkpoint or LoRA adapter) and match them with the base's.

    Args:
        folder: the expert's folder; its JSON files are read from here.
        base: the base of all experts.
        key: recipe key of the expert, for messages.
        checkpoint: the headers, where the weights are not in the folder yet.

    Raises:
        InputError: another architecture, size or vocabulary, missing or extra tensors, an adapter for another base.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        weights = folder / ADAPTER_WEIGHTS
        return _open_adapter(folder, base, key, checkpoint or Checkpoint(folder, read_header(weights)))
    return _open_full(folder, base, key, checkpoint or open_checkpoint(folder))


def _open_full(folder: Path, base: Base, key: str, source: Checkpoint) -> Expert:
    config = load_config(folder)
    ours, theirs = describe(base.config), describe(config)
    for setting, expected in ours.items():
        if theirs[setting] != expected:
            raise InputError(
                f"{key}: {folder} has {setting} {theirs[setting]!r}, the base has {expected!r}; "
                "expected a fine-tune of the base"
            )
    names = names_of(skeleton(config, None, folder))
    stored = {
        key: name
        for key, name in names.by_key(source.tensors).items()
        if source.tensors[name].is_floating_point and not names.is_unread(name)
    }
    own, heads = _place(f"{key}: {folder}", stored, source, base, names)
    for tensor_key, name in base.names.by_key(base.weights).items():
        # What this expert's network does not have (a pooler, a language-model head) stays the base's.
        if tensor_key not in stored and (names.parameter(name) in names.parameters or in_block(name)):
            raise InputError(f"{key}: {folder} lacks tensor {name}, which the base has; expected a whole fine-tune")
    return Expert(base, source, own, {}, {name: name for name in heads}, config)


def _open_adapter(folder: Path, base: Base, key: str, source: Checkpoint) -> Expert:
    try:
        adapter_config = read_adapter_config(folder)
        # A network ends in what peft's model class for the task type puts there.
        ending = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}.get(adapter_config["task_type"])
        network = skeleton(base.config, ending, base.folder)
        names = names_of(network)
        adapter = parse_adapter(source, adapter_config, network, names)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    weights = base.names.by_key(base.weights)
    for parameter in adapter.low_rank:
        if parameter not in weights:
            raise InputError(
                f"{key}: {folder} adapts {parameter}, which the base lacks; the adapter was made for another base"
            )
    low_rank = {weights[parameter]: factors for parameter, factors in adapter.low_rank.items()}
    stored = {names.key(parameter): name for parameter, name in adapter.saved.items()}
    own, heads = _place(f"{key}: {folder}", stored, source, base, names)
    head = {parameter: name for parameter, name in adapter.saved.items() if name in heads}
    config = base.config
    if head:
        # An adapter has no config of its own: the last layer of its head says how many classes there are.
        last = parameter_names(skeleton(base.config, "classification", base.folder))[-1]
        if last in head:
            config = copy.deepcopy(base.config)
            config.num_labels = source.tensors[head[last]].shape[0]
    return Expert(base, source, own, low_rank, head, config)


def _place(
    where: str, stored: Mapping[str, str], source: Checkpoint, base: Base, names: Names
) -> tuple[dict[str, str], list[str]]:
    """Split tensors that an expert stores whole into those that the base has too and those of the expert's head.

    Args:
        where: recipe key and folder of the expert, for messages.
        stored: key → name in `source`.
        source: the expert's headers.
        base: the base.
        names: of the expert's network.

    Returns:
        Base's name → name in `source` of those that the base has; names in `source` of the head's.

    Raises:
        InputError: a tensor that is no head's is not in the base, or has another shape there.
    """
    weights = base.names.by_key(base.weights)
    own: dict[str, str] = {}
    heads: list[str] = []
    for key, name in stored.items():
        match = weights.get(key)
        shape = source.tensors[name].shape
        if match is not None and base.info(match).shape == shape:
            own[match] = name
        elif names.has_task_head and not in_block(key) and (match is None or key not in names.trunk):
            heads.append(name)
        else:
            other = "lacks it" if match is None else f"has {base.info(match).shape}"
            raise InputError(
                f"{where}: tensor {name} has shape {shape}, the base {other}; expected a fine-tune of the base"
            )
    return own, heads


def missing_parameters(base: Base, head: Head) -> list[str]:
    """Return the parameters of a base's network, ended in `head`, that its checkpoint has no weights for."""
    needed = names_of(skeleton(base.config, head, base.folder)).parameters
    found = {key for name in base.weights for key in base.names.all_parameters(name)}
    return [name for name in needed if name not in found]


class HeadOwner(Protocol):
    """What has a head of its own: an expert, or a head saved beside a merged trunk."""

    @property
    def config(self) -> PretrainedConfig:
        """Config of the network that ends in the head."""

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """Return the head's tensors by parameter name."""


def load_network(
    model: Base | Expert,
    head: Head,
    dtype: torch.dtype,
    device: str,
    head_of: HeadOwner | None = None,
) -> PreTrainedModel:
    """Return the network of a base, a merged model or an expert, ending in `head`.

    Args:
        model: whose trunk it is.
        head: `causal_lm` or `classification`.
        dtype: dtype of the weights in memory.
        device: torch device.
        head_of: whose head follows the trunk; None where the trunk's checkpoint has it all.

    Raises:
        InputError: parameters are left without weights.
    """
    base = model.base if isinstance(model, Expert) else model
    config = head_of.config if head_of else model.config
    tensors = {}
    for name in (*base.weights, *base.buffers):
        tensor = model.read(name)
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if head_of:
        tensors |= {name: tensor.to(dtype) for name, tensor in head_of.head_tensors().items()}
    return fill_network(config, head, tensors, dtype, device, base.folder)
