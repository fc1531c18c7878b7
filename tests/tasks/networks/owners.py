"""Networks whose blocks several own, as on actors, but in this process: real actors take seconds to begin."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sensmerge.tasks.networks.blocks import Batch, blocks_of
from sensmerge.tasks.networks.journeys import Check, Journey, Measured, PartsRunner, Runner
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.sharded import BlockOwner, Owned, shares
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.watching import Statistics, holds_totals


class OwnersHere(PartsRunner):
    """What `ShardedRunner` does, its actors being plain objects: what they get and give is pickled all the same."""

    def __init__(self, source: Source, count: int, scratch: Path, statistics: Statistics) -> None:
        network = source.hollow()
        self._parts = shares(0, [1] * len(blocks_of(network)), count)
        owned = [Owned(source, blocks, place == 0, statistics) for place, blocks in enumerate(self._parts)]
        self._owners, self._scratch, self._statistics = [BlockOwner(one, 1) for one in owned], scratch, statistics

    def run(self, batches: Sequence[Batch], check: Check) -> Iterator[tuple[int, Measured]]:
        """See `Runner`."""
        yield from super().run(batches, check)
        if holds_totals(self._statistics):
            for owner in self._owners:
                for name, content in owner.write(self._scratch, self._scratch / "unseen"):
                    (self._scratch / name).parent.mkdir(exist_ok=True)
                    (self._scratch / name).write_bytes(content)

    def _keep(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def _travel(self, journeys: Sequence[Journey[Any]]) -> Iterator[tuple[int, Any]]:
        for number, journey in enumerate(journeys):
            work = next(journey)
            try:
                while True:
                    owner = self._owners[max(work.place, 0)]
                    arguments = pickle.loads(pickle.dumps(work.arguments))
                    work = journey.send(owner.work(work.place < 0, work.method, arguments))
            except StopIteration as end:
                yield number, end.value


@pytest.fixture
def owners_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks on actors be run by `OwnersHere`."""

    @contextmanager
    def opened(
        source: Source, placement: Placement, scratch: Path, statistics: Statistics | None = None
    ) -> Iterator[Runner]:
        if isinstance(placement, Actors):
            yield OwnersHere(source, placement.count, scratch, statistics or {})
        else:
            with open_runner(source, placement, scratch, statistics) as runner:
                yield runner

    monkeypatch.setattr("sensmerge.tasks.stages.statistics.open_runner", opened)
    monkeypatch.setattr("sensmerge.tasks.stages.cross_task.open_runner", opened)
