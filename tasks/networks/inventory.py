"""Checks that a checkpoint holds every parameter of a network exactly once, and nothing that only looks like one."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.quantised import QUANTISED
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.names import Names
from sensmerge.tasks.networks.regions import regions


@dataclass(frozen=True)
class Inventory:
    """The tensors of a checkpoint by key."""

    stored: Mapping[str, str]
    """key (`Names.key`) → name in the checkpoint; of tied parameters that are equal, only the first"""
    apart: frozenset[str]
    """keys of tied parameters (`Names.tied`) that the checkpoint holds with other values than what they are tied to"""


def take_inventory(checkpoint: Checkpoint, names: Names, where: str) -> Inventory:
    """Return the tensors of a checkpoint by key, each once.

    Args:
        checkpoint: its headers, and its files where two tensors must be compared.
        names: of the network.
        where: names the checkpoint in messages.

    Raises:
        InputError: two spellings of one name with different values; quantised weights.
        FilesNeeded: two tensors must be compared whose files are not here yet.
    """
    stored: dict[str, str] = {}
    for name in checkpoint.tensors:
        key = names.key(name)
        if QUANTISED.search(name) and names.parameter(name) not in names.parameters:
            raise InputError(
                f"{where}: tensor {name} belongs to a quantised format; expected float weights: "
                "merge a copy of the model that is saved in bfloat16 or float32"
            )
        if key in stored and not checkpoint.holds_equal(stored[key], name):
            raise InputError(
                f"{where}: tensors {stored[key]} and {name} are two spellings of one parameter, with different values; "
                "remove the wrong one"
            )
        stored.setdefault(key, name)
    apart = set()
    for alias, original in names.tied.items():
        if alias not in stored:
            continue
        if original not in stored:
            stored[original] = stored.pop(alias)
        elif checkpoint.holds_equal(stored[original], stored[alias]):
            del stored[alias]
        else:
            apart.add(alias)
    return Inventory(stored, frozenset(apart))


def check_complete(
    inventory: Inventory, checkpoint: Checkpoint, network: PreTrainedModel, names: Names, where: str
) -> None:
    """Check that a checkpoint has a tensor of the right kind and shape for every parameter of its network.

    Parameters that a checkpoint may lack (`Names.optional`) need not be there.

    Args:
        inventory: of the checkpoint.
        checkpoint: its headers.
        network: on the meta device.
        names: of the network.
        where: names the checkpoint in messages.

    Raises:
        InputError: a parameter without a tensor; an integer tensor, or one of another shape, in its place; a stacked
            parameter that is there in two forms, or lacks some of its parts.
    """
    shapes = {
        names.tied.get(key, key): tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        for key in [name.removeprefix(names.prefix)]
    }
    parts: dict[str, dict[str, str]] = {}
    for key, name in inventory.stored.items():
        for parameter in names.all_parameters(name):
            parts.setdefault(parameter, {})[key] = name
    for parameter, shape in shapes.items():
        found = parts.get(parameter, {})
        if not found:
            if parameter not in names.optional:
                raise InputError(
                    f"{where}: has no tensor for {names.spelled(parameter)} of {names.network}; all are needed: "
                    "save the whole model again, or correct architectures and tie_word_embeddings in its config.json"
                )
        elif set(found) == {parameter}:
            _check_tensor(checkpoint, found[parameter], shape, names, where)
        else:
            _check_parts(checkpoint, parameter, found, network, names, where)


def _check_parts(
    checkpoint: Checkpoint, parameter: str, found: Mapping[str, str], network: PreTrainedModel, names: Names, where: str
) -> None:
    if parameter in found:
        other = next(name for key, name in found.items() if key != parameter)
        raise InputError(
            f"{where}: holds {names.network}'s {names.spelled(parameter)} in two forms, as {found[parameter]} and as "
            f"{other}; remove the wrong one"
        )
    expected = regions(network, names, parameter)
    if expected is None or not set(found) <= set(expected):
        return  # a form that transformers converts in its own way: one tensor that it splits, for one
    for key, view in expected.items():
        if key not in found:
            raise InputError(
                f"{where}: has no tensor for {key}, a part of {names.network}'s {names.spelled(parameter)}; "
                "expected all of its parts"
            )
        _check_tensor(checkpoint, found[key], view.shape, names, where)


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], names: Names, where: str) -> None:
    info = checkpoint.tensors[name]
    if not info.is_floating_point:
        raise InputError(
            f"{where}: tensor {name} is {info.dtype}, but {names.network} has a float parameter there (quantised?); "
            "merge a copy of the model that is saved in bfloat16 or float32"
        )
    if info.shape != shape:
        raise InputError(
            f"{where}: tensor {name} has shape {info.shape}, its config asks for {shape}; use the config.json that "
            "belongs to these weights"
        )
