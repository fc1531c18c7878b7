"""The classes of classifiers, which each config names in its own order."""

import copy
import re
from collections.abc import Sequence
from math import prod

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.checkpoints.weights import Piece, View

_PLACEHOLDER = re.compile(r"LABEL_\d+")


def class_names(config: PretrainedConfig) -> list[str] | None:
    """Return the names of a classifier's classes in its order; None where its config does not tell them apart."""
    names = [config.id2label.get(number) for number in range(config.num_labels)]
    if len(set(names)) < len(names) or any(name is None or _PLACEHOLDER.fullmatch(name) for name in names):
        return None
    return names


def class_order(expert: PretrainedConfig, base: PretrainedConfig) -> list[int] | None:
    """Return the number that an expert gives each class of its base, in the base's order; None for other classes.

    Without names on both sides, equally many classes count as the same in the same order.
    """
    theirs, ours = class_names(expert), class_names(base)
    if expert.num_labels != base.num_labels:
        return None
    if theirs is None or ours is None:
        return list(range(base.num_labels))
    return [theirs.index(name) for name in ours] if set(theirs) == set(ours) else None


def with_classes_of(base: PretrainedConfig, expert: PretrainedConfig) -> PretrainedConfig:
    """Return an expert's config with the base's names of classes."""
    named = copy.deepcopy(expert)
    named.id2label, named.label2id = dict(base.id2label), dict(base.label2id)
    return named


def parameters_of_classes(network: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that have a row for every class: those that grow with the classes."""
    config = copy.deepcopy(network.config)
    config.num_labels = network.config.num_labels + 1
    with torch.device("meta"):
        larger = dict(type(network)(config).named_parameters())
    return {name for name, one in network.named_parameters() if one.ndim and len(larger[name]) != len(one)}


def in_order(source: str, shape: Sequence[int], order: Sequence[int]) -> tuple[Piece, ...]:
    """Return a tensor's rows in another order.

    Args:
        source: name of the tensor.
        shape: of it.
        order: row i of the result is row `order[i]` of the tensor.
    """
    width, pieces, start = prod(shape[1:]), [], 0
    for end in range(1, len(order) + 1):
        if end < len(order) and order[end] == order[end - 1] + 1:
            continue
        part = (end - start, *shape[1:])
        stride = tuple(prod(part[axis + 1 :]) for axis in range(len(part)))
        taken, inside = (View(part, stride, row * width) for row in (order[start], start))
        pieces.append(Piece(source, taken, inside))
        start = end
    return tuple(pieces)
