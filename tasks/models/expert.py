"""A base and its experts by one set of tensor names: full fine-tunes and LoRA adapters alike."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tasks.errors import InputError
from tasks.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, parse_adapter, read_adapter_config
from tasks.models.checkpoint import INDEX, WEIGHTS, Checkpoint, open_checkpoint, read_header
from tasks.models.classes import class_order, in_order, parameters_of_classes, with_classes_of
from tasks.models.compare import check_sizes, differences, listed, with_settings_of
from tasks.models.inventory import Inventory, check_complete, take_inventory
from tasks.models.layers import in_block
from tasks.models.names import Names, names_of, parameter_names, plain
from tasks.models.networks import (
    Head,
    fill_network,
    has_network,
    load_config,
    network_class,
    skeleton,
    untied_config,
)
from tasks.models.regions import regions
from tasks.models.weights import BaseWeights, ExpertWeights, Piece, View


@dataclass(frozen=True)
class Base(BaseWeights):
    """The model that all experts were fine-tuned from; merged models have the same form."""

    config: PretrainedConfig = field(kw_only=True)
    names: Names = field(kw_only=True)
    """of the network that the base was saved as"""
    notes: tuple[str, ...] = field(kw_only=True, default=())
    """what a user should know of it: a line each"""

    def network_name(self, name: str) -> str:
        """Return the key of the parameter that a tensor, or another network's parameter of some name, is or is in."""
        return self.names.parameter(name)

    def by_key(self) -> dict[str, str]:
        """Return the name of every weight by its key."""
        keys = {name: self.names.key(name) for name in self.weights}
        return {self.names.tied.get(key, key): name for name, key in keys.items()}

    def only_weights(self) -> BaseWeights:
        """Return what merging needs to know, without open files."""
        return BaseWeights(
            replace(self.checkpoint), self.weights, self.buffers, self.statistics, self.stored, self.untied
        )

    def untie(self) -> "Base":
        """Return the base with a tensor of its own for every parameter that its config ties to another.

        Raises:
            InputError: transformers ties them whatever the config says.
        """
        stored = {self.names.key(name): self.stored_name(name) for name in (*self.weights, *self.buffers)}
        stored = {self.names.tied.get(key, key): name for key, name in stored.items()}
        stored |= {alias: stored[original] for alias, original in self.names.tied.items() if original in stored}
        config = untied_config(self.config)
        network = skeleton(config, None, self.folder)
        names = names_of(network)
        if names.tied:
            raise InputError(
                f"{self.folder}: {names.network} always ties {', '.join(names.tied)} to another parameter; "
                "expected experts that change both alike"
            )
        return _lay_out(self.checkpoint, config, network, names, stored, True, self.notes)


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
        prefix = network_class(self.config, "classification", self.folder).base_model_prefix
        return any(name.startswith(f"{prefix}.") for name in self.head)

    def only_weights(self, base: BaseWeights) -> ExpertWeights:
        """Return what merging needs to know, without open files; `base` is its base's `only_weights`."""
        return ExpertWeights(base, replace(self.source), self.own, self.low_rank, self.head, self.pieces)

    def on(self, base: Base) -> "Expert":
        """Return the expert on its base untied (`Base.untie`): of tied parameters, both names are changed alike."""
        if self.base.untied or not base.untied:
            return self
        aliases = {name: base.stored[name] for name in base.weights if base.stored.get(name) in base.weights}

        def both(values: Mapping[str, Any]) -> dict[str, Any]:
            return {**values, **{alias: values[name] for alias, name in aliases.items() if name in values}}

        return replace(self, base=base, own=both(self.own), low_rank=both(self.low_rank), pieces=both(self.pieces))


