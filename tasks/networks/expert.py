"""A base and its experts by one set of tensor names: full fine-tunes and LoRA adapters alike."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.checkpoints.checkpoint import INDEX, WEIGHTS, Checkpoint, open_checkpoint, viewed
from sensmerge.tasks.checkpoints.header import read_header
from sensmerge.tasks.checkpoints.settings import listed
from sensmerge.tasks.checkpoints.weights import ExpertWeights
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS, parse_adapter
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG, read_adapter_config
from sensmerge.tasks.networks.base import Base, examine, untied_note
from sensmerge.tasks.networks.classes import class_names, class_order, in_order, parameters_of_classes, with_classes_of
from sensmerge.tasks.networks.compare import check_sizes, differences, with_settings_of
from sensmerge.tasks.networks.inventory import check_complete
from sensmerge.tasks.networks.names import Names, names_of, parameter_names
from sensmerge.tasks.networks.networks import (
    Head,
    fill_network,
    has_network,
    load_config,
    network_class,
    own_ending,
    skeleton,
)
from sensmerge.tasks.networks.placing import Placed, Stored, check_whole, in_tower, place


@dataclass(frozen=True)
class Expert(ExpertWeights):
    """One expert, by the base's tensor names."""

    base: Base
    config: PretrainedConfig = field(kw_only=True)
    network: str = field(kw_only=True)
    """name of the class of its network"""
    base_config: bool = field(kw_only=True, default=False)
    """whether it runs with the base's settings where its own config differs"""
    own_classes: Mapping[int, str] = field(kw_only=True, default_factory=dict)
    """names of its classes by its own numbers, where its head's rows are read in the base's order"""
    notes: tuple[str, ...] = field(kw_only=True, default=())
    """what a user should know of it: a line each"""

    @property
    def is_adapter(self) -> bool:
        """Whether the expert is a LoRA adapter and no whole checkpoint."""
        return any(info.file == ADAPTER_WEIGHTS for info in self.source.tensors.values())

    def has_trunk_in_head(self) -> bool:
        """Return whether a part of a classifier's head lies in its trunk: a pooler that the base lacks, say."""
        prefix = network_class(self.config, own_ending([self.network]), self.folder).base_model_prefix
        return any(name.startswith(f"{prefix}.") for name in self.head)

    def on(self, base: Base) -> "Expert":
        """Return the expert on its base untied (`Base.untie`): of tied parameters, both names are changed alike."""
        if self.base.untied or not base.untied:
            return self
        aliases = {name: base.stored[name] for name in base.weights if base.stored.get(name) in base.weights}

        def both(values: Mapping[str, Any]) -> dict[str, Any]:
            return {**values, **{alias: values[name] for alias, name in aliases.items() if name in values}}

        return replace(self, base=base, own=both(self.own), low_rank=both(self.low_rank), pieces=both(self.pieces))


def open_expert(
    folder: Path, base: Base, key: str, checkpoint: Checkpoint | None = None, base_config: bool = False
) -> Expert:
    """Read the headers of an expert (checkpoint or LoRA adapter) and match them with the base's.

    An expert that changed only one of two parameters which the base ties, or each in its own way, has the base untied.

    Args:
        folder: the expert's folder; its JSON files are read from here.
        base: the base of all experts.
        key: recipe key of the expert, for messages.
        checkpoint: the headers, where the weights are not in the folder yet.
        base_config: whether it is to run with the base's settings where its own config differs.

    Raises:
        InputError: another architecture, size or vocabulary, missing or extra tensors, an adapter for another base;
            other settings of the computation, without `base_config`.
        FilesNeeded: tensors must be compared whose files are not here yet.
    """
    if is_adapter(folder, checkpoint, key):
        weights = folder / ADAPTER_WEIGHTS
        return _open_adapter(folder, base, key, checkpoint or viewed(Checkpoint(folder, read_header(weights))))
    return _open_full(folder, base, key, checkpoint or open_checkpoint(folder), base_config)


