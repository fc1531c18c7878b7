"""A block of the merged model and the same block of an expert, run on the same samples: what their layers are given."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.methods.kernels.features import InputMoments, LinearFit, NormFit, NormMoments
from sensmerge.tasks.networks.calls import Calls, Learned, run_block
from sensmerge.tasks.networks.source import Source

AFFINE = 1e-3
"""Relative error up to which a module is taken to be a norm whose outputs are γ·z + β."""
UNREAD = 0.01
"""Weight, in the last block, of the outputs of a layer that do not reach the one token that a head reads."""
Matter = Mapping[str, list[Tensor | None]]
"""By layer, for each of its calls: which of its outputs matter, bool, of their shape without the last dimension; None:
all, or none."""


class HasTensors(Protocol):
    """What has tensors by the base's names."""

    def read(self, name: str) -> Tensor:
        """Return one of them."""


@dataclass(frozen=True)
class LayerTensors:
    """A layer of a block that can be solved, by the tensors of the base's checkpoint that are its parameters."""

    weight: str
    bias: str | None
    is_norm: bool
    is_transposed: bool
    """whether its weight is (in, out)"""

    def names(self) -> list[str]:
        """Return the names of the tensors."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def read(self, source: "HasTensors", device: str) -> tuple[Tensor, Tensor | None]:
        """Return weight, (out, in) or (width,), and bias, float64.

        Args:
            source: a checkpoint, the base or an expert.
            device: where they are to be.
        """
        weight, *bias = (source.read(name).to(device, torch.float64) for name in self.names())
        return (weight.T if self.is_transposed else weight), (bias[0] if bias else None)


def layers_of(source: Source, name: str, block: nn.Module) -> dict[str, LayerTensors]:
    """Return the linear layers and the norms of a block whose parameters are tensors of the checkpoint as they are.

    Args:
        source: says which tensors parameters are.
        name: of the block in the network.
        block: may be hollow.
    """
    found = {}
    for inner, module in block.named_modules():
        parameters = {key: f"{name}.{inner}.{key}" for key, _ in module.named_parameters(recurse=False)}
        is_linear = isinstance(module, nn.Linear | Conv1D)
        if not (is_linear or _may_be_norm(module)) or not all(map(source.is_one_tensor, parameters.values())):
            continue
        tensors = {key: source.tensors(parameter)[0] for key, parameter in parameters.items()}
        is_transposed = isinstance(module, Conv1D)
        found[inner] = LayerTensors(tensors["weight"], tensors.get("bias"), not is_linear, is_transposed)
    return found


def _may_be_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    is_leaf = not any(True for _ in module.children())
    flat = all(one.dim() == 1 for one in own.values())
    return (
        is_leaf
        and "norm" in type(module).__name__.lower()
        and flat
        and "weight" in own
        and own.keys()
        <= {
            "weight",
            "bias",
        }
    )


class _Seen:
    """What hooks see of a block. It does not know the block, which so goes as soon as nobody needs it."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: list[tuple[str, Tensor]] | None = None
        """None where they are not wanted"""
        self._versions: dict[str, list[int]] = {}
        self._is_open = False

    def hook(self, name: str) -> Callable[..., None]:
        """Return a forward hook for the layer of some name."""

        def see(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self._is_open and inputs:
                self.inputs.setdefault(name, []).append(inputs[0].detach())
                self._versions.setdefault(name, []).append(inputs[0]._version)
                if self.outputs is not None:
                    self.outputs.append((name, output))

        return see

    @contextmanager
    def during_a_pass(self) -> Iterator[None]:
        """See what is run in the context, and forget what was seen before."""
        self.inputs.clear()
        self._versions.clear()
        self._is_open = True
        yield
        self._is_open = False
        for name, versions in self._versions.items():
            if [one._version for one in self.inputs[name]] != versions:  # overwritten in place: they are gone
                del self.inputs[name]


class SeenBlock:
    """A block with its weights, of whose layers what they are given in a pass is kept until the next."""

    def __init__(self, source: Source, name: str, hollow: nn.Module, layers: Iterable[str]) -> None:
        """Load a block.

        Args:
            source: where its weights are.
            name: of the block in the network.
            hollow: it is left so.
            layers: names in the block of those to look at.
        """
        self.module = copy.deepcopy(hollow)
        source.load(self.module, f"{name}.")
        self.module.requires_grad_(False)
        self._seen = _Seen()
        for inner in layers:
            self.module.get_submodule(inner).register_forward_hook(self._seen.hook(inner))

    @property
    def inputs(self) -> dict[str, list[Tensor]]:
        """Of each layer, the inputs of each of its calls, in the last pass."""
        return self._seen.inputs

    def run(self, hidden: Tensor, calls: Calls, learned: Learned) -> Tensor:
        """Return the hidden states behind the block."""
        with self._seen.during_a_pass():
            return run_block(self.module, hidden, calls, learned)

    def run_for(self, read: Tensor, hidden: Tensor, calls: Calls, learned: Learned) -> tuple[Tensor, "Matter"]:
        """Run the block, and find out on which outputs of its layers some of the hidden states behind it depend.

        Args:
            read: which of the hidden states behind the block are meant, (B, T).
            hidden: hidden states before it, (B, T, width).
            calls: see `Entry`.
            learned: likewise.

        Returns:
            The hidden states behind the block, and what matters of its layers' outputs.
        """
        kept = self._seen.outputs = []
        with torch.enable_grad():
            output = self.run(hidden.detach().requires_grad_(), calls, learned)
            # Different weights, lest gradients cancel out: those through a norm add up to zero.
            chosen = output[read] @ torch.linspace(1, 2, output.shape[-1], device=output.device, dtype=output.dtype)
            outputs = [one for _, one in kept if one.requires_grad]
            gradients = iter(torch.autograd.grad(chosen.sum(), outputs, allow_unused=True))
        matter: dict[str, list[Tensor | None]] = {}
        for name, one in kept:
            gradient = next(gradients) if one.requires_grad else None  # what depends on no hidden states is for all
            matter.setdefault(name, []).append(None if gradient is None else gradient.ne(0).any(-1))
        self._seen.outputs = None
        return output.detach(), matter


@dataclass
class BlockFit:
    """What is known of one block for solving its layers: of one task, or the sum over several."""

    linear: dict[str, LinearFit] = field(default_factory=dict)
    """by the first of the layers that share an input"""
    norms: dict[str, NormFit] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    """layers that merged model and expert do not give the same tokens: they cannot be compared"""

    def __iadd__(self, other: "BlockFit") -> Self:
        """Add what is known of other tasks."""
        self.apart |= other.apart
        for name, fit in other.linear.items():
            if name in self.linear:
                self.linear[name] += fit
            else:
                self.linear[name] = fit
        for name, norm in other.norms.items():
            if name in self.norms:
                self.norms[name] += norm
            else:
                self.norms[name] = norm
        return self

    def solve(self, anchors: Mapping[str, tuple[Tensor, Tensor | None]], ridge: float) -> dict[str, tuple[Tensor, ...]]:
        """Return weight, and bias where there is one, of each layer that can be solved; arguments as in `LinearFit`."""
        solved: dict[str, tuple[Tensor, ...]] = {}
        for fit in self.linear.values():
            solved |= fit.solve({name: anchors[name] for name in fit.layers}, ridge)
        for name, norm in self.norms.items():
            solved[name] = norm.solve(*anchors[name], ridge)
        return {name: tensors for name, tensors in solved.items() if name not in self.apart}


class Comparison:
    """Adds up what the layers of two blocks are given, over the samples of one task."""

    def __init__(self, layers: Mapping[str, LayerTensors], student: SeenBlock, alpha: float) -> None:
        """Begin with no sample.

        Args:
            layers: those to compare, by their names in the block.
            student: the block of the merged model.
            alpha: the share of the expert's inputs in the inputs whose outputs are the target.
        """
        self._layers, self._student, self._alpha = layers, student, alpha
        self._moments: dict[str, InputMoments] = {}
        self._norms: dict[str, NormMoments] = {}
        self._leaders: dict[str, str] = {}
        self._apart: set[str] = set()

    def add(self, teacher: SeenBlock, matter: Matter | None = None) -> None:
        """Add a sample, which both blocks have just run.

        Args:
            teacher: the expert's block.
            matter: from `run_for`, where only some outputs count fully.
        """
        shared: dict[Any, str] = {}
        for name, layer in self._layers.items():
            seen, others = self._student.inputs.get(name, []), teacher.inputs.get(name, [])
            if [one.shape for one in seen] != [one.shape for one in others]:
                self._apart.add(name)
                continue
            if not seen:  # its weight may be used without it
                continue
            weights = [None if matter is None else _weights(one) for one in (matter[name] if matter else seen)]
            if layer.is_norm:
                self._add_norm(name, seen, weights)
                continue
            # Weights differ by layer, so with them nothing is shared.
            same = tuple((one.data_ptr(), one.shape, one.stride()) for one in seen)
            first = name if matter is not None else shared.setdefault(same, name)
            leader = self._leaders.setdefault(name, first)
            if leader != name:
                continue
            moments = self._moments.setdefault(name, InputMoments(self._alpha))
            for one, other, weight in zip(seen, others, weights, strict=True):
                moments.add(one.flatten(0, -2), other.flatten(0, -2), weight)

    def _add_norm(self, name: str, seen: list[Tensor], weights: list[Tensor | None]) -> None:
        module = self._student.module.get_submodule(name)
        for one, weight in zip(seen, weights, strict=True):
            values = normalised(module, one, is_checked=name not in self._norms)
            if values is None:
                self._apart.add(name)
                return
            self._norms.setdefault(name, NormMoments()).add(values.flatten(0, -2), weight)

    def fit(self, expert: HasTensors, device: str) -> BlockFit:
        """Return what is known of the block after all samples, and let go of the sums.

        Args:
            expert: the task's.
            device: where it is to be worked out.
        """
        found = BlockFit(apart=self._apart)
        for leader in list(self._moments):
            names = [name for name, one in self._leaders.items() if one == leader]
            weights = {name: self._layers[name].read(expert, device) for name in names}
            found.linear[leader] = LinearFit.of(self._moments.pop(leader), weights)
        for name, moments in self._norms.items():
            found.norms[name] = NormFit(moments, *self._layers[name].read(expert, device))
        return found


def _weights(matter: Tensor | None) -> Tensor | None:
    """Return the weights of a layer's outputs, flat; None where all count alike."""
    if matter is None or bool(matter.all()) or not bool(matter.any()):
        return None
    return matter.flatten().double().mul(1 - UNREAD).add(UNREAD)


def normalised(norm: nn.Module, inputs: Tensor, is_checked: bool = True) -> Tensor | None:
    """Return z of a norm whose outputs are γ·z + β, or γ·z + β + z as some families have it; in float32 at least.

    Args:
        norm: the module, which is asked what it makes of its inputs with other parameters.
        inputs: (…, width).
        is_checked: whether to check that the outputs have this form.

    Returns:
        None where they have not.
    """
    inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    own = {name: one.to(inputs.dtype) for name, one in norm.named_parameters()}
    with torch.no_grad():
        zeros = {name: torch.zeros_like(one) for name, one in own.items()}
        rest = functional_call(norm, zeros, (inputs,))
        values: Tensor = functional_call(norm, zeros | {"weight": torch.ones_like(own["weight"])}, (inputs,)) - rest
        if values.shape[-1:] != own["weight"].shape:
            return None
        if is_checked:
            expected = functional_call(norm, own, (inputs,))
            formed = rest + own["weight"] * values + own.get("bias", 0)
            if not torch.allclose(formed, expected, rtol=AFFINE, atol=AFFINE * float(expected.abs().max())):
                return None
    return values
