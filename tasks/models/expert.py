"""A base and its experts by one set of tensor names: full fine-tunes and LoRA adapters alike."""

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tasks.errors import InputError
from tasks.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, parse_adapter, read_adapter_config
from tasks.models.checkpoint import DTYPES, Checkpoint, TensorInfo, open_checkpoint, read_header
from tasks.models.layers import in_block
from tasks.models.networks import Head, describe, fill_network, load_config, parameter_names, skeleton, tied_names


@dataclass(frozen=True)
class Base:
    """The model that all experts were fine-tuned from; merged models have the same form."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    prefix: str
    """what heads put before the trunk's parameter names, e.g. `bert.`; it may be absent in the base's own names"""
    weights: tuple[str, ...]
    """tensors that are merged, in network order; tied names once"""
    buffers: tuple[str, ...]
    """other tensors of the checkpoint (integers), copied as they are"""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of one tensor."""
        return self.checkpoint.tensors[name]

    def network_name(self, name: str) -> str:
        """Return a tensor's name without the trunk's prefix: the same for the base, its experts and any network."""
        return _strip(name, self.prefix)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of one tensor."""
        return DTYPES[self.info(name).dtype]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype."""
        return self.checkpoint.read(name)


@dataclass(frozen=True)
class Expert:
    """One expert, by the base's tensor names."""

    base: Base
    folder: Path
    config: PretrainedConfig
    source: Checkpoint
    adapter: Adapter | None
    own: Mapping[str, str]
    """base's name → name in `source` of each tensor stored whole"""
    low_rank: Mapping[str, str]
    """base's name → parameter name of each adapted tensor"""
    head: Mapping[str, str]
    """parameter name → name in `source` of each tensor that the base lacks or has in another shape"""

    def touches(self, name: str) -> bool:
        """Return whether the expert stores anything for this tensor; if not, its task vector is zero."""
        return name in self.own or name in self.low_rank

    def delta(self, name: str) -> torch.Tensor:
        """Return the task vector of one tensor, expert − base, in float32."""
        if name in self.low_rank:
            assert self.adapter is not None
            return self.adapter.delta(self.low_rank[name])
        base = self.base.read(name).float()
        return self.source.read(self.own[name]).float() - base if name in self.own else torch.zeros_like(base)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the expert: as stored, or base + low-rank task vector in float32."""
        if name in self.own:
            return self.source.read(self.own[name])
        if name in self.low_rank:
            return self.base.read(name).float() + self.delta(name)
        return self.base.read(name)

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the expert's head by parameter name."""
        return {name: self.source.read(stored) for name, stored in self.head.items()}

    def bytes_to_read(self) -> int:
        """Return how many bytes of its own files a pass over the task vectors reads."""
        return sum(info.nbytes for info in self.source.tensors.values())


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
    network = skeleton(config, None, folder)
    prefix = _prefix(network)
    tied = {_match(name, checkpoint.tensors, prefix) for name in tied_names(network)}
    order = {_strip(name, prefix): position for position, name in enumerate(parameter_names(network))}
    kept = [name for name in checkpoint.tensors if name not in tied]
    kept.sort(key=lambda name: (order.get(_strip(name, prefix), len(order)), name))
    weights = tuple(name for name in kept if checkpoint.tensors[name].is_floating_point)
    return Base(checkpoint, config, prefix, weights, tuple(name for name in kept if name not in weights))


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
    network = skeleton(config, None, folder)
    parameters = {_strip(name, base.prefix) for name in parameter_names(network)}
    tied = tied_names(network)
    own, head = {}, {}
    stored = {_strip(name, base.prefix): name for name in source.tensors if name not in tied}
    for name in base.weights:
        match = stored.pop(_strip(name, base.prefix), None)
        if match is None:
            # A head that this expert's architecture does not have (a pooler, a language-model head) stays the base's.
            if _strip(name, base.prefix) in parameters or in_block(name):
                raise InputError(f"{key}: {folder} lacks tensor {name}, which the base has; expected a whole fine-tune")
        elif source.tensors[match].shape == base.info(name).shape:
            own[name] = match
        elif in_block(name) or _strip(name, base.prefix) in _trunk(network, base.prefix):
            raise InputError(
                f"{key}: tensor {match} of {folder} has shape {source.tensors[match].shape}, "
                f"the base has {base.info(name).shape}; expected a fine-tune of the base"
            )
        else:
            head[match] = match
    for match in stored.values():
        if not source.tensors[match].is_floating_point:
            continue
        if in_block(_strip(match, base.prefix)) or _is_causal(network):
            raise InputError(
                f"{key}: {folder} has an extra tensor {match}, which the base lacks; expected its fine-tune"
            )
        head[match] = match
    return Expert(base, folder, config, source, None, own, {}, head)


