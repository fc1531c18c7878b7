"""A network with other weights for every sample of a batch: base + Σ coefficient · task vector, in one forward pass.

What is linear in its weights needs no weights per sample: f(x; θ₀ + Σ cₖ·δₖ) = f(x; θ₀) + Σ cₖ·f(x; δₖ) (DESIGN §5).
Forward hooks add the second term to the outputs of the linear layers, embeddings, convolutions and norms that some
expert changes; the few small parameters that remain are replaced by one value per sample. The modules stay as they are.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.errors import InputError
from tasks.models.layers import block_names
from tasks.models.vectors import Dense, LowRank, Sparse, Vector


class DynamicNetwork:
    """A base's network and the task vectors of its experts.

    Attributes:
        network: the base's network, unchanged outside `mixed`.
        blocks: number of its transformer blocks.
    """

    def __init__(self, network: PreTrainedModel, vectors: Mapping[str, Mapping[int, Vector]], experts: int) -> None:
        """Prepare the modules that some expert changes; nothing is moved or cast.

        Args:
            network: the base's network, which `check_dynamic` has passed.
            vectors: parameter name (as in `named_parameters`, tied ones once) → index of the expert → its task vector,
                on the network's device and in its dtype.
            experts: number of experts, K.
        """
        self.network = network
        self._experts = experts
        self._mixing = False
        self._terms: list[_Term] = []
        parameters = dict(network.named_parameters(remove_duplicate=False))
        changes = {id(parameters[name]): _Change.of(by_expert) for name, by_expert in vectors.items() if by_expert}
        for name, module in network.named_modules():
            own = {
                attribute: changes[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if id(parameter) in changes
            }
            if own:
                (kind,) = {_kind(network, name, attribute) for attribute in own}
                assert kind is not None, f"{name}: check_dynamic was not called"
                self._terms.append(kind(name, module, own))
        trunk = network.base_model
        layers = block_names(name for name, _ in trunk.named_parameters())
        self._blocks: list[nn.Module] = [trunk.get_submodule(layer) for layer in layers]
        self.blocks = len(self._blocks)

    @contextmanager
    def mixed(self, coefficients: Tensor) -> Iterator[PreTrainedModel]:
        """Inside the block, the network answers sample b by the weights base + Σₖ coefficients[b, k] · task vector k.

        Args:
            coefficients: (B, K) float; B is the batch size of all calls inside the block, of `generate` too.

        Raises:
            InputError: inside the block, a module gets other inputs than one per sample.
        """
        assert coefficients.dim() == 2, f"coefficients have shape {tuple(coefficients.shape)}"
        assert coefficients.shape[1] == self._experts, f"{coefficients.shape[1]} coefficients, {self._experts} experts"
        assert not self._mixing, "mixed within mixed would add both"
        mix = _Mix.of(coefficients, self.network)
        with ExitStack() as stack:
            self._mixing = True
            stack.callback(setattr, self, "_mixing", False)
            for term in self._terms:
                if not term.experts.isdisjoint(mix.shares):
                    term.attach(mix, stack)
            yield self.network

    def hidden_states(
        self, inputs: Mapping[str, Tensor], coefficients: Tensor, layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return what comes out of some of the transformer blocks; those after the last one asked for do not run.

        Args:
            inputs: of the network's trunk, for B samples.
            coefficients: (B, K) float, as in `mixed`.
            layers: numbers of blocks, the first is 1.

        Returns:
            layer → (B, T, width).

        Raises:
            InputError: the network has no such block, or what `mixed` raises.
        """
        assert layers, "no layers"
        for layer in layers:
            if not 1 <= layer <= self.blocks:
                raise InputError(f"layer is {layer}; the model has {self.blocks} blocks, 1 to {self.blocks}")
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, args: object, output: Any) -> None:
                found[layer] = output if isinstance(output, Tensor) else output[0]
                if layer == max(layers):
                    raise _Stop

            return hook

        trunk = self.network.base_model
        options = {"use_cache": False} if "use_cache" in inspect.signature(trunk.forward).parameters else {}
        with self.mixed(coefficients), ExitStack() as stack:
            for layer in set(layers):
                stack.enter_context(self._blocks[layer - 1].register_forward_hook(keep(layer)))
            with suppress(_Stop):
                trunk(**inputs, **options)
        return {layer: found[layer] for layer in layers}


