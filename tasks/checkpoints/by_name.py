"""Base and experts whose tensors belong together by their names as they are: no network says what they are.

What then is known of a tensor is its name, its shape and its dtype.
"""

import re
from collections.abc import Iterable

from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, tensor_bytes
from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.checkpoints.quantised import QUANTISED, WAY_OUT
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights
from sensmerge.tasks.errors import InputError

_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
"""What torch calls the buffers of norms over batches."""
_COUNTS = re.compile(r"(^|\.)num_batches_tracked$")
"""What torch counts beside them; nothing is computed from it once a model is trained."""


def base_by_name(checkpoint: Checkpoint, where: str) -> BaseWeights:
    """Return the weights of a base, the numbered parts of its network in order.

    Args:
        checkpoint: its tensors.
        where: names it in messages.

    Raises:
        InputError: quantised weights.
    """
    _check_unquantised(checkpoint, where)
    names = sorted(checkpoint.tensors, key=_natural)
    weights = tuple(name for name in names if checkpoint.tensors[name].is_floating_point)
    statistics = frozenset(name for name in weights if _STATISTICS.search(name))
    return BaseWeights(checkpoint, weights, tuple(name for name in names if name not in set(weights)), statistics)


def expert_by_name(source: Checkpoint, base: BaseWeights, where: str) -> ExpertWeights:
    """Return the weights of an expert, which has the base's tensors.

    Args:
        source: its tensors.
        base: its base.
        where: names it in messages.

    Raises:
        InputError: a tensor that only one of the two has, or of another shape, or an integer instead of a floating
            one; tensors of integers that differ; quantised weights.
        FilesNeeded: tensors must be compared whose files are not here yet.
    """
    _check_unquantised(source, where)
    ours, theirs = base.checkpoint.tensors, source.tensors
    expected = "expected the base's tensors, for names are taken as they are"
    if lacking := ours.keys() - theirs.keys():
        raise InputError(f"{where}: has no {_some(lacking)}; {expected}")
    if more := theirs.keys() - ours.keys():
        raise InputError(f"{where}: has {_some(more)}, which the base has not; {expected}")
    for name, info in theirs.items():
        if (info.shape, info.is_floating_point) != (ours[name].shape, ours[name].is_floating_point):
            raise InputError(
                f"{where}: tensor {name} is {_said(info)}, the base's is {_said(ours[name])}; expected the base's shape"
            )
    for name in base.buffers:
        if not (_COUNTS.search(name) or _equal(source, base.checkpoint, name)):
            raise InputError(
                f"{where}: tensor {name} ({_said(theirs[name])}) differs from the base's, and holds no floating-point "
                "weights that could be merged; expected the base's values there"
            )
    return ExpertWeights(base, source, {name: name for name in base.weights}, {}, {})


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return what names are ordered by: parts that are numbers by their size, and before others."""
    parts = [part.lstrip("0") or "0" if part.isdecimal() else part for part in name.split(".")]
    return [(not part.isdecimal(), len(part) if part.isdecimal() else 0, part) for part in parts]


def _check_unquantised(checkpoint: Checkpoint, where: str) -> None:
    quantised = next((name for name in checkpoint.tensors if QUANTISED.search(name)), None)
    if quantised is not None:
        raise InputError(
            f"{where}: tensor {quantised} belongs to a quantised format; expected float weights: {WAY_OUT}"
        )


def _equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    for checkpoint in (one, other):
        checkpoint.require(name)
    same = one.tensors[name].dtype == other.tensors[name].dtype
    return same and tensor_bytes(one.read(name)) == tensor_bytes(other.read(name))


def _said(info: TensorInfo) -> str:
    return f"{info.dtype} of shape {info.shape}"


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names, key=_natural)
    return f"tensor {first}" + (f" and {len(others)} more" if others else "")
