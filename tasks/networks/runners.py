"""An expert's network run whole, block by block, or with its blocks on other workers: the same numbers each way."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from sensmerge.tasks.networks.blocks import (
    Batch,
    TrunkOutput,
    to_device,
    trunk_output,
    watch,
)
from sensmerge.tasks.networks.journeys import Check, Runner, Sensitivity
from sensmerge.tasks.networks.networks import trunk_of
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.products import GradientProducts
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.streaming import StreamedRunner


@contextmanager
def open_runner(source: Source, placement: Placement, scratch: Path) -> Iterator[Runner]:
    """Load a network, or have it loaded, and let go of it in the end.

    Args:
        source: where it comes from.
        placement: where it runs.
        scratch: folder of the step, on a disk: for hidden states, of which no file is left, and by its name nothing
            else runs at the same time.

    Raises:
        InputError: parameters are left without weights; a network whose blocks cannot be run apart.
    """
    if isinstance(placement, Actors):
        from sensmerge.tasks.networks.sharded import ShardedRunner

        with ShardedRunner.open(source, placement, str(scratch)) as runner:
            yield runner
    elif placement == "streamed":
        with ThreadPoolExecutor(1) as loader:
            yield StreamedRunner(source, scratch, loader)
    else:
        yield WholeRunner(source)


class WholeRunner(Runner):
    """Memory: the network, one tensor's gradient, and the activations of one sample."""

    def __init__(self, source: Source) -> None:
        """Load the network."""
        self._source = source
        self._network = source.network()
        self._products = GradientProducts()
        watch(self._products, source, self._network, "")

    def sensitivities(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Sensitivity]]:
        """See `Runner`."""
        for number, batch in enumerate(batches):
            loss = self._network(**to_device(batch, self._source.device)).loss
            value = float(loss.detach())
            check(number, value)
            loss.backward()
            yield number, Sensitivity(value, self._products.take())

    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """See `Runner`."""
        with torch.no_grad():
            for number, batch in enumerate(batches):
                output = trunk_of(self._network)(**to_device(batch, self._source.device))
                yield number, trunk_output(output)
