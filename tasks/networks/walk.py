"""A walk through the blocks of a merged model and of its experts, side by side, each task's samples in both.

At a block, the merged model's weights are solved from what both give its layers (`tasks.methods.kernels.features`);
then the merged model's samples go on through the new block. Hidden states lie in files between two blocks. Memory: of
each task under way, the block twice and the sums of its layers' inputs; beside them those of all tasks together, and
what networks give their blocks beside hidden states, of all samples.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sensmerge.tasks.features import FeatureCalibration
from sensmerge.tasks.networks.blocks import Batch, Entry, Shell, blocks_of, to_device
from sensmerge.tasks.networks.calls import Calls, Learned
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.paired import BlockFit, Comparison, LayerTensors, Matter, SeenBlock, layers_of
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.states import StatesWriter, are_written, read_states

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class MergedSource(Source):
    """An expert's network with the weights of a merged model, but for the head that is the expert's own."""

    own: Source
    """of the expert's network as it is"""
    merged: Path
    """folder of the merged model's weights"""

    @classmethod
    def of(cls, own: Source, merged: Path) -> "MergedSource":
        """Return the network of an expert with the weights in a folder."""
        return cls(**{name: getattr(own, name) for name in Source.__dataclass_fields__}, own=own, merged=merged)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The merged model's headers."""
        return open_checkpoint(self.merged)

    @cached_property
    def expert(self) -> Expert:
        """The expert's headers."""
        return self.own.expert

    @cached_property
    def _tensors(self) -> Mapping[str, Sequence[str]]:
        return self.own._tensors

    def _tensor(self, name: str) -> Tensor:
        return self.checkpoint.read(name)


@dataclass
class Traveller:
    """The samples of one task, on their way through the merged model and the task's expert."""

    name: str
    """of the task"""
    expert: Source
    batches: Sequence[Batch]
    ends_in_head: bool
    """whether the network ends in a head that may read one token only"""
    hollow: Mapping[str, nn.Module] = field(init=False)
    """the blocks of the task's network by name, without weights"""
    _mine: Sequence[Entry] = field(init=False)
    """of each sample, what the blocks of the merged model are given beside hidden states"""
    _others: Sequence[Entry] = field(init=False)
    """likewise the expert's"""
    _read: Sequence[Tensor] = field(init=False)
    """of each sample, which hidden states behind the blocks the head reads, (B, T); empty if it reads several"""

    def __post_init__(self) -> None:
        """Lay the network out, here and not later: it cannot be done in several threads at once."""
        self.hollow = blocks_of(self.expert.hollow())

    def enter(self, merged: Path, folder: Path | None) -> None:
        """Go to where the blocks begin.

        Args:
            merged: folder of the merged model.
            folder: where to write the hidden states; None where they are written.

        Raises:
            InputError: the network cannot be run in parts.
        """
        self._mine, _ = _enter(self.student(merged), self.batches, folder and self._path(folder, "merged"))
        expert = folder and self._path(folder, "expert")
        self._others, self._read = _enter(self.expert, self.batches, expert, self.ends_in_head)

    def student(self, merged: Path) -> MergedSource:
        """Return the merged model, from a folder of its weights, with what this task's network has beside them."""
        return MergedSource.of(self.expert, merged)

    def is_entered(self, folder: Path) -> bool:
        """Return whether a folder has hidden states of all samples."""
        return all(are_written(self._path(folder, which)) for which in ("merged", "expert"))

    def layers(self, place: int) -> dict[str, LayerTensors]:
        """Return the layers of a block that can be solved, by their names in the block."""
        return layers_of(self.expert, *self._block(place))

    def tensors(self, place: int) -> list[str]:
        """Return the tensors of the base's checkpoint that are in a block."""
        name, block = self._block(place)
        several = (self.expert.tensors(f"{name}.{inner}") for inner in block.state_dict())
        return list(dict.fromkeys(one for tensors in several for one in tensors))

    def measure(self, place: int, merged: Path, folders: Sequence[Path], alpha: float) -> BlockFit:
        """Run a block of both networks on all samples, and return what solves the merged model's.

        Args:
            place: number of the block.
            merged: folder of the merged model, whose block is not solved yet.
            folders: of the hidden states before the block, and behind it; there the expert's are written.
            alpha: see `Comparison`.
        """
        layers, device = self.layers(place), self.expert.device
        student = SeenBlock(self.student(merged), *self._block(place), layers)
        teacher = SeenBlock(self.expert, *self._block(place), layers)
        comparison = Comparison(layers, student, alpha)
        read = self._read if place == len(self.hollow) - 1 else ()
        before = [read_states(self._path(folders[0], which), device) for which in ("merged", "expert")]
        with torch.no_grad(), StatesWriter(self._path(folders[1], "expert")) as writer:
            for number, (mine, others) in enumerate(zip(*before, strict=True)):
                student.run(mine, *self._beside(self._mine[number], place))
                beside = self._beside(self._others[number], place)
                matter: Matter | None = None
                if read:
                    behind, matter = teacher.run_for(read[number], others, *beside)
                else:
                    behind = teacher.run(others, *beside)
                comparison.add(teacher, matter)
                writer.append(behind)
            return comparison.fit(self.expert.expert, device)

    def advance(self, place: int, merged: Path, folders: Sequence[Path]) -> None:
        """Have the merged model's samples go through a block that has been solved.

        Args:
            place: number of the block.
            merged: folder of the weights, those of the block solved.
            folders: as in `measure`.
        """
        block = SeenBlock(self.student(merged), *self._block(place), ())
        states = read_states(self._path(folders[0], "merged"), self.expert.device)
        with torch.no_grad(), StatesWriter(self._path(folders[1], "merged")) as writer:
            for number, mine in enumerate(states):
                writer.append(block.run(mine, *self._beside(self._mine[number], place)))

    def _block(self, place: int) -> tuple[str, nn.Module]:
        return list(self.hollow.items())[place]

    def _beside(self, entry: Entry, place: int) -> tuple[Calls, Learned]:
        calls, learned = to_device((entry.calls[place], list(entry.learned)), self.expert.device)
        return calls, learned

    def _path(self, folder: Path, which: str) -> Path:
        return folder / f"{self.name}-{which}.bin"


