"""An expert's network run whole, block by block, or with its blocks on other workers: the same numbers each way."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from sensmerge.tasks.networks.blocks import Batch, TrunkOutput, loss_of, to_device, trunk_output
from sensmerge.tasks.networks.journeys import Check, Measured, Runner
from sensmerge.tasks.networks.networks import run_trunk
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.streaming import StreamedRunner, start_anew
from sensmerge.tasks.networks.watching import Statistics, Watch, needs_gradients
from sensmerge.tasks.statistics.statistic import Statistic


@contextmanager
def open_runner(
    source: Source, placement: Placement, scratch: Path, statistics: Mapping[str, Statistic] | None = None
) -> Iterator[Runner]:
    """Load a network, or have it loaded, and let go of it in the end.

    Args:
        source: where it comes from.
        placement: where it runs.
        scratch: folder of the step, on a disk: for the totals of statistics by tensor, and for hidden states, of which
            no file is left; by its name nothing else runs at the same time. What an earlier try has left there is
            gone on with if it can be (`StreamedRunner`), or else removed.
        statistics: what sees its samples, by name.

    Raises:
        InputError: parameters are left without weights; a network whose blocks cannot be run apart.
    """
    statistics = statistics or {}
    if placement != "streamed" and statistics:
        start_anew(scratch, statistics)
    if isinstance(placement, Actors):
        from sensmerge.tasks.networks.sharded import ShardedRunner

        with ShardedRunner.open(source, placement, scratch, statistics) as runner:
            yield runner
    elif placement == "streamed":
        with ThreadPoolExecutor(1) as loader:
            yield StreamedRunner(source, scratch, loader, statistics)
    else:
        yield WholeRunner(source, scratch, statistics)


class WholeRunner(Runner):
    """Memory: the network, one tensor's gradient, the activations of one sample, and totals by tensor."""

    def __init__(self, source: Source, scratch: Path, statistics: Statistics) -> None:
        """Load the network; see `open_runner`."""
        self._source, self._scratch = source, scratch
        self._network = source.network()
        self._watch = Watch(statistics, source, self._network)
        self._backward = needs_gradients(statistics)

    def run(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """See `Runner`."""
        for number, batch in enumerate(batches):
            with self._watch.inputs(), torch.set_grad_enabled(self._backward):
                output = self._network(**to_device(batch, self._source.device))
            loss = loss_of(output)
            if loss is not None:
                check(number, loss)
            if self._backward:
                output.loss.backward()
            yield number, Measured(loss, self._watch.take())
        self._watch.write(self._scratch, "network")

    def trunk_outputs(self, batches: Sequence[Batch]) -> Iterator[tuple[int, TrunkOutput]]:
        """See `Runner`."""
        with torch.no_grad():
            for number, batch in enumerate(batches):
                output = run_trunk(self._network, **to_device(batch, self._source.device))
                yield number, trunk_output(output)