def is_adapter(folder: Path, checkpoint: Checkpoint | None, key: str) -> bool:
    """Return whether an expert is an adapter; an adapter's config without its weights, beside whole ones, is left over.

    Raises:
        InputError: there are both an adapter and a whole checkpoint.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if checkpoint is not None:
        return any(info.file == ADAPTER_WEIGHTS for info in checkpoint.tensors.values())
    whole = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    if whole and (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{key}: {folder} holds an adapter and a whole checkpoint; remove {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG} "
            f"to merge the checkpoint, or the other weights to merge the adapter"
        )
    return not whole


def _open_full(folder: Path, base: Base, key: str, source: Checkpoint, base_config: bool) -> Expert:
    where = f"{key}: {folder}"
    config = load_config(folder)
    check_sizes(config, base.config, where)
    network, names, inventory, config = examine(config, source, folder, where)
    check_complete(inventory, source, network, names, where)
    notes = [f"{key}: {note}" for note in source.notes]
    if (folder / ADAPTER_CONFIG).is_file():
        notes.append(f"{where} holds a whole checkpoint; its {ADAPTER_CONFIG} is ignored")
    stored, base, said = _changed_tensors(key, folder, source, inventory.stored, names, base)
    notes += said
    order = _class_order(network, config, base)
    kin = not names.has_task_head or (names.network == base.names.network and order is not None)
    placed = place(Stored(where, source, stored), base, names, network, kin)
    own_classes: dict[int, str] = {}
    if order is None:
        notes.append(f"{where} has other classes than the base: its head is kept apart, beside the merged model")
    elif order and class_names(base.config) and not class_names(config):
        notes.append(f"{where} does not name its classes: they are taken to be the base's, in the base's order")
    elif order != sorted(order):
        _reorder(placed, order, network, names, base)
        own_classes, config = dict(config.id2label), with_classes_of(base.config, config)
        notes.append(
            f"{where} has the base's classes in another order: the rows of its head are put in the base's order"
        )
    check_whole(where, stored, placed, names, base)
    head = {name: name for name in placed.heads}
    unlike = differences(config, base.config, bool(head))
    if unlike and not base_config:
        raise InputError(
            f"{where} has other settings than the base: {listed(unlike)}; expected those of the base: set "
            f"{key}.config: base to run the expert with them"
        )
    if names.tower != base.names.tower or type(config) is not type(base.config):
        config = base.config
    elif unlike:
        config = with_settings_of(base.config, config, bool(head))
    if unlike:
        notes.append(f"{where} runs with the base's settings, not with its own {listed(unlike)}")
    return Expert(
        base,
        source,
        placed.own,
        {},
        head,
        placed.pieces,
        config=config,
        network=names.network,
        base_config=bool(unlike),
        own_classes=own_classes,
        notes=tuple(notes),
    )


def _changed_tensors(
    key: str, folder: Path, source: Checkpoint, inventory: Mapping[str, str], names: Names, base: Base
) -> tuple[dict[str, str], Base, list[str]]:
    """Return the tensors that an expert may have changed, by the base's keys, the base as it needs it, and notes."""
    notes = []
    stored = dict(inventory)
    # Parameters that this expert ties and the base does not are changed alike.
    known = base.by_key()
    stored |= {alias: stored[one] for alias, one in names.tied.items() if one in stored and alias in known}
    for alias, original in base.names.tied.items():
        if alias in stored and original in stored and source.holds_equal(stored[alias], stored[original]):
            del stored[alias]
    if base.names.tied.keys() & stored.keys():
        base = base.untie()
        notes.append(untied_note(key, base, "has its own values for both"))
    stored = {
        name_key: name
        for name_key, name in stored.items()
        if source.tensors[name].is_floating_point and not names.is_unread(name)
    }
    stored, left = in_tower(stored, names, base)
    if left:
        towers = sorted({one.partition(".")[0] for one in left})
        notes.append(
            f"{key}: {folder}: {len(left)} tensors of {', '.join(towers)} are left out: the base has no such part"
        )
    return stored, base, notes


def _class_order(network: PreTrainedModel, config: PretrainedConfig, base: Base) -> list[int] | None:
    """Return the number that an expert gives each class of a base with the same head; None for other classes.

    Empty where there are no classes, or no head of the base's for them.
    """
    if type(network).__name__ != base.names.network or not base.names.has_task_head:
        return []
    order = class_order(config, base.config)
    return order if order == list(range(config.num_labels)) or parameters_of_classes(network) else []


def _reorder(placed: Placed, order: Sequence[int], network: PreTrainedModel, names: Names, base: Base) -> None:
    """Have the rows of an expert's classes read in another order."""
    keys = {names.key(name) for name in parameters_of_classes(network)}
    for name in [name for name in placed.own if base.names.key(name) in keys]:
        placed.pieces[name] = in_order(placed.own.pop(name), base.info(name).shape, order)


def _open_adapter(folder: Path, base: Base, key: str, source: Checkpoint) -> Expert:
    try:
        adapter_config = read_adapter_config(folder)
        # A network ends in what peft's model class for the task type puts there.
        endings: dict[str | None, Head] = {
            "SEQ_CLS": "classification",
            "TOKEN_CLS": "token_classification",
            "CAUSAL_LM": "causal_lm",
            "SEQ_2_SEQ_LM": "seq2seq_lm",
        }
        ending = endings.get(adapter_config.task_type)
        if ending == "causal_lm" and not has_network(base.config, ending):
            ending = None  # a language model with other towers: its own class
        network = skeleton(base.config, ending, base.folder)
        names = names_of(network)
        adapter = parse_adapter(source, adapter_config, network, names, base, base.by_key())
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    if adapter.unties:
        untied = base.untie()
        opened = _open_adapter(folder, untied, key, source)
        return replace(opened, notes=(*opened.notes, untied_note(key, untied, "changes one without the other")))
    stored = {names.key(parameter): name for parameter, name in adapter.saved.items()}
    kin = not names.has_task_head or names.network == base.names.network
    placed = place(Stored(f"{key}: {folder}", source, stored), base, names, network, kin)
    notes: tuple[str, ...] = ()
    if class_names(base.config) and any(base.names.key(name) not in base.names.trunk for name in placed.own):
        notes = (f"{key}: an adapter does not name its classes: they are taken to be the base's, in the base's order",)
    head = {parameter: name for parameter, name in adapter.saved.items() if name in placed.heads}
    config, ends_in = base.config, names.network
    own_head = own_ending([ends_in])
    if head and has_network(base.config, own_head):
        classifier = skeleton(base.config, own_head, base.folder)
        if adapter_config.task_type is None and set(head) <= set(parameter_names(classifier)):
            ends_in = type(classifier).__name__
        # An adapter has no config of its own: the last layer of its head says how many classes there are.
        last = parameter_names(classifier)[-1]
        if last in head:
            config = copy.deepcopy(base.config)
            config.num_labels = source.tensors[head[last]].shape[0]
            config.architectures = [ends_in]
    return Expert(
        base,
        source,
        placed.own,
        adapter.low_rank,
        head,
        {**placed.pieces, **adapter.pieces},
        config=config,
        network=ends_in,
        notes=notes,
    )


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
        head: `causal_lm`, `seq2seq_lm`, `classification` or `token_classification`.
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