def _enter(
    source: Source, batches: Sequence[Batch], path: Path | None, is_read: bool = False
) -> tuple[list[Entry], list[Tensor]]:
    """Return what the blocks are given beside hidden states, and, if asked, which states behind them the head reads."""
    network = source.hollow()
    shell = Shell(source, network, blocks_of(network), {})
    entries, read = [], []
    with nullcontext() if path is None else StatesWriter(path) as writer:
        for batch in batches:
            entry = shell.enter(batch)
            if is_read:
                # Which ones they are does not depend on the values: those on which the loss has a gradient.
                read.append(shell.loss(batch, entry.hidden)[1].ne(0).any(-1))
            if writer is not None:
                writer.append(entry.hidden)
            entries.append(entry._replace(hidden=torch.empty(0)))
    del network, shell
    gc.collect()  # a shell and its proxies know each other
    # A head that reads several tokens of a sample, or is dead on one, has all count alike.
    return entries, read if all(bool((one.sum(-1) == 1).all()) for one in read) else []


@dataclass(frozen=True)
class Walk:
    """The samples of all tasks on their way through a merged model and its experts."""

    travellers: Sequence[Traveller]
    settings: FeatureCalibration
    workers: int
    """how many tasks may be under way at once; it changes no result"""

    def enter(self, merged: Path, folder: Path | None) -> None:
        """Have all samples go to where the blocks begin; arguments as in `Traveller.enter`."""
        for one in self.travellers:  # one after the other, see there
            one.enter(merged, folder)

    def are_before(self, folder: Path) -> bool:
        """Return whether a folder has the hidden states of all samples."""
        return all(one.is_entered(folder) for one in self.travellers)

    @property
    def blocks(self) -> int:
        """How many blocks the networks have."""
        return len(self.travellers[0].hollow)

    def tensors(self, place: int) -> list[str]:
        """Return the tensors of the base's checkpoint that are in a block."""
        return self.travellers[0].tensors(place)

    def solve(self, place: int, merged: Path, folders: Sequence[Path]) -> dict[str, Tensor]:
        """Return what the tensors of a block become, float64, but for those that cannot be solved.

        Args:
            place: number of the block.
            merged: folder of the merged model, whose block is not solved yet.
            folders: of the hidden states before the block, and behind it; there the experts' are written.
        """
        total = BlockFit()
        # In the tasks' order, so that sums do not depend on which of them is done first.
        for fit in self._each(lambda one: one.measure(place, merged, folders, self.settings.alpha)):
            total += fit
        layers, source = self.travellers[0].layers(place), self.travellers[0].student(merged)
        anchors = {name: self._anchor(layer, source) for name, layer in layers.items()}
        found: dict[str, Tensor] = {}
        for name, (weight, *bias) in total.solve(anchors, self.settings.ridge).items():
            values = [weight.T if layers[name].is_transposed else weight, *bias]
            found |= dict(zip(layers[name].names(), values, strict=True))
        return found

    def _anchor(self, layer: LayerTensors, source: MergedSource) -> tuple[Tensor, Tensor | None]:
        """Return what the parameters of a layer are held to: base + ρ · (merged − base)."""
        weight, bias = layer.read(source.checkpoint, source.device)
        base, base_bias = layer.read(source.expert.base, source.device)
        rho = self.settings.rho
        held = None if bias is None or base_bias is None else torch.lerp(base_bias, bias, rho)
        return torch.lerp(base, weight, rho), held

    def advance(self, place: int, merged: Path, folders: Sequence[Path]) -> None:
        """Have all samples go through a block of the merged model that is solved; see `Traveller.advance`."""
        list(self._each(lambda one: one.advance(place, merged, folders)))

    def _each(self, do: Callable[[Traveller], Result]) -> Iterator[Result]:
        """Yield what comes of each task, in their order, several at once."""
        if self.workers == 1:
            yield from map(do, self.travellers)
            return
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(do, self.travellers)