def open_base(folder: Path, checkpoint: Checkpoint | None = None) -> Base:
    """Read the headers and config of a base, or of a merged model.

    Parameters that the config ties but the files hold with different values are untied, as transformers loads them.

    Args:
        folder: the model's folder; its JSON files are read from here.
        checkpoint: the headers, where the weights are not in the folder yet.

    Raises:
        InputError: what `open_checkpoint`, `load_config`, `take_inventory` and `check_complete` raise.
        FilesNeeded: tensors must be compared whose files are not here yet.
    """
    config = load_config(folder)
    checkpoint = checkpoint or open_checkpoint(folder)
    network, names, inventory, config = _examine(config, checkpoint, folder, str(folder))
    untied = bool(inventory.apart)
    notes = checkpoint.notes
    if untied:
        notes += (
            f"{folder}: its config ties {min(inventory.apart)} to another parameter, but its files hold both; "
            "they are kept apart",
        )
    check_complete(inventory, checkpoint, network, names, str(folder))
    return _lay_out(checkpoint, config, network, names, inventory.stored, untied, notes)


def _examine(
    config: PretrainedConfig, checkpoint: Checkpoint, folder: Path, where: str
) -> tuple[PreTrainedModel, Names, Inventory, PretrainedConfig]:
    """Return network, names, inventory and config of a checkpoint, untied if its files hold tied parameters apart."""
    network = skeleton(config, None, folder)
    names = names_of(network)
    inventory = take_inventory(checkpoint, names, where)
    if not inventory.apart:
        return network, names, inventory, config
    config = untied_config(config)
    network = skeleton(config, None, folder)
    names = names_of(network)
    stuck = inventory.apart & names.tied.keys()
    if stuck:
        raise InputError(
            f"{where}: holds {min(stuck)} and what {names.network} always ties it to with different values; "
            "remove the one that is not meant"
        )
    found = take_inventory(checkpoint, names, where)
    return network, names, Inventory(found.stored, inventory.apart), config


def _lay_out(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    network: PreTrainedModel,
    names: Names,
    by_key: Mapping[str, str],
    untied: bool,
    notes: tuple[str, ...],
) -> Base:
    """Return a base whose tensors, by key, have some names in the checkpoint."""
    full = {names.key(name): name for name in parameter_names(network)}
    first = {stored: key for key, stored in reversed(list(by_key.items()))}
    # A second name of one tensor, as an untied parameter has at first, is written as transformers spells it.
    written = {key: plain(name) if first[name] == key else full[key] for key, name in by_key.items()}
    last = len(names.parameters)

    def place(key: str) -> tuple[int, str]:
        return names.parameters.get(names.parameter(written[key]), last), written[key]

    weights: list[str] = []
    buffers: list[str] = []
    for key in sorted(written, key=place):
        merged = checkpoint.tensors[by_key[key]].is_floating_point and not names.is_unread(written[key])
        (weights if merged else buffers).append(written[key])
    statistics = frozenset(written[key] for key in written if key in names.statistics and written[key] in weights)
    return Base(
        checkpoint,
        tuple(weights),
        tuple(buffers),
        statistics,
        {written[key]: name for key, name in by_key.items() if written[key] != name},
        untied,
        config=config,
        names=names,
        notes=notes,
    )


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
        return _open_adapter(folder, base, key, checkpoint or Checkpoint(folder, read_header(weights)))
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
    network, names, inventory, config = _examine(config, source, folder, where)
    check_complete(inventory, source, network, names, where)
    notes = [f"{key}: {note}" for note in source.notes]
    if (folder / ADAPTER_CONFIG).is_file():
        notes.append(f"{where} holds a whole checkpoint; its {ADAPTER_CONFIG} is left over and not read")
    stored, base, said = _changed_tensors(key, folder, source, inventory.stored, names, base)
    notes += said
    order = _class_order(network, config, base)
    kin = not names.has_task_head or (names.network == base.names.network and order is not None)
    placed = _place(where, stored, source, base, names, network, kin)
    own_classes: dict[int, str] = {}
    if order is None:
        notes.append(f"{where} has other classes than the base: its head stays its own, beside the merged model")
    elif order != sorted(order):
        _reorder(placed, order, network, names, base)
        own_classes, config = dict(config.id2label), with_classes_of(base.config, config)
        notes.append(f"{where} has the base's classes in another order: its head is read in the base's")
    _check_whole(where, stored, placed, names, base)
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
        notes.append(_untied_note(key, base, "has its own values for both"))
    stored = {
        name_key: name
        for name_key, name in stored.items()
        if source.tensors[name].is_floating_point and not names.is_unread(name)
    }
    stored, left = _in_tower(stored, names, base)
    if left:
        towers = sorted({one.partition(".")[0] for one in left})
        notes.append(
            f"{key}: {folder}: {len(left)} tensors of {', '.join(towers)} are left out: the base has no such part"
        )
    return stored, base, notes


