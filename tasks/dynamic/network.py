"""A network with other weights for every sample of a batch: base + Σ coefficient · task vector.

What is linear in its weights is worked out for all samples in one forward pass (`tasks.dynamic.terms`). What is not is
written out, and samples run together that have it in common (`tasks.dynamic.materialised`).
"""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sensmerge.tasks.checkpoints.layers import block_names
from sensmerge.tasks.dynamic.materialised import Materialised
from sensmerge.tasks.dynamic.mix import Change, Mix
from sensmerge.tasks.dynamic.terms import Term, is_read, kind_of
from sensmerge.tasks.dynamic.vectors import LowRank, Vector
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import is_seq2seq, trunk_or_self
from sensmerge.tasks.networks.readers import random_pictures, read_by

ALIKE_TOKENS = 2048
"""From how many tokens on, with equal coefficients, weights are written out: well above what that itself costs."""


class DynamicNetwork:
    """A base's network and the task vectors of its experts.

    Attributes:
        network: the base's network, unchanged outside `mixed` and `alike`.
        blocks: number of its transformer blocks.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        vectors: Mapping[str, Mapping[int, Vector]],
        experts: int,
        written: Collection[str] = (),
    ) -> None:
        """Prepare the modules that some expert changes; nothing is moved or cast.

        Args:
            network: the base's network.
            vectors: parameter name (as in `named_parameters`, tied ones once) → index of the expert → its task vector,
                on the network's device and in its dtype.
            experts: number of experts, K.
            written: names of those that must be written out for each row of coefficients, among them all that
                `unlinear` finds; `tasks.dynamic.trial` finds the others.
        """
        self.network = network
        self._experts = experts
        self._mixing = False
        self._terms: list[Term] = []
        parameters = dict(network.named_parameters(remove_duplicate=False))
        vectors = {name: by_expert for name, by_expert in vectors.items() if by_expert}
        apart = {name: by_expert for name, by_expert in vectors.items() if name in written}
        self._materialised = Materialised(parameters, apart)
        self._all = Materialised(parameters, vectors)
        self._is_whole = not any(isinstance(one, LowRank) for by in vectors.values() for one in by.values())
        changes = {id(parameters[name]): Change.of(by) for name, by in vectors.items() if name not in apart}
        for name, module in network.named_modules():
            own = {
                attribute: changes[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if id(parameter) in changes and kind_of(network, name, attribute)
            }
            if own:
                (kind,) = {kind_of(network, name, attribute) for attribute in own}
                assert kind is not None
                self._terms.append(kind(name, module, own))
        self._trunk = probed_trunk(network)
        self._blocks: list[nn.Module] = [self._trunk.get_submodule(name) for name in trunk_blocks(network)]
        self.blocks = len(self._blocks)

    def together(self, coefficients: Tensor) -> list[list[int]]:
        """Return the samples of a batch, (B, K), in groups that `mixed` can answer at once: all, in most networks."""
        return self._materialised.together(coefficients)

    @contextmanager
    def mixed(self, coefficients: Tensor) -> Iterator[PreTrainedModel]:
        """Inside the block, the network answers sample b by the weights base + Σₖ coefficients[b, k] · task vector k.

        Args:
            coefficients: (B, K) float, of samples that are one group of `together`; B is the batch size of all calls
                inside the block, of `generate` too.

        Raises:
            InputError: inside the block, a module gets other inputs than one per sample.
        """
        assert coefficients.dim() == 2, f"coefficients have shape {tuple(coefficients.shape)}"
        assert coefficients.shape[1] == self._experts, f"{coefficients.shape[1]} coefficients, {self._experts} experts"
        assert not self._mixing, "mixed within mixed would add both"
        assert len(self.together(coefficients)) == 1, "mixed answers one group of samples at a time"
        mix = Mix.of(coefficients, self.network)
        with ExitStack() as stack:
            self._mixing = True
            stack.callback(setattr, self, "_mixing", False)
            stack.enter_context(self._materialised.written(coefficients[0]))
            taken = [term for term in self._terms if not term.experts.isdisjoint(mix.shares)]
            for module in self._readers() if taken else ():
                stack.enter_context(module.register_forward_pre_hook(_measure(mix), with_kwargs=True))
            for term in taken:
                term.attach(mix, stack)
            yield self.network

    def _readers(self) -> set[nn.Module]:
        """Return the modules that are given tokens, each of which may be given as many as it likes."""
        decoder = {self.network.get_decoder()} if is_seq2seq(self.network) else set()
        return {self.network, trunk_or_self(self.network), self._trunk} | decoder

    def writes_out(self, tokens: int) -> bool:
        """Return whether so many tokens, of samples with equal coefficients, are answered sooner within `alike`.

        Low-rank task vectors add little to what the base's weights cost, and are never written out for speed.
        """
        return self._is_whole and tokens >= ALIKE_TOKENS

    @contextmanager
    def alike(self, row: Tensor) -> Iterator[PreTrainedModel]:
        """Inside the block, the network answers all samples by base + Σₖ row[k] · task vector k, whatever their number.

        The weights are written out: then a sample costs what it costs the plain network. Memory: what experts change,
        once more.

        Args:
            row: (K,) float.
        """
        assert not self._mixing, "alike within mixed would add both"
        with ExitStack() as stack:
            self._mixing = True
            stack.callback(setattr, self, "_mixing", False)
            stack.enter_context(self._all.written(row))
            yield self.network

    def hidden_states(
        self, inputs: Mapping[str, Tensor], coefficients: Tensor, layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return what comes out of some of the transformer blocks; those after the last one asked for do not run.

        Args:
            inputs: of what is probed (`probed_trunk`), for B samples.
            coefficients: (B, K) float, as in `mixed`.
            layers: numbers of blocks, the first is 1.

        Returns:
            layer → (B, T, width).

        Raises:
            InputError: the network has no such block, or what `mixed` raises.
        """
        groups = self.together(coefficients)
        if len(groups) == 1:
            with self.mixed(coefficients):
                return self.states(inputs, layers)
        found = {layer: [torch.empty(0)] * len(coefficients) for layer in layers}
        for rows in groups:
            part = {name: values[rows] for name, values in inputs.items()}
            with self.mixed(coefficients[rows]):
                states = self.states(part, layers)
            for layer, some in states.items():
                for row, one in zip(rows, some, strict=True):
                    found[layer][row] = one
        return {layer: torch.stack(some) for layer, some in found.items()}

    def width(self, layer: int) -> int:
        """Return how wide the hidden states behind a block are."""
        config = self.network.config
        if read_by(self.network) == "texts":
            return int(config.get_text_config().hidden_size)
        with torch.inference_mode():  # from stage to stage, networks of pictures grow wider
            pictures = random_pictures(config, 1, torch.Generator().manual_seed(0))
            inputs = {name: one.to(self.network.device, self.network.dtype) for name, one in pictures.items()}
            return int(self.states(inputs, [layer])[layer].shape[-1])

    def states(self, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
        """Return `hidden_states` by the weights that the network has: within `mixed` or `alike`, those."""
        assert layers, "no layers"
        for layer in layers:
            if not 1 <= layer <= self.blocks:
                raise InputError(f"layer is {layer}; the model has {self.blocks} blocks, 1 to {self.blocks}")
        found: dict[int, Tensor] = {}
        # Gemma 3n's blocks hand on several versions of the hidden states, in the first dimension.
        several = hasattr(self.network.config.get_text_config(), "altup_num_inputs")

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, args: object, output: Any) -> None:
                states = output if isinstance(output, Tensor) else output[0]
                if several:
                    states = states[0]
                # Of several streams, one behind the other; of convolutions (B, width, height, length), by places.
                by_place = states.dim() == 4 and read_by(self.network) == "pictures"
                found[layer] = states.flatten(2).mT if by_place else states.flatten(2)
                if layer == max(layers):
                    raise _LastBlockRan

            return hook

        trunk: Any = self._trunk
        options = {"use_cache": False} if "use_cache" in inspect.signature(trunk.forward).parameters else {}
        with ExitStack() as stack:
            for layer in set(layers):
                stack.enter_context(self._blocks[layer - 1].register_forward_hook(keep(layer)))
            with suppress(_LastBlockRan):
                trunk(**inputs, **options)
        return {layer: found[layer] for layer in layers}


