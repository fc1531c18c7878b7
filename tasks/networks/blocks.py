"""A network in parts: some of its blocks, and the shell of all that is outside the blocks.

In the shell the network's own code runs, with proxies in the places of the blocks. So masks, positions and whatever
else blocks are given come from that code, and blocks do exactly what they do in the whole network.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from sensmerge.tasks.checkpoints.layers import block_names
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.calls import Call, Calls, Learned, Slot, run_block
from sensmerge.tasks.networks.networks import run_trunk
from sensmerge.tasks.networks.proxies import ANSWERS, BESIDE, AcrossBlocks, Proxy, Stop
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.watching import Statistics, Sums, Watch, added

Batch = Mapping[str, Tensor]
"""Inputs of a network for one sample, as `calibration_batch` gives them, or for B of one length."""


class Entry(NamedTuple):
    """What goes into the blocks."""

    hidden: Tensor
    """before the first block, (B, T, width)"""
    calls: list[Calls]
    """of each block, with a `Slot` in the place of what is learned"""
    learned: Learned


TrunkOutput = dict[str, Tensor]
"""`hidden`, (B, T, width), and `pooled`, (B, width), where the trunk has a pooler."""


def blocks_of(network: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the blocks of a network by name: the largest list of numbered modules in its decoder.

    Of several lists, those count that hold modules of the kinds that transformers never splits, if it names any. An
    encoder beside the decoder counts as outside; so does the decoder's first block where it has a parameter that the
    others lack, as it then makes something for them all (T5: what is learned of relative positions).

    Raises:
        InputError: there is no such list, or blocks share weights with others or with what is outside.
    """
    decoder = network.get_decoder()
    inside = next(name for name, module in network.named_modules() if module is decoder)
    lists: dict[str, dict[str, nn.Module]] = {}
    for name in block_names(name for name, _ in network.named_parameters()):
        lists.setdefault(name.rpartition(".")[0], {})[name] = network.get_submodule(name)
    # What some networks call their decoder is the last matrix of their head.
    lists = {name: one for name, one in lists.items() if name.startswith(inside)} or lists
    kinds = network._no_split_modules or ()
    named = [one for one in lists.values() if any(type(module).__name__ in kinds for module in one.values())]
    chosen = max(named or lists.values(), key=_size, default={})
    owners: dict[int, set[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(next((one for one in chosen if name.startswith(f"{one}.")), ""))
    if not chosen or any(len(one) > 1 for one in owners.values()):
        why = "blocks that share no weights" if chosen else "numbered blocks"
        raise InputError(
            f"{type(network).__name__} has no {why}, so it cannot be run in parts; set placement: whole, or use other "
            "coefficients than sens"
        )
    return dict(list(chosen.items())[_leading(network, chosen) :])


def _leading(network: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> int:
    """Return how many of the first blocks belong to the shell, as they make something for all others: 1 or none."""
    first, *others = ({name for name, _ in block.named_parameters()} for block in blocks.values())
    return int(bool(network.config.is_encoder_decoder and others and all(one < first for one in others)))


def _size(blocks: Mapping[str, nn.Module]) -> int:
    return sum(one.numel() for block in blocks.values() for one in block.parameters())


class Part:
    """Some consecutive blocks with their weights."""

    def __init__(
        self, source: Source, blocks: Mapping[str, nn.Module], statistics: Statistics, copied: bool = True
    ) -> None:
        """Load blocks.

        Args:
            source: where the weights are.
            blocks: hollow blocks by name, in order; they are left hollow.
            statistics: what is added up over samples.
            copied: see `Source.load`.

        Raises:
            InputError: parameters are left without weights.
        """
        self._device = source.device
        self._blocks: list[nn.Module] = []
        self._watches: dict[str, Watch] = {}
        for name, hollow in blocks.items():
            block = copy.deepcopy(hollow)
            source.load(block, f"{name}.", copied=copied)
            self._watches[name] = Watch(statistics, source, block, f"{name}.")
            self._blocks.append(block)

    def forward(self, hidden: Tensor, calls: Sequence[Calls], learned: Learned) -> tuple[Tensor, Sums]:
        """Run the blocks, whose inputs are seen.

        Args:
            hidden: hidden states before the blocks.
            calls: of each block, from `Shell.enter`.
            learned: from there too.

        Returns:
            The hidden states behind the blocks, (B, T, width), and what the sample adds to statistics by layer.
        """
        with torch.no_grad(), ExitStack() as stack:
            for watch in self._watches.values():
                stack.enter_context(watch.inputs())
            output = self._run(hidden.to(self._device), calls, to_device(learned, self._device))
        return output, self._take()

    def backward(
        self, hidden: Tensor, calls: Sequence[Calls], learned: Learned, gradient: Tensor
    ) -> tuple[Tensor, Sums, Learned]:
        """Run the blocks again and then backward.

        Args:
            hidden: hidden states before the blocks, (B, T, width).
            calls: as in `forward`.
            learned: as in `forward`.
            gradient: ∂L/∂ hidden states behind them.

        Returns:
            ∂L/∂hidden, what the sample adds to statistics by layer, and the gradients of what is learned by way of
            these blocks.
        """
        leaf, *leaves = (tensor.detach().requires_grad_() for tensor in to_device([hidden, *learned], self._device))
        with torch.enable_grad():
            output = self._run(leaf, calls, leaves)
        torch.autograd.backward(output, gradient.to(self._device))
        assert leaf.grad is not None
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in leaves]
        return leaf.grad, self._take(), grads

    def _take(self) -> Sums:
        sums: Sums = {}
        for watch in self._watches.values():
            sums = added(sums, watch.take())
        return sums

    def write(self, folder: Path) -> None:
        """Write the totals of statistics by tensor, a file for each block, and let go of them."""
        for name, watch in self._watches.items():
            watch.write(folder, name)

    def _run(self, hidden: Tensor, calls: Sequence[Calls], learned: Learned) -> Tensor:
        for block, several in zip(self._blocks, to_device(calls, self._device), strict=True):
            hidden = run_block(block, hidden, several, learned)
        return hidden


class Shell:
    """The network without its blocks: embedding, final norm, head."""

    def __init__(
        self,
        source: Source,
        network: PreTrainedModel,
        blocks: Mapping[str, nn.Module],
        statistics: Statistics,
        copied: bool = True,
    ) -> None:
        """Load all that is outside the blocks.

        Args:
            source: where the weights are.
            network: hollow; it becomes the shell.
            blocks: all its blocks by name.
            statistics: what is added up over samples.
            copied: see `Source.load`.

        Raises:
            InputError: parameters are left without weights.
        """
        self.network = network
        self._source = source
        self._visit: Callable[[int, Tensor, Call], Tensor]
        self._answer: Callable[[Tensor], Any] | None = None
        self._made: tuple[Any, ...] = ()
        self._visits = 0
        before = _block_before(next(iter(blocks)))
        if before is not None:
            network.get_submodule(before).register_forward_hook(self._keep_made)
        for index, (name, block) in enumerate(blocks.items()):
            network.set_submodule(name, Proxy(self.visit, index, block))
        source.load(network, "", copied=copied)
        network.tie_weights()
        self._blocks = len(blocks)
        self._watch = Watch(statistics, source, network)

    def _keep_made(self, module: nn.Module, args: object, output: Any) -> None:
        """Keep what the first block makes for all others, which hand on what they are given of it."""
        self._made = () if isinstance(output, Tensor) else tuple(output[1:])

    def enter(self, batch: Batch) -> Entry:
        """Return the hidden states before the first block, and what each block is given beside them.

        Raises:
            InputError: the network does more than hand the output of each block to the next.
        """
        self._learn(batch)
        entry = self._enter(batch)
        if entry is None:  # of another length than the first sample, say
            raise self._refusal("")
        return entry

    def _learn(self, batch: Batch) -> None:
        """Find out in which form the network expects what its blocks give, and how often it calls them."""
        if self._answer is not None:
            return
        reasons = []
        for self._answer in ANSWERS:
            try:
                entry = self._enter(batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # what a network makes of the wrong form may be anything
                reasons.append(" ".join(str(error).split()))
                continue
            if entry is not None:
                self._visits = sum(len(several) for several in entry.calls)
                return
        self._answer = None
        raise self._refusal(f" ({reasons[0][:200]})" if len(reasons) == len(ANSWERS) else "")

    def _refusal(self, reason: str) -> InputError:
        return InputError(
            f"{self._source.base}: {type(self.network).__name__} does more than hand the output of each block to the "
            f"next{reason}, so it cannot be run in parts; set placement: whole, or use other coefficients than sens"
        )

    def _enter(self, batch: Batch) -> Entry | None:
        first: list[Tensor] = []
        calls: list[list[Call]] = []
        astray = False

        def visit(index: int, hidden: Tensor, call: Call) -> Tensor:
            nonlocal astray
            if index not in (len(calls) - 1, len(calls)) or (first and hidden is not first[0]):
                astray = True
                raise Stop
            if index == len(calls):
                calls.append([])
            first.append(hidden)
            calls[index].append(call)
            if len(first) == self._visits:
                raise Stop
            return hidden

        with torch.enable_grad():
            self._run(self.network, batch, visit)
        if astray or len(calls) < self._blocks or any(leaf is BESIDE for leaf in tree_leaves(calls)):
            return None
        learned = _learned(calls)
        slots = {id(tensor): Slot(index) for index, tensor in enumerate(learned)}
        placed = tree_map(lambda leaf: slots.get(id(leaf), leaf), calls)
        return Entry(first[0].detach(), placed, [tensor.detach() for tensor in learned])

    def loss(self, batch: Batch, hidden: Tensor) -> tuple[float, Tensor, Sums]:
        """Run the shell, whose inputs are seen.

        Args:
            batch: the sample.
            hidden: hidden states behind the last block.

        Returns:
            The loss, ∂loss/∂hidden, and what the sample adds to statistics by layer.
        """
        leaf = hidden.to(self._source.device).detach().requires_grad_()
        with torch.enable_grad(), self._watch.inputs():
            output = self._forward(self.network, batch, self._replay(lambda _: leaf))
        # Of the hidden states alone: parameters have their turn in `backward`, where tied ones see all their uses.
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        return float(output.loss.detach()), gradient, self._watch.take()

    def end(self, batch: Batch, hidden: Tensor) -> tuple[float | None, Sums]:
        """Do what `loss` does where there is no way back: the loss is None for a sample without labels."""
        hidden = hidden.to(self._source.device)
        with torch.no_grad(), self._watch.inputs():
            output = self._forward(self.network, batch, self._replay(lambda _: hidden))
        return loss_of(output), self._watch.take()

    def backward(self, batch: Batch, hidden: Tensor, gradient: Tensor, gradients: Learned) -> Sums:
        """Run the shell and then backward, and return what the sample adds to statistics by layer.

        Args:
            batch: the sample.
            hidden: hidden states behind the last block.
            gradient: ∂L/∂ hidden states before the first block.
            gradients: ∂L/∂ what is learned, by way of all blocks.
        """
        device = self._source.device
        across: Callable[..., Tensor] = AcrossBlocks.apply
        replay = self._replay(lambda entered: across(entered, hidden.to(device), gradient.to(device)))
        calls: list[Call] = []

        def visit(index: int, entered: Tensor, call: Call) -> Tensor:
            calls.append(call)
            return replay(index, entered, call)

        with torch.enable_grad():
            output = self._forward(self.network, batch, visit)
        roots = [output.loss, *_learned(calls)]
        torch.autograd.backward(roots, [torch.ones_like(output.loss), *to_device(gradients, device)])
        return self._watch.take()

    def write(self, folder: Path) -> None:
        """Write the totals of statistics by tensor, and let go of them."""
        self._watch.write(folder, "shell")

    def trunk(self, batch: Batch, hidden: Tensor) -> TrunkOutput:
        """Return what the trunk hands to the head, from the hidden states behind the last block."""
        hidden = hidden.to(self._source.device)
        with torch.no_grad():
            trunk = partial(run_trunk, self.network)
            return trunk_output(self._forward(trunk, batch, self._replay(lambda _: hidden)))

    def _replay(self, output: Callable[[Tensor], Tensor]) -> Callable[[int, Tensor, Call], Tensor]:
        return lambda index, hidden, _: output(hidden) if index == self._blocks - 1 else hidden

    def _forward(self, network: Callable[..., Any], batch: Batch, visit: Callable[[int, Tensor, Call], Tensor]) -> Any:
        self._learn(batch)
        return self._run(network, batch, visit)

    def _run(self, network: Callable[..., Any], batch: Batch, visit: Callable[[int, Tensor, Call], Tensor]) -> Any:
        self._visit = visit
        try:
            with suppress(Stop):
                return network(**to_device(batch, self._source.device))
        finally:
            self._made = ()  # with it goes what led to it

    def visit(self, index: int, hidden: Tensor, call: Call) -> Any:
        """Stand in for a block: called by its proxy."""
        assert self._answer is not None
        output = self._visit(index, hidden, call)
        return (output, *self._made) if self._made else self._answer(output)


def _block_before(name: str) -> str | None:
    """Return the name of the block before one; None where that is the first."""
    blocks, _, number = name.rpartition(".")
    return f"{blocks}.{int(number) - 1}" if int(number) else None


def loss_of(output: Any) -> float | None:
    """Return the loss in the output of a network; None for a sample without labels."""
    return None if output.loss is None else float(output.loss.detach())


def trunk_output(output: Any) -> TrunkOutput:
    """Return what a head may take of the output of transformers' trunks."""
    kept = {"hidden": output.last_hidden_state, "pooled": getattr(output, "pooler_output", None)}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


def _learned(calls: Any) -> list[Tensor]:
    """Return the tensors in some calls that have a gradient, each once."""
    found = {id(leaf): leaf for leaf in tree_leaves(calls) if isinstance(leaf, Tensor) and leaf.requires_grad}
    return list(found.values())


def to_device(values: Any, device: str) -> Any:
    """Return lists, tuples, mappings and tensors in each other with all tensors on a device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)
