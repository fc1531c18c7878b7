"""Where the tensors of an expert belong: to the base's tensors, to parts of them, or to a head of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from transformers import PreTrainedModel

from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.layers import in_block
from sensmerge.tasks.checkpoints.weights import Piece, View
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.names import Names
from sensmerge.tasks.networks.regions import regions


@dataclass(frozen=True)
class Placed:
    """Where an expert's tensors belong."""

    own: dict[str, str]
    """base's name → name in the expert's checkpoint"""
    pieces: dict[str, tuple[Piece, ...]]
    """base's name → what stands for its parts"""
    heads: list[str]
    """names in the expert's checkpoint of its head's tensors"""

    def touches(self, name: str) -> bool:
        """Return whether the expert stores anything for a tensor of the base."""
        return name in self.own or name in self.pieces


@dataclass(frozen=True)
class Stored:
    """Tensors that an expert stores whole."""

    where: str
    """recipe key and folder of the expert, for messages"""
    checkpoint: Checkpoint
    """the expert's headers"""
    names: Mapping[str, str]
    """key → name in the checkpoint"""


def place(stored: Stored, base: Base, names: Names, network: PreTrainedModel, kin: bool) -> Placed:
    """Split tensors that an expert stores whole into those that the base has too and those of the expert's head.

    Args:
        stored: the tensors.
        base: the base.
        names: of the expert's network.
        network: the expert's, on the meta device.
        kin: whether the expert's head is for what the base's is for.

    Raises:
        InputError: a tensor that is no head's is not in the base, or has another shape there.
    """
    weights = base.by_key()
    placed = Placed({}, {}, [])
    views = cache(partial(regions, network, names))
    for key, name in stored.names.items():
        match = weights.get(key)
        shape = stored.checkpoint.tensors[name].shape
        # A head is another task's, even where its names and shapes are those of the base's own.
        if match is not None and base.info(match).shape == shape and (kin or key in names.trunk or in_block(key)):
            placed.own[match] = name
        elif names.has_task_head and _may_be_head(key, names, match is None):
            placed.heads.append(name)
        elif match is None and (pieces := _stacked(key, name, weights, names, views)):
            for target, piece in pieces.items():
                placed.pieces[target] = (*placed.pieces.get(target, ()), piece)
        else:
            other = "has no such tensor" if match is None else f"has {base.info(match).shape}"
            raise InputError(
                f"{stored.where}: tensor {name} has shape {shape}, the base {other}; expected a fine-tune of the base"
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


def check_whole(where: str, stored: Mapping[str, str], placed: Placed, names: Names, base: Base) -> None:
    """Check that an expert has all tensors of the base that its network has too."""
    for tensor_key, name in base.by_key().items():
        # What this expert's network does not have (a pooler, a language-model head) stays the base's.
        expected = names.parameter(name) in names.parameters or in_block(name)
        expected = expected and names.tower == base.names.tower and tensor_key not in names.optional | names.statistics
        if expected and not placed.touches(name) and stored.get(tensor_key) not in placed.heads:
            raise InputError(f"{where} lacks tensor {name}, which the base has; expected a whole fine-tune")


def in_tower(stored: Mapping[str, str], names: Names, base: Base) -> tuple[dict[str, str], list[str]]:
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