def probed_trunk(network: PreTrainedModel) -> nn.Module:
    """Return the part of a network that is probed: its trunk, or the encoder of an encoder-decoder that writes."""
    trunk: nn.Module = network.get_encoder() if is_seq2seq(network) else trunk_or_self(network)
    return trunk


def trunk_blocks(network: PreTrainedModel) -> list[str]:
    """Return the names, below what is probed, of the transformer blocks that text goes through, in order.

    Where a network has several towers, those of images and sound lie deeper in it, or beside the module that has the
    text's embedding.
    """
    trunk = probed_trunk(network)
    blocks = block_names(name for name, _ in trunk.named_parameters())
    names = [name for name in blocks if any(True for _ in trunk.get_submodule(name).children())]
    if read_by(network) == "pictures":  # of one tower, whose patches need not be called an embedding
        return names
    embedding = network.get_input_embeddings()
    place = next((name for name, module in trunk.named_modules() if module is embedding), "")
    while place:
        place = place.rpartition(".")[0]
        inside = [name for name in names if not place or name.startswith(f"{place}.")]
        if inside:
            least = min(name.count(".") for name in inside)
            return [name for name in inside if name.count(".") == least]
    return names


def unlinear(network: nn.Module, changed: Collection[str]) -> set[str]:
    """Return the names of the parameters, of those that some expert changes, that have no linear form here.

    A parameter may have several places: it is enough that one is in a module that is known. What the others do with
    it, if anything, a trial finds.

    Args:
        network: it may lie on the meta device.
        changed: their names.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    names = {id(parameters[name]): name for name in changed}
    known: set[str] = set()
    read: set[str] = set()
    for name, module in network.named_modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in names:
                if kind_of(network, name, attribute):
                    known.add(names[id(parameter)])
                if is_read(network, name):
                    read.add(names[id(parameter)])
    return (set(changed) - known) | read


def _measure(mix: Mix) -> Any:
    """Return a hook that tells a mix how many tokens the samples of a forward pass have."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for tokens in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
            if isinstance(tokens, Tensor) and tokens.dim() < 4:  # of pictures, that is not told by their shape
                mix.length = tokens.shape[1]
                return

    return hook


class _LastBlockRan(Exception):
    """The last block asked for has run."""
