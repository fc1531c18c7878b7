"""What the experts' changes to one module do to its output, for every sample of a batch by coefficients of its own.

What is linear in its weights needs no weights per sample: f(x; θ₀ + Σ cₖ·δₖ) = f(x; θ₀) + Σ cₖ·f(x; δₖ).
Forward hooks add the second term to the outputs of linear layers, embeddings, convolutions and norms; a few small
parameters are replaced by one value per sample. The modules stay as they are.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.dynamic.mix import Change, Factors, Mix, Share, Stack
from sensmerge.tasks.errors import InputError


class Term(ABC):
    """What the experts' changes to one module do to its output."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        """Prepare a module.

        Args:
            name: its name in the network, for messages.
            module: the module.
            changes: what the experts change, by the name of its parameter.
        """
        self.name = name
        self.module: Any = module
        self.experts = frozenset[int]().union(*(change.experts for change in changes.values()))

    @abstractmethod
    def attach(self, mix: Mix, stack: ExitStack) -> None:
        """Let the module answer by the coefficients until the stack is closed."""

    def samples(self, mix: Mix, tensor: Tensor, dimensions: int = 2) -> Tensor:
        """Return a tensor, or a view of it, whose leading dimension is the samples.

        The rows of a matrix may be all tokens of all samples, one sample after the other, (B · T, width), or all heads
        of all tokens.

        Raises:
            InputError: the samples cannot be told apart.
        """
        if tensor.dim() >= dimensions and len(tensor) == mix.size:
            return tensor
        if tensor.dim() == 2 and mix.length is not None and len(tensor) % (mix.size * mix.length) == 0:
            return tensor.reshape(mix.size, -1, tensor.shape[1])
        raise self.lost(mix, tensor)

    def lost(self, mix: Mix, tensor: Tensor) -> InputError:
        """Return the error that the samples of a tensor cannot be told apart."""
        return InputError(
            f"{self.name} ({type(self.module).__name__}) got a tensor of shape {tuple(tensor.shape)} for "
            f"{mix.size} samples and cannot tell them apart; use application: {{kind: static}}"
        )


class _Sum(Term):
    """A module that is linear in its parameters: the experts' part is added to its output."""

    def attach(self, mix: Mix, stack: ExitStack) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.add(mix, args[0], output)

        stack.enter_context(self.module.register_forward_hook(hook))

    @abstractmethod
    def add(self, mix: Mix, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the module's output with the experts' part added, in place where the shape allows."""


class _Matrix(_Sum):
    """nn.Linear, whose weight is (out, in), and GPT-2's Conv1D, whose weight is (in, out)."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = changes.get("weight")
        self.bias = Stack(changes["bias"]) if "bias" in changes else None
        self.transposed = isinstance(module, nn.Linear)

    def add(self, mix: Mix, inputs: Tensor, output: Tensor) -> Tensor:
        output = output.contiguous()
        inputs, rows = self.samples(mix, inputs), self.samples(mix, output)
        if self.weight is not None:
            for share, vector in self.weight.shared(mix):
                weight = vector.dense()
                self._add_whole(share, inputs, weight.T if self.transposed else weight, rows)
            if self.weight.factors is not None:
                self._add_factors(mix, self.weight.factors, inputs, rows)
        if self.bias is not None:
            rows += self.bias.per_sample(mix, rows.dim())
        return output

    def _add_whole(self, share: Share, inputs: Tensor, weight: Tensor, output: Tensor) -> None:
        scale = _column(share.scale, inputs.dim())
        inputs = inputs[share.rows]
        if not isinstance(share.rows, slice):
            output.index_add_(0, share.rows, (inputs * scale) @ weight)
        elif inputs.shape[-1] <= output.shape[-1]:
            output[share.rows].view(-1, output.shape[-1]).addmm_((inputs * scale).flatten(0, -2), weight)
        else:
            output[share.rows].addcmul_(inputs @ weight, scale)

    def _add_factors(self, mix: Mix, factors: Factors, inputs: Tensor, output: Tensor) -> None:
        down, up = (factors.first.T, factors.second.T) if self.transposed else (factors.second, factors.first)
        hidden = inputs.flatten(0, -2) @ down
        hidden.view(mix.size, -1, hidden.shape[-1]).mul_(factors.scale(mix))
        output.view(-1, output.shape[-1]).addmm_(hidden, up)


class _Lookup(_Sum):
    """nn.Embedding, also with a leading dimension of 1 where all samples share their indices (positions)."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = changes["weight"]

    def add(self, mix: Mix, inputs: Tensor, output: Tensor) -> Tensor:
        if inputs.dim() == 2 and len(inputs) == 1:
            inputs, output = inputs.expand(mix.size, -1), output.repeat(mix.size, 1, 1)
        if output.dim() != 3 or len(output) != mix.size:
            raise self.lost(mix, inputs)
        factor = self._factor(output.dtype)
        for share, vector in self.weight.shared(mix):
            output[share.rows] += vector.rows(inputs[share.rows]) * _column(share.scale * factor, 3)
        factors = self.weight.factors
        if factors is not None:
            output += (F.embedding(inputs, factors.second) * (factors.scale(mix) * factor)) @ factors.first
        return output

    def _factor(self, dtype: torch.dtype) -> Any:
        """Return what the module multiplies what it finds by."""
        factor = getattr(self.module, "embed_scale", 1)
        return factor.to(dtype) if isinstance(factor, Tensor) else factor


class _Convolution(_Sum):
    """nn.Conv2d."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = changes.get("weight")
        self.bias = Stack(changes["bias"]) if "bias" in changes else None
        assert self.weight is None or self.weight.factors is None, f"{name}: low-rank task vector of a convolution"

    def add(self, mix: Mix, inputs: Tensor, output: Tensor) -> Tensor:
        if inputs.dim() != 4 or len(inputs) != mix.size:
            raise self.lost(mix, inputs)
        if self.weight is not None:
            for share, vector in self.weight.shared(mix):
                scaled = inputs[share.rows] * _column(share.scale, inputs.dim())
                output[share.rows] += self.module._conv_forward(scaled, vector.dense(), None)
        if self.bias is not None:
            output += self.bias.per_sample(mix, 2)[..., None, None]
        return output


class _Norm(_Sum):
    """nn.LayerNorm and nn.RMSNorm: linear in their weight and bias."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = Stack(changes["weight"]) if "weight" in changes else None
        self.bias = Stack(changes["bias"]) if "bias" in changes else None

    def add(self, mix: Mix, inputs: Tensor, output: Tensor) -> Tensor:
        output = output.contiguous()
        inputs, rows = self.samples(mix, inputs), self.samples(mix, output)
        if self.weight is not None:
            norm = F.layer_norm if isinstance(self.module, nn.LayerNorm) else F.rms_norm
            normed = norm(inputs, self.module.normalized_shape, eps=self.module.eps)
            rows.addcmul_(normed, self.weight.per_sample(mix, rows.dim()))
        if self.bias is not None:
            rows += self.bias.per_sample(mix, rows.dim())
        return output


class _Values(Term):
    """Small parameters that broadcast against the samples: replaced by one value per sample, whatever the formula.

    These are the weights of transformers' own norms and the factors of layers' outputs (LayerScale), of shape (width,),
    and what embeddings hold themselves (class token, positions), of shape (1, …).
    """

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__(name, module, changes)
        self.own = {attribute: module._parameters[attribute] for attribute in changes}
        self.stacks = {attribute: Stack(change) for attribute, change in changes.items()}

    def attach(self, mix: Mix, stack: ExitStack) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs: Tensor = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            rows = self.samples(mix, inputs)
            for attribute, parameter in self.own.items():
                assert parameter is not None
                if parameter.dim() == 1:
                    values = self.stacks[attribute].per_sample(mix, rows.dim())
                    if rows.dim() != inputs.dim():  # a row of values for every token
                        values = values.expand(-1, rows.shape[1], -1).flatten(0, 1)
                else:  # the leading 1 is the place of the samples
                    values = self.stacks[attribute].per_sample(mix, parameter.dim() + 1).squeeze(1)
                module._parameters[attribute] = parameter + values  # type: ignore[assignment]

        stack.callback(self.module._parameters.update, self.own)
        stack.enter_context(self.module.register_forward_pre_hook(hook, with_kwargs=True))


class _Rerun(Term):
    """A module that is affine in its parameters in a way of its own: it runs again with task vectors in their place.

    These are positions that are numbered within the module, and other subclasses of embeddings, norms and linear
    layers: f(x; θ₀ + Σ cₖ·δₖ) = f(x; θ₀) + Σ cₖ·(f(x; δₖ) − f(x; 0)).
    """

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__(name, module, changes)
        self.changes = changes

    def attach(self, mix: Mix, stack: ExitStack) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            shared = self._is_shared(mix, output)
            rows = output.view(1, *output.shape[-2:]) if shared else self.samples(mix, output)
            shape, origin = rows.shape, self._run(None, args, kwargs)
            for expert in sorted(self.experts & mix.shares.keys()):
                part = (self._run(expert, args, kwargs) - origin).view(shape)
                rows = rows + part * _column(mix.coefficients[:, expert], rows.dim())
            return rows if shared else rows.view(output.shape)

        stack.enter_context(self.module.register_forward_hook(hook, with_kwargs=True))

    def _is_shared(self, mix: Mix, output: Tensor) -> bool:
        """Return whether an output is the same for all samples, as that of positions: (1, T, width) or (T, width)."""
        if not isinstance(self.module, nn.Embedding):
            return False
        return (output.dim() == 3 and len(output) == 1) or (output.dim() == 2 and len(output) == mix.length)

    def _run(self, expert: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the module's output with one expert's task vectors as its parameters, or with zeros."""
        own = dict(self.module._parameters)
        for attribute, parameter in own.items():
            if parameter is not None:
                change = self.changes.get(attribute)
                vector = None if change is None or expert is None else change.vector(expert)
                self.module._parameters[attribute] = torch.zeros_like(parameter) if vector is None else vector
        try:
            found: Tensor = self.module.forward(*args, **kwargs)
            return found
        finally:
            self.module._parameters.update(own)


def _column(values: Tensor, dimensions: int) -> Tensor:
    """Return (samples,) as (samples, 1, …, 1)."""
    return values.view(-1, *[1] * (dimensions - 1))


_PRODUCTS: Mapping[type[nn.Module], type[Term]] = {nn.Linear: _Matrix, Conv1D: _Matrix, nn.Conv2d: _Convolution}
_READ = re.compile(r"\bself\.([\w.]+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|ndim)\b|\s*=[^=])")
_FOR_GPUS = re.compile(r"cuda|kernel")
# Tables of distances are looked up by pairs of positions, or read as a whole: not by sample.
_RELATIVE = re.compile(r"(^|[._])(rel|relative|distance)_")


def kind_of(network: nn.Module, name: str, attribute: str) -> type[Term] | None:
    """Return how a change to a module's parameter is likely to be computed per sample, None if it is not known.

    Whether it is so, only a run can tell (`tasks.dynamic.trial`).
    """
    module = network.get_submodule(name)
    parameter = module._parameters[attribute]
    assert parameter is not None
    cls = type(module)
    if cls in _PRODUCTS:
        return _PRODUCTS[cls]
    if cls is nn.Embedding or cls.__name__.endswith("ScaledWordEmbedding"):
        return None if _RELATIVE.search(name) else _Lookup
    if cls in (nn.LayerNorm, nn.RMSNorm):
        return _Norm
    factors = "Norm" in cls.__name__ or "LayerScale" in cls.__name__
    if factors and parameter.dim() == 1 and not isinstance(module, nn.LayerNorm):
        return _Values
    if cls.__name__.endswith("Embeddings") and parameter.dim() > 1 and len(parameter) == 1:
        return _Values
    return _Rerun if isinstance(module, nn.Embedding | nn.Linear | nn.LayerNorm) else None


def is_read(network: nn.Module, name: str) -> bool:
    """Return whether a module around another may, on a GPU, read its weights without calling it, which no hook sees.

    Mamba's mixers do so. What is read on a CPU, a trial finds; of GPUs only the code tells.
    """
    place, inside = name, ""
    while place:
        place, _, last = place.rpartition(".")
        inside = f"{last}.{inside}" if inside else last
        cls: Any = type(network.get_submodule(place))
        if inside in _read_by(cls):
            return True
    return False


@cache
def _read_by(cls: Any) -> frozenset[str]:
    """Return the submodules whose parameters a class with code for GPUs does more with than ask for their form."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base not in (nn.Module, PreTrainedModel, object) and issubclass(base, nn.Module):
            source = inspect.getsource(base)
            found |= set(_READ.findall(source)) if _FOR_GPUS.search(source) else set()
    return frozenset(found)
