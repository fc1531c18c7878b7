"""What statistics see of a network or a part of it: gradients, dropped at once, and inputs of linear layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.linear import (
    LinearCalls,
    LinearWeight,
    linear_weights,
    loose_weights,
    run_experts_apart,
)
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.totals import SharedInputs, Totals
from sensmerge.tasks.statistics.statistic import Statistic

Statistics = Mapping[str, Statistic]
"""Statistics by name."""
Sums = dict[str, dict[str, float]]
"""What one sample adds to statistics by layer: statistic → layer → number."""
_Adder = Callable[[Tensor, Tensor], None]
"""Adds what a statistic makes of a parameter, and of what is seen of it."""


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
            InputError: a statistic by tensor of the gradient of a parameter whose tensors are no parts of it.
        """
        self._source = source
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._totals = {key: Totals(key, one, source) for key, one in statistics.items() if one.by == "tensor"}
        self._shared = SharedInputs(source)
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
        self._calls: LinearCalls | None = None
        if chosen["inputs"]:
            self._watch_inputs(module, prefix, chosen["inputs"])

    def _watch_gradient(self, parameter: nn.Parameter, name: str, statistics: Statistics) -> None:
        layer = self._source.layer(name)
        if layer is None:
            parameter.requires_grad_(False)
            return
        adders = [self._gradient_adder(parameter, name, layer, one, statistics[one]) for one in statistics]

        def use_up(changed: Tensor) -> None:
            assert changed.grad is not None
            for add in adders:
                add(changed.detach(), changed.grad)
            changed.grad = None

        parameter.requires_grad_()
        parameter.register_post_accumulate_grad_hook(use_up)  # type: ignore[no-untyped-call]

    def _gradient_adder(self, parameter: Tensor, name: str, layer: str, key: str, statistic: Statistic) -> _Adder:
        if statistic.by == "layer":
            return self._number_adder(parameter, layer, key, statistic)
        if self._source.parts(name) is None:
            raise InputError(
                f"{self._source.key}: the parameter {name} is made of several tensors of the checkpoint, whose "
                f"gradients {key} cannot tell apart; choose what needs no {key}"
            )
        return partial(self._totals[key].add_gradient, name)

    def _watch_inputs(self, module: nn.Module, prefix: str, statistics: Statistics) -> None:
        for linear, matrix in linear_weights(module, prefix):
            see = self._seer(matrix, linear.weight, statistics)
            linear.register_forward_pre_hook(lambda _, given, see=see: see(given[0]))
        loose = {id(parameter): name for name, parameter in loose_weights(module, prefix)}
        seers: dict[LinearWeight, Callable[[Tensor], None]] = {}

        def see_call(matrix: LinearWeight, weight: Tensor, inputs: Tensor) -> None:
            if matrix not in seers:
                seers[matrix] = self._seer(matrix, weight, statistics)
            seers[matrix](inputs)

        if loose:
            run_experts_apart(module)
            self._calls = LinearCalls(loose, see_call)

    def _seer(self, matrix: LinearWeight, weight: Tensor, statistics: Statistics) -> Callable[[Tensor], None]:
        """Return what sees the inputs of a linear layer, (..., in)."""
        label, layer = matrix.label, self._source.layer(matrix.name)
        if layer is None:
            return lambda _: None
        dims = matrix.input_dims(self._source.parts(matrix.name))
        by_layer = {key: one for key, one in statistics.items() if one.by == "layer"}
        adders = [self._number_adder(weight, layer, key, one) for key, one in by_layer.items()]
        totals = {key: self._totals[key] for key in statistics if key not in by_layer} if dims else {}
        shares = any(statistics[key].inputs_alone for key in totals)

        def see(given: Tensor) -> None:
            if not self._sees_inputs:
                return
            inputs = given.detach().flatten(0, -2)
            for add in adders:
                add(weight.detach(), inputs)
            leader = self._shared.leader(label, given) if shares else label
            for key, total in totals.items():
                owner = leader if statistics[key].inputs_alone else label
                total.has_inputs_of(owner, dims)
                if owner == label:
                    total.add_inputs(label, weight.detach(), inputs)

        return see

    def _number_adder(self, parameter: Tensor, layer: str, key: str, statistic: Statistic) -> _Adder:
        """Return what adds to the sum of a layer, given a parameter and what is seen of it."""
        zero = torch.zeros((), dtype=torch.float64, device=parameter.device)
        total = self._sums.setdefault(key, {}).setdefault(layer, zero)

        def add(weight: Tensor, seen: Tensor) -> None:
            total.add_(statistic.of(weight, seen))

        return add

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """See inputs within the block: they count once, however often a module is run."""
        self._sees_inputs = True
        try:
            with self._calls or nullcontext():
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
            InputError: a total that is not finite; layers that had the same inputs in some samples alone.
        """
        self._shared.check()
        for totals in self._totals.values():
            totals.write(folder, label)


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
