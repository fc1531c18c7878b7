"""The base: its tensors by the names that merged models have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sensmerge.tasks.checkpoints.weights import BaseWeights
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.inventory import Inventory, check_complete, take_inventory
from sensmerge.tasks.networks.names import Names, names_of, parameter_names, plain
from sensmerge.tasks.networks.networks import Head, load_config, skeleton, untied_config


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
        return replace(_lay_out(self.checkpoint, config, network, names, stored, untied=True), notes=self.notes)


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
    network, names, inventory, config = examine(config, checkpoint, folder, str(folder))
    untied = bool(inventory.apart)
    notes = checkpoint.notes
    if untied:
        notes += (
            f"{folder}: its config ties {min(inventory.apart)} to another parameter, but its files hold both; "
            "they are kept apart",
        )
    check_complete(inventory, checkpoint, network, names, str(folder))
    return replace(_lay_out(checkpoint, config, network, names, inventory.stored, untied), notes=notes)


def examine(
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
            "remove the wrong one"
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
    )


def untied_note(key: str, base: Base, why: str) -> str:
    """Return what is to be said of an expert that has the base untied: `why`, and which parameters are apart."""
    aliases = [name for name in base.weights if base.stored.get(name) in base.weights]
    return (
        f"{key} {why} where the base ties {', '.join(aliases)} to {', '.join(base.stored[name] for name in aliases)}: "
        "merged models hold them apart (tie_word_embeddings: false)"
    )


def missing_parameters(base: Base, head: Head) -> list[str]:
    """Return the parameters of a base's network, ended in `head`, that its checkpoint has no weights for.

    Those that transformers computes where files lack them are not missing.
    """
    names = names_of(skeleton(base.config, head, base.folder))
    found = {key for name in base.weights for key in base.names.all_parameters(name)} | names.optional
    return [name for name in names.parameters if name not in found]