def _check_whole(where: str, stored: Mapping[str, str], placed: "_Placed", names: Names, base: Base) -> None:
    """Check that an expert has all tensors of the base that its network has too."""
    for tensor_key, name in base.by_key().items():
        # What this expert's network does not have (a pooler, a language-model head) stays the base's.
        expected = names.parameter(name) in names.parameters or in_block(name)
        expected = expected and names.tower == base.names.tower and tensor_key not in names.optional | names.statistics
        if expected and not placed.touches(name) and stored.get(tensor_key) not in placed.heads:
            raise InputError(f"{where} lacks tensor {name}, which the base has; expected a whole fine-tune")


def _class_order(network: PreTrainedModel, config: PretrainedConfig, base: Base) -> list[int] | None:
    """Return the number that an expert gives each class of a base with the same head; None for other classes.

    Empty where there are no classes, or no head of the base's for them.
    """
    if type(network).__name__ != base.names.network or not base.names.has_task_head:
        return []
    order = class_order(config, base.config)
    return order if order == list(range(config.num_labels)) or parameters_of_classes(network) else []


def _reorder(placed: "_Placed", order: Sequence[int], network: PreTrainedModel, names: Names, base: Base) -> None:
    """Have the rows of an expert's classes read in another order."""
    keys = {names.key(name) for name in parameters_of_classes(network)}
    for name in [name for name in placed.own if base.names.key(name) in keys]:
        placed.pieces[name] = in_order(placed.own.pop(name), base.info(name).shape, order)


def _untied_note(key: str, base: Base, why: str) -> str:
    aliases = [name for name in base.weights if base.stored.get(name) in base.weights]
    return (
        f"{key} {why} where the base ties {', '.join(aliases)} to {', '.join(base.stored[name] for name in aliases)}: "
        "merged models hold them apart (tie_word_embeddings: false)"
    )


def _in_tower(stored: Mapping[str, str], names: Names, base: Base) -> tuple[dict[str, str], list[str]]:
    """Return an expert's tensors by the base's keys, where one of them is the language model inside the other.

    Returns:
        Key → name; and the keys that the base has no part for.
    """
    if names.tower == base.names.tower or (names.tower and base.names.tower):
        return dict(stored), []
    known = base.by_key()
    inside = {
        base.names.tower + key.removeprefix(names.tower) if key.startswith(names.tower) else key: name
        for key, name in stored.items()
    }
    if base.names.tower:
        return {key if key in known else key.removeprefix(base.names.tower): name for key, name in inside.items()}, []
    return {key: name for key, name in inside.items() if key in known}, [key for key in inside if key not in known]


