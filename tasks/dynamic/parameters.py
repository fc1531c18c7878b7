"""Which tensors of a base's checkpoint the parameters of a network hold, and its task vectors by parameter."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sensmerge.tasks.dynamic.vectors import Vector, compact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.networks import trunk_name


@dataclass(frozen=True)
class Holding:
    """Some tensors of a checkpoint and the parameters that hold them: mostly one of each."""

    tensors: tuple[str, ...]
    parameters: Mapping[str, str]
    """key → name in the network"""
    is_converted: bool
    """whether the network holds them in another form: stacked, or split"""


def holdings(base: Base, network: PreTrainedModel, beside: Container[str] = ()) -> list[Holding]:
    """Return the parameters of a network with the tensors of its base that they hold.

    Args:
        base: the base.
        network: it may lie on the meta device, and end in another head than the base's own: what it does without (a
            pooler, a head) is left out.
        beside: parameters that come with its head, and not from the base; a pooler, if the base has none.

    Raises:
        InputError: a tensor is held in a form that cannot be told from headers, or no tensor is found for a parameter
            of the trunk.
    """
    own = {base.network_name(name): name for name, _ in network.named_parameters()}
    by_key: dict[str, list[str]] = {}
    for name in base.weights:
        by_key.setdefault(base.network_name(name), []).append(name)
    found = []
    for key, tensors in by_key.items():
        converted = any(base.names.is_converted(name) for name in tensors)
        keys = _converted_keys(base, tensors) if converted else [key]
        parameters = {one: own[one] for one in keys if one in own}
        if parameters:
            found.append(Holding(tuple(tensors), parameters, converted))
    held = {key for holding in found for key in holding.parameters}
    trunk = f"{trunk_name(network)}."
    for key, name in own.items():
        if name.startswith(trunk) and name not in beside and key not in held | base.names.optional:
            raise InputError(
                f"{base.folder}: no tensor could be identified by its name as {name} of {type(network).__name__}; "
                "save the base again with transformers"
            )
    return found


def _converted_keys(base: Base, tensors: Sequence[str]) -> list[str]:
    hollow = {name: torch.empty(base.info(name).shape, device="meta") for name in tensors}
    try:
        return list(base.names.conversion(hollow))
    except Exception as error:  # whatever a conversion of transformers raises that asks for more than the tensors
        raise InputError(
            f"{base.folder}: {base.names.network} holds tensor {tensors[0]} in another form, which needs the whole "
            "network to be made; save the base again with transformers"
        ) from error


def by_parameter(
    base: Base,
    network: PreTrainedModel,
    vectors: Mapping[str, Mapping[str, Vector]],
    experts: Iterable[str],
    beside: Container[str] = (),
) -> dict[str, dict[int, Vector]]:
    """Return task vectors by the network's parameter names and the experts' indices, on its device and in its dtype.

    Args:
        base: the base.
        network: its network; task vectors of what it does without are left out.
        vectors: name of a tensor → expert → task vector.
        experts: names of the experts, in the order of coefficients.
        beside: see `holdings`.
    """
    found: dict[str, dict[int, Vector]] = {}
    for holding in holdings(base, network, beside):
        for index, expert in enumerate(experts):
            own = {name: vectors[name][expert] for name in holding.tensors if expert in vectors.get(name, ())}
            if not own:
                continue
            if holding.is_converted:
                # Stacking, cutting and transposing are linear: what they make of task vectors is a task vector.
                whole = {
                    name: own[name].dense().float() if name in own else torch.zeros(base.info(name).shape)
                    for name in holding.tensors
                }
                made: dict[str, Vector | None] = {
                    holding.parameters[key]: compact(delta, network.dtype)
                    for key, delta in base.names.conversion(whole).items()
                    if key in holding.parameters
                }
            else:
                (name,) = holding.parameters.values()
                made = {name: own[holding.tensors[-1]]}
            for name, vector in made.items():
                if vector is not None:
                    found.setdefault(name, {})[index] = vector.to(network.device, network.dtype)
    return found
