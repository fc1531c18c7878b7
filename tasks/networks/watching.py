"""What statistics see of a network or a part of it: gradients, dropped at once, and inputs of linear layers."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.statistics.statistic import TENSORS, Statistic

Statistics = Mapping[str, Statistic]
"""Statistics by name."""
Sums = dict[str, dict[str, float]]
"""What one sample adds to statistics by layer: statistic → layer → number."""


class Watch:
    """Adds up what statistics make of the parameters of a module.

    Sums by layer are of any number of passes between two calls of `take`; totals by tensor of all before `write`.
    """

    def __init__(self, statistics: Statistics, source: Source, module: nn.Module, prefix: str = "") -> None:
        """Put hooks on a module with its weights; what is an expert's own head's is not wanted.

        Args:
            statistics: what is added up.
            source: says which layer, and which of the checkpoint's tensors, a parameter is.
            module: the network or a part of it.
            prefix: its name in the network with a dot behind, empty for the network itself.

        Raises:
            InputError: a statistic by tensor of the gradient of a parameter that holds several tensors.
        """
        self._source = source
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._totals: dict[str, dict[str, Tensor]] = {}
        self._sees_inputs = False
        chosen = {hook: {n: s for n, s in statistics.items() if s.hook == hook} for hook in ("gradients", "inputs")}
        for child in module.modules():
            if isinstance(child, nn.Embedding):
                child.sparse = all(one.takes_sparse for one in chosen["gradients"].values())
                # Of a vocabulary, a sample has few rows; the others' gradients are zero
        names = {id(parameter): prefix + name for name, parameter in module.named_parameters()}
        if chosen["gradients"]:
            for parameter in module.parameters():
                self._watch_gradient(parameter, names[id(parameter)], chosen["gradients"])
        if chosen["inputs"]:
            for child in module.modules():
                if isinstance(child, nn.Linear | Conv1D):
                    self._watch_inputs(child, names[id(child.weight)], chosen["inputs"])

    def _watch_gradient(self, parameter: nn.Parameter, name: str, statistics: Statistics) -> None:
        layer = self._source.layer(name)
        if layer is None:
            parameter.requires_grad_(False)
            return
        adders = [self._adder(parameter, name, layer, one, statistics[one]) for one in statistics]

        def use_up(changed: Tensor) -> None:
            assert changed.grad is not None
            for add in adders:
                add(changed.detach(), changed.grad)
            changed.grad = None

        parameter.requires_grad_()
        parameter.register_post_accumulate_grad_hook(use_up)  # type: ignore[no-untyped-call]

    def _watch_inputs(self, linear: nn.Module, name: str, statistics: Statistics) -> None:
        layer, weight = self._source.layer(name), linear.weight
        if layer is None:
            return
        assert isinstance(weight, nn.Parameter)
        adders = [self._adder(weight, name, layer, one, statistics[one]) for one in statistics]

        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._sees_inputs:
                for add in adders:
                    add(weight.detach(), inputs[0].detach().flatten(0, -2))

        linear.register_forward_pre_hook(see)

    def _adder(
        self, parameter: Tensor, name: str, layer: str, key: str, statistic: Statistic
    ) -> Callable[[Tensor, Tensor], None]:
        """Return what adds to the sums or totals of a statistic, given a parameter and what is seen of it."""
        if statistic.by == "layer":
            zero = torch.zeros((), dtype=torch.float64, device=parameter.device)
            total = self._sums.setdefault(key, {}).setdefault(layer, zero)

            def add_number(weight: Tensor, seen: Tensor) -> None:
                total.add_(statistic.of(weight, seen))

            return add_number
        if statistic.hook == "gradients" and not self._source.is_one_tensor(name):
            raise InputError(
                f"{self._source.key}: the parameter {name} is made of several tensors of the checkpoint, whose "
                f"gradients {key} cannot tell apart; choose what needs no {key}"
            )
        totals, tensor = self._totals.setdefault(key, {}), self._source.tensors(name)[0]

        def add(weight: Tensor, seen: Tensor) -> None:
            found = statistic.of(weight, seen)
            if tensor in totals:
                totals[tensor].add_(found)
            else:
                totals[tensor] = found.clone()  # `of` may return what it was given

        return add

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """See inputs within the block: they count once, however often a module is run."""
        self._sees_inputs = True
        try:
            yield
        finally:
            self._sees_inputs = False

    def take(self) -> Sums:
        """Return the sums by layer and start again at zero; a layer without gradients has zero."""
        found = {key: {layer: float(one) for layer, one in sums.items()} for key, sums in self._sums.items()}
        for sums in self._sums.values():
            for one in sums.values():
                one.zero_()
        return found

    def write(self, folder: Path, label: str) -> None:
        """Write the totals by tensor to `folder/STATISTIC/LABEL.safetensors`, and let go of them.

        Raises:
            InputError: a total that is not finite.
        """
        for key, totals in self._totals.items():
            bad = next((tensor for tensor, total in totals.items() if not bool(total.isfinite().all())), None)
            if bad is not None:
                raise InputError(f"{self._source.key}: {key} of tensor {bad} is not finite; try dtype: float32")
            if totals:
                (folder / key).mkdir(parents=True, exist_ok=True)
                tensors = {tensor: self._source.beside(tensor) for tensor in totals}
                path = folder / key / f"{label}.safetensors"
                save_file({n: t.cpu().contiguous() for n, t in totals.items()}, path, {TENSORS: json.dumps(tensors)})
                totals.clear()


def added(sums: Sums, others: Sums) -> Sums:
    """Return the sums of two parts of a network for one sample."""
    return {
        key: {
            layer: sums.get(key, {}).get(layer, 0.0) + others.get(key, {}).get(layer, 0.0)
            for layer in {**sums.get(key, {}), **others.get(key, {})}
        }
        for key in {**sums, **others}
    }


def needs_gradients(statistics: Statistics) -> bool:
    """Return whether any of some statistics sees gradients."""
    return any(one.hook == "gradients" for one in statistics.values())


def holds_totals(statistics: Statistics) -> bool:
    """Return whether any of some statistics is by tensor, so that blocks hold what earlier samples gave."""
    return any(one.by == "tensor" for one in statistics.values())