def _open_adapter(folder: Path, base: Base, key: str, source: Checkpoint) -> Expert:
    try:
        adapter_config = read_adapter_config(folder)
        # A network ends in what peft's model class for the task type puts there.
        ending: Head | None = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}.get(adapter_config["task_type"])
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
        return replace(opened, notes=(*opened.notes, _untied_note(key, untied, "changes one without the other")))
    stored = {names.key(parameter): name for parameter, name in adapter.saved.items()}
    kin = not names.has_task_head or names.network == base.names.network
    placed = _place(f"{key}: {folder}", stored, source, base, names, network, kin)
    head = {parameter: name for parameter, name in adapter.saved.items() if name in placed.heads}
    config, ends_in = base.config, names.network
    if head and has_network(base.config, "classification"):
        classifier = skeleton(base.config, "classification", base.folder)
        if adapter_config["task_type"] is None and set(head) <= set(parameter_names(classifier)):
            ends_in = type(classifier).__name__
        # An adapter has no config of its own: the last layer of its head says how many classes there are.
        last = parameter_names(classifier)[-1]
        if last in head:
            config = copy.deepcopy(base.config)
            config.num_labels = source.tensors[head[last]].shape[0]
    return Expert(
        base,
        source,
        placed.own,
        adapter.low_rank,
        head,
        {**placed.pieces, **adapter.pieces},
        config=config,
        network=ends_in,
    )


@dataclass(frozen=True)
class _Placed:
    """Where an expert's tensors belong."""

    own: dict[str, str]
    """base's name → name in the expert's checkpoint"""
    pieces: dict[str, tuple[Piece, ...]]
    """base's name → what stands for its parts"""
    heads: list[str]
    """names in the expert's checkpoint of its head's tensors"""

    def touches(self, name: str) -> bool:
        return name in self.own or name in self.pieces


def _place(
    where: str,
    stored: Mapping[str, str],
    source: Checkpoint,
    base: Base,
    names: Names,
    network: PreTrainedModel,
    kin: bool,
) -> _Placed:
    """Split tensors that an expert stores whole into those that the base has too and those of the expert's head.

    Args:
        where: recipe key and folder of the expert, for messages.
        stored: key → name in `source`.
        source: the expert's headers.
        base: the base.
        names: of the expert's network.
        network: the expert's, on the meta device.
        kin: whether the expert's head is for what the base's is for.

    Raises:
        InputError: a tensor that is no head's is not in the base, or has another shape there.
    """
    weights = base.by_key()
    placed = _Placed({}, {}, [])
    views = cache(partial(regions, network, names))
    for key, name in stored.items():
        match = weights.get(key)
        shape = source.tensors[name].shape
        # A head is another task's, even where its names and shapes are those of the base's own.
        if match is not None and base.info(match).shape == shape and (kin or key in names.trunk or in_block(key)):
            placed.own[match] = name
        elif names.has_task_head and _may_be_head(key, names, match is None):
            placed.heads.append(name)
        elif match is None and (pieces := _stacked(key, name, weights, names, views)):
            for target, piece in pieces.items():
                placed.pieces[target] = (*placed.pieces.get(target, ()), piece)
        else:
            other = "lacks it" if match is None else f"has {base.info(match).shape}"
            raise InputError(
                f"{where}: tensor {name} has shape {shape}, the base {other}; expected a fine-tune of the base"
            )
    return placed


def _may_be_head(key: str, names: Names, is_new: bool) -> bool:
    """Return whether a tensor is of a task's head: outside the trunk, or a pooler in it that the base lacks."""
    if in_block(key):
        return key in names.parameters and key not in names.trunk
    return key not in names.trunk or is_new


def _stacked(
    key: str,
    name: str,
    weights: Mapping[str, str],
    names: Names,
    views: Callable[[str], dict[str, View] | None],
) -> dict[str, Piece]:
    """Return, by the base's names, what an expert's tensor stands for that the base stacks differently."""
    parameter = names.parameter(name)
    found = views(parameter) if parameter in names.parameters else None
    if found is None:
        return {}
    if key == parameter:
        return {weights[one]: Piece(name, taken=view) for one, view in found.items() if one in weights}
    if parameter in weights and key in found:
        return {weights[parameter]: Piece(name, inside=found[key])}
    return {}


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