def _open_adapter(folder: Path, base: Base, key: str, source: Checkpoint) -> Expert:
    adapter_config = read_adapter_config(folder)
    head_kind = "classification" if adapter_config.get("task_type") == "SEQ_CLS" else None
    try:
        adapter = parse_adapter(source, adapter_config, skeleton(base.config, head_kind, base.folder))
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    names = {_strip(name, base.prefix): name for name in base.weights}
    low_rank, own, head = {}, {}, {}
    for parameter in adapter.low_rank:
        if _strip(parameter, base.prefix) not in names:
            raise InputError(
                f"{key}: {folder} adapts {parameter}, which the base lacks; the adapter is for another base"
            )
        low_rank[names[_strip(parameter, base.prefix)]] = parameter
    for parameter, name in adapter.saved.items():
        match = names.get(_strip(parameter, base.prefix))
        if match is not None and source.tensors[name].shape == base.info(match).shape:
            own[match] = name
        else:
            head[parameter] = name
    config = base.config
    if head:
        # An adapter has no config of its own: the last tensor of its head says how many classes there are.
        config = copy.deepcopy(base.config)
        config.num_labels = source.tensors[list(head.values())[-1]].shape[0]
    return Expert(base, folder, config, source, adapter, own, low_rank, head)


def load_network(
    model: Base | Expert,
    head: Head,
    dtype: torch.dtype,
    device: str,
    head_of: Expert | None = None,
) -> PreTrainedModel:
    """Return the network of a base, a merged model or an expert, ending in `head`.

    Args:
        model: whose trunk it is.
        head: `causal_lm` or `classification`.
        dtype: dtype of the weights in memory.
        device: torch device.
        head_of: the expert whose head follows the trunk; None where the trunk's checkpoint has it all.

    Raises:
        InputError: parameters are left without weights.
    """
    base = model.base if isinstance(model, Expert) else model
    config = head_of.config if head_of else model.config
    network = skeleton(config, head, base.folder)
    known = set(network.state_dict())
    tensors = {}
    for name in (*base.weights, *base.buffers):
        full = _match(name, known, base.prefix)
        if full in known:
            tensor = model.read(name)
            tensors[full] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if head_of:
        tensors |= {name: tensor.to(dtype) for name, tensor in head_of.head_tensors().items()}
    return fill_network(config, head, tensors, dtype, device, base.folder)


def _prefix(network: PreTrainedModel) -> str:
    return f"{network.base_model_prefix}." if network.base_model_prefix else ""


def _strip(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) if prefix else name


def _match(name: str, known: Container[str], prefix: str) -> str:
    """Return the form of a name, with or without the prefix, that is in `known`; the name itself if neither is."""
    candidates = (name, prefix + name, _strip(name, prefix))
    return next((candidate for candidate in candidates if candidate in known), name)


def _trunk(network: PreTrainedModel, prefix: str) -> set[str]:
    """Return the stripped parameter names of the part of a network below its head."""
    names = parameter_names(network)
    inside = [name for name in names if name.startswith(prefix)]
    return {_strip(name, prefix) for name in (inside or names)}


def _is_causal(network: PreTrainedModel) -> bool:
    return type(network).__name__.endswith(("ForCausalLM", "LMHeadModel"))