def check_dynamic(network: PreTrainedModel, changed: Iterable[str], key: str) -> None:
    """Check that `DynamicNetwork` can take every change of the experts into account.

    Args:
        network: the base's network; it may lie on the meta device.
        changed: names of the parameters that some expert changes.
        key: recipe key, for messages.

    Raises:
        InputError: a parameter is in a module of a kind that has no linear form here.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]): name for name in changed}
    for name, module in network.named_modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in wanted and _kind(network, name, attribute) is None:
                holder = _parent(network, name) if type(module) in _PRODUCTS else module
                raise InputError(
                    f"{key}: {wanted[id(parameter)]} is in {type(holder).__name__}, which cannot be linearised; "
                    "use application: {kind: static}"
                )


class _Stop(Exception):
    """The last block asked for has run."""


@dataclass(frozen=True)
class _Share:
    """The samples of a batch that take some of one expert."""

    rows: slice | Tensor
    """a slice where they follow each other: then their inputs and outputs are views"""
    scale: Tensor
    """(samples,): their coefficients"""


@dataclass(frozen=True)
class _Mix:
    """The coefficients of one batch."""

    coefficients: Tensor
    """(B, K), on the network's device and in its dtype"""
    shares: Mapping[int, _Share]
    """by expert, of the experts that any sample takes"""

    @classmethod
    def of(cls, coefficients: Tensor, network: PreTrainedModel) -> "_Mix":
        # Which rows are zero decides what is computed: looked up once, as a GPU has to wait for the answer.
        taken = coefficients.cpu() != 0
        coefficients = coefficients.to(network.device, network.dtype)
        shares = {}
        for expert, column in enumerate(taken.unbind(1)):
            indices = column.nonzero().flatten()
            if len(indices):
                first, end = int(indices[0]), int(indices[-1]) + 1
                rows = slice(first, end) if end - first == len(indices) else indices.to(network.device)
                shares[expert] = _Share(rows, coefficients[rows, expert])
        return cls(coefficients, shares)

    @property
    def size(self) -> int:
        """Number of samples, B."""
        return len(self.coefficients)


@dataclass(frozen=True)
class _Factors:
    """The low-rank task vectors of all experts on one weight, one below the other."""

    first: Tensor
    """(R, columns), R the sum of the ranks"""
    second: Tensor
    """(rows, R)"""
    owner: Tensor
    """(R,): index of the expert"""

    def scale(self, mix: _Mix) -> Tensor:
        """Return each sample's coefficient of each rank, (B, 1, R)."""
        return mix.coefficients.index_select(1, self.owner).unsqueeze(1)


@dataclass(frozen=True)
class _Change:
    """What the experts change in one parameter."""

    whole: Mapping[int, Dense | Sparse]
    """by expert, task vectors that are not low-rank"""
    factors: _Factors | None
    """those that are"""
    experts: frozenset[int]

    @classmethod
    def of(cls, vectors: Mapping[int, Vector]) -> "_Change":
        low = {expert: vector for expert, vector in vectors.items() if isinstance(vector, LowRank)}
        factors = None
        if low:
            first = torch.cat([vector.first for vector in low.values()])
            owner = [expert for expert, vector in low.items() for _ in range(len(vector.first))]
            factors = _Factors(
                first,
                torch.cat([vector.second for vector in low.values()], dim=1),
                torch.tensor(owner, device=first.device),
            )
        whole = {expert: vector for expert, vector in vectors.items() if not isinstance(vector, LowRank)}
        return cls(whole, factors, frozenset(vectors))

    def shared(self, mix: _Mix) -> Iterator[tuple[_Share, Dense | Sparse]]:
        """Yield share and task vector, if not low-rank, of each expert that has both."""
        for expert, vector in self.whole.items():
            if expert in mix.shares:
                yield mix.shares[expert], vector


