"""Totals by tensor: which parameters and linear layers add to which, and the file that they go to."""

import json
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sensmerge.tasks.artifacts import sync
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.statistics.statistic import TENSORS, Statistic, Total


class SharedInputs:
    """Finds out on the first call of each linear layer whose inputs it is given too, and checks it on later ones.

    The first layer that is given a tensor leads those that are given the same one.
    """

    def __init__(self, source: Source) -> None:
        """Begin with no layer; `source` is for messages."""
        self._source = source
        self._calls: Counter[str] = Counter()
        self._leaders: dict[str, str] = {}
        self._latest: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def leader(self, layer: str, inputs: Tensor) -> str:
        """Return the layer that was the first to be given some inputs, in a call of a layer.

        Raises:
            InputError: they are not those of the layer that leads it.
        """
        self._calls[layer] += 1
        if layer not in self._leaders:
            together = (one for one in self._latest if self._calls[one] == 1 and self._is_latest(one, inputs))
            self._leaders[layer] = next(together, layer)
        leader = self._leaders[layer]
        if leader == layer:
            self._latest[layer] = weakref.ref(inputs), inputs._version
        elif not self._is_latest(leader, inputs):
            raise self._refusal(layer)
        return leader

    def check(self) -> None:
        """Check that no layer was called more or less often than the one that leads it.

        Raises:
            InputError: one was.
        """
        for layer, leader in self._leaders.items():
            if self._calls[layer] != self._calls[leader]:
                raise self._refusal(layer)

    def _is_latest(self, layer: str, inputs: Tensor) -> bool:
        reference, version = self._latest[layer]
        return reference() is inputs and version == inputs._version

    def _refusal(self, layer: str) -> InputError:
        return InputError(
            f"{self._source.key}: {layer} is given the inputs of {self._leaders[layer]} in some samples and not in "
            "others, so sums of its inputs cannot be told; choose what needs no statistics of inputs"
        )


class Totals:
    """The totals of one statistic."""

    def __init__(self, key: str, statistic: Statistic, source: Source) -> None:
        """Begin with none.

        Args:
            key: name of the statistic.
            statistic: what is added up.
            source: says which of the checkpoint's tensors a parameter is.
        """
        self._key, self._statistic, self._source = key, statistic, source
        self._of: dict[str, Total] = {}
        self._tokens: Counter[str] = Counter()
        self._about: dict[str, dict[str, int]] = {}
        """dimension of inputs by tensor, of each total of inputs"""

    def add_gradient(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Add what the gradient of a parameter gives."""
        self._total(name).add(parameter, gradient)

    def add_inputs(self, layer: str, weight: Tensor, inputs: Tensor) -> None:
        """Add what the inputs of a linear layer give, (tokens, in)."""
        self._total(layer).add(weight, inputs)
        self._tokens[layer] += len(inputs)

    def has_inputs_of(self, layer: str, input_dims: Mapping[str, int]) -> None:
        """Have the total of a layer count for some tensors of the checkpoint, of this layer or others."""
        self._about.setdefault(layer, {}).update(input_dims)

    def _total(self, name: str) -> Total:
        if name not in self._of:
            self._of[name] = self._statistic.total()
        return self._of[name]

    def write(self, folder: Path, label: str) -> None:
        """Write all totals to `folder/STATISTIC/LABEL.safetensors`, on the disk for good, and let go of them.

        Raises:
            InputError: a total that is not finite.
        """
        if not self._of:
            return
        stored: dict[str, Tensor] = {}
        tensors: dict[str, dict[str, Any]] = {}
        while self._of:
            name, total = self._of.popitem()  # what it held is gone before the next one is stored
            for key, tensor, about in self._parts(name, total.stored()):
                if not _is_finite(tensor):
                    raise InputError(
                        f"{self._source.key}: {self._key} of tensor {key} is not finite; try dtype: float32"
                    )
                stored[key], tensors[key] = tensor.cpu().contiguous(), about
        path = folder / self._key / f"{label}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, path, {TENSORS: json.dumps({key: tensors[key] for key in sorted(tensors)})})
        sync(path)
        self._tokens.clear()

    def _parts(self, name: str, total: Tensor) -> Iterator[tuple[str, Tensor, dict[str, dict[str, int]]]]:
        """Yield key and value of each tensor of a total, and what is to be known of the checkpoint's tensors."""
        if name in self._about:
            dims = self._about[name]
            yield min(dims), total, {one: {"input_dim": dims[one], "tokens": self._tokens[name]} for one in dims}
            return
        parts = self._source.parts(name)
        assert parts is not None, "what has no parts is refused"
        for tensor, view in parts.items():
            yield tensor, total if len(parts) == 1 else view.of(total), {tensor: {}}


def _is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity.

    It is looked at in pieces, as what says so is as large as they; of most, the sum says enough, and much faster.
    """
    pieces = torch.split(tensor.reshape(-1), 2**20)
    return all(bool(piece.sum().isfinite()) or bool(piece.isfinite().all()) for piece in pieces)