class _Stack:
    """The task vectors of a small parameter, as the rows of one matrix."""

    def __init__(self, change: _Change) -> None:
        assert change.factors is None, "vectors, norms and positions have no low-rank task vectors"
        self._values = torch.stack([vector.dense() for vector in change.whole.values()])
        self._experts = torch.tensor(list(change.whole), device=self._values.device)

    def per_sample(self, mix: _Mix, dimensions: int) -> Tensor:
        """Return Σₖ cₖ·δₖ of every sample, (B, 1, …, 1, *shape) with as many dimensions as asked for."""
        mixed = mix.coefficients.index_select(1, self._experts) @ self._values.flatten(1)
        shape = self._values.shape[1:]
        return mixed.view(mix.size, *[1] * (dimensions - 1 - len(shape)), *shape)


class _Term(ABC):
    """What the experts' changes to one module do to its output."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, _Change]) -> None:
        self.name = name
        self.module: Any = module
        self.experts = frozenset[int]().union(*(change.experts for change in changes.values()))

    @abstractmethod
    def attach(self, mix: _Mix, stack: ExitStack) -> None:
        """Let the module answer by the coefficients until the stack is closed."""

    def check(self, mix: _Mix, tensor: Tensor, dimensions: int = 2) -> None:
        """Check that the leading dimension of a tensor is the samples.

        Raises:
            InputError: it has not.
        """
        if tensor.dim() < dimensions or len(tensor) != mix.size:
            raise InputError(
                f"{self.name} ({type(self.module).__name__}) got a tensor of shape {tuple(tensor.shape)} for "
                f"{mix.size} samples and cannot tell them apart; use application: {{kind: static}}"
            )


class _Sum(_Term):
    """A module that is linear in its parameters: the experts' part is added to its output."""

    def attach(self, mix: _Mix, stack: ExitStack) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.add(mix, args[0], output)

        stack.enter_context(self.module.register_forward_hook(hook))

    @abstractmethod
    def add(self, mix: _Mix, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the module's output with the experts' part added, in place where the shape allows."""


class _Matrix(_Sum):
    """nn.Linear, whose weight is (out, in), and GPT-2's Conv1D, whose weight is (in, out)."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, _Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = changes.get("weight")
        self.bias = _Stack(changes["bias"]) if "bias" in changes else None
        self.transposed = isinstance(module, nn.Linear)

    def add(self, mix: _Mix, inputs: Tensor, output: Tensor) -> Tensor:
        self.check(mix, inputs)
        output = output.contiguous()
        if self.weight is not None:
            for share, vector in self.weight.shared(mix):
                weight = vector.dense()
                self._add_whole(share, inputs, weight.T if self.transposed else weight, output)
            if self.weight.factors is not None:
                self._add_factors(mix, self.weight.factors, inputs, output)
        if self.bias is not None:
            output += self.bias.per_sample(mix, output.dim())
        return output

    def _add_whole(self, share: _Share, inputs: Tensor, weight: Tensor, output: Tensor) -> None:
        scale = _column(share.scale, inputs.dim())
        inputs = inputs[share.rows]
        if not isinstance(share.rows, slice):
            output.index_add_(0, share.rows, (inputs * scale) @ weight)
        elif inputs.shape[-1] <= output.shape[-1]:
            output[share.rows].view(-1, output.shape[-1]).addmm_((inputs * scale).flatten(0, -2), weight)
        else:
            output[share.rows].addcmul_(inputs @ weight, scale)

    def _add_factors(self, mix: _Mix, factors: _Factors, inputs: Tensor, output: Tensor) -> None:
        down, up = (factors.first.T, factors.second.T) if self.transposed else (factors.second, factors.first)
        hidden = inputs.flatten(0, -2) @ down
        hidden.view(mix.size, -1, hidden.shape[-1]).mul_(factors.scale(mix))
        output.view(-1, output.shape[-1]).addmm_(hidden, up)


class _Lookup(_Sum):
    """nn.Embedding, also with a leading dimension of 1 where all samples share their indices (positions)."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, _Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = changes["weight"]

    def add(self, mix: _Mix, inputs: Tensor, output: Tensor) -> Tensor:
        if inputs.dim() == 2 and len(inputs) == 1:
            inputs, output = inputs.expand(mix.size, -1), output.repeat(mix.size, 1, 1)
        self.check(mix, output, dimensions=3)
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

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, _Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = changes.get("weight")
        self.bias = _Stack(changes["bias"]) if "bias" in changes else None
        assert self.weight is None or self.weight.factors is None, f"{name}: low-rank task vector of a convolution"

    def add(self, mix: _Mix, inputs: Tensor, output: Tensor) -> Tensor:
        self.check(mix, inputs)
        if self.weight is not None:
            for share, vector in self.weight.shared(mix):
                scaled = inputs[share.rows] * _column(share.scale, inputs.dim())
                output[share.rows] += self.module._conv_forward(scaled, vector.dense(), None)
        if self.bias is not None:
            output += self.bias.per_sample(mix, 2)[..., None, None]
        return output


class _Norm(_Sum):
    """nn.LayerNorm and nn.RMSNorm: linear in their weight and bias."""

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, _Change]) -> None:
        super().__init__(name, module, changes)
        self.weight = _Stack(changes["weight"]) if "weight" in changes else None
        self.bias = _Stack(changes["bias"]) if "bias" in changes else None

    def add(self, mix: _Mix, inputs: Tensor, output: Tensor) -> Tensor:
        self.check(mix, inputs)
        if self.weight is not None:
            norm = F.layer_norm if isinstance(self.module, nn.LayerNorm) else F.rms_norm
            normed = norm(inputs, self.module.normalized_shape, eps=self.module.eps)
            output.addcmul_(normed, self.weight.per_sample(mix, output.dim()))
        if self.bias is not None:
            output += self.bias.per_sample(mix, output.dim())
        return output


class _Values(_Term):
    """Small parameters that broadcast against the samples: replaced by one value per sample, whatever the formula.

    These are the weights of transformers' RMSNorm classes, of shape (width,), and what embeddings hold themselves
    (class token, positions), of shape (1, …).
    """

    def __init__(self, name: str, module: nn.Module, changes: Mapping[str, _Change]) -> None:
        super().__init__(name, module, changes)
        self.own = {attribute: module._parameters[attribute] for attribute in changes}
        self.stacks = {attribute: _Stack(change) for attribute, change in changes.items()}

    def attach(self, mix: _Mix, stack: ExitStack) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs: Tensor = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            self.check(mix, inputs)
            for attribute, parameter in self.own.items():
                assert parameter is not None
                if parameter.dim() == 1:
                    values = self.stacks[attribute].per_sample(mix, inputs.dim())
                else:  # the leading 1 is the place of the samples
                    values = self.stacks[attribute].per_sample(mix, parameter.dim() + 1).squeeze(1)
                module._parameters[attribute] = parameter + values  # type: ignore[assignment]

        stack.callback(self.module._parameters.update, self.own)
        stack.enter_context(self.module.register_forward_pre_hook(hook, with_kwargs=True))


def _column(values: Tensor, dimensions: int) -> Tensor:
    """Return (samples,) as (samples, 1, …, 1)."""
    return values.view(-1, *[1] * (dimensions - 1))


_PRODUCTS: Mapping[type[nn.Module], type[_Term]] = {nn.Linear: _Matrix, Conv1D: _Matrix, nn.Conv2d: _Convolution}
# Tables of distances are looked up by pairs of positions, or read as a whole: not by sample.
_RELATIVE = re.compile(r"(^|[._])(rel|relative|distance)_")


def _kind(network: nn.Module, name: str, attribute: str) -> type[_Term] | None:
    """Return how a change to a parameter is computed per sample, None if not at all.

    Exact classes, because a subclass may compute something else.
    """
    module = network.get_submodule(name)
    parameter = module._parameters[attribute]
    assert parameter is not None
    cls = type(module)
    if cls in _PRODUCTS:
        # Modules with parameters of their own (Mamba's mixers, nn.MultiheadAttention) also read their children's
        # weights without calling the children, where no hook can see it.
        parent = _parent(network, name)
        hidden = any(True for _ in parent.parameters(recurse=False)) and not type(parent).__name__.endswith(
            "Embeddings"
        )
        return None if hidden else _PRODUCTS[cls]
    if cls is nn.Embedding or cls.__name__.endswith("ScaledWordEmbedding"):
        return None if _RELATIVE.search(name) else _Lookup
    if cls in (nn.LayerNorm, nn.RMSNorm):
        return _Norm
    if cls.__name__.endswith("RMSNorm") and parameter.dim() == 1:
        return _Values
    if cls.__name__.endswith("Embeddings") and parameter.dim() > 1 and len(parameter) == 1:
        return _Values
    return None


def _parent(network: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a module."""
    return network.get_submodule(name.rpartition(".")[0])
