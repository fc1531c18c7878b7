"""Which pieces of steps are submitted when."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from sensmerge.pipeline.execute.begun import begun, forget, say_begun
from sensmerge.pipeline.execute.cluster import cluster
from sensmerge.pipeline.execute.pieces import Around, Piece, Pieces
from sensmerge.pipeline.execute.worker import Done, Spent
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.stages.job import Job

pytestmark = pytest.mark.ray

SHORT: dict[Piece, str] = {Around.CHECK: "?", Around.FINISH: "."}


@dataclass(frozen=True)
class InParts(Job):
    """Has some parts, which are not run here."""

    stage = "merge"
    version = 1
    count: int

    def parts(self) -> list[int]:
        """See `Job`."""
        return list(range(self.count))

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        raise AssertionError


def step(name: str, count: int, *needs: str) -> Step:
    job = InParts(count)
    return Step(name, Key.of(name, job), tuple(f"merge {need}" for need in needs), job)


@pytest.mark.parametrize(
    ("limit", "rounds"),
    [
        # The step that needs another comes first in the plan; it is begun last, and then goes before the third.
        (9, ["a0 a1 c0 c1 c2", "a. c.", "b?", "b0", "b.", ""]),
        (2, ["a0 a1", "a. c0", "b? c1", "b0 c2", "b. c.", ""]),
    ],
)
def test_in_the_plans_order_and_no_more_than_the_limit(
    limit: int, rounds: list[str], tmp_path: Path, ray_address: str
) -> None:
    steps = [step("b", 1, "a", "cached"), step("a", 2), step("c", 3)]
    found = []
    with cluster(ray_address):
        pieces = Pieces(steps, Store(tmp_path), {"merge": limit})
        while True:
            taken = list(pieces.take())
            found.append(" ".join(f"{state.step.name}{SHORT.get(piece, piece)}" for state, _, piece in taken))
            if not taken:
                break
            for one in taken:
                pieces.piece_done(*one, Done({}, Spent()))
    assert found == rounds
    assert not pieces.is_active()


def test_a_step_says_how_far_it_is_once_a_worker_has_begun_it(tmp_path: Path, ray_address: str) -> None:
    with cluster(ray_address):
        pieces = Pieces([step("a", 3), step("b", 0), step("c", 0)], Store(tmp_path), {"merge": 9})
        taken = list(pieces.take())
        assert pieces.at_work() == ([], 3)
        ray.get([ray.remote(say_begun).remote(pieces.run, f"merge {name}") for name in "ab"])
        assert pieces.at_work() == (["merge a (0 of 4 pieces, 0 s)", "merge b (0 s)"], 1)
        for state, _, _ in taken[:-1]:
            state.begun = time.monotonic() - 100
        for one in taken[:2]:
            pieces.piece_done(*one, Done({}, Spent(pieces=1, pieces_run=1)))
        assert pieces.at_work() == (["merge a (2 of 4 pieces, 1 min, about 1 min left)", "merge b (1 min)"], 1)
        # Pieces that an earlier run had done tell nothing of the time that others take.
        pieces.piece_done(*taken[2], Done({}, Spent(pieces=1, pieces_run=0)))
        assert pieces.at_work()[0][0] == "merge a (3 of 4 pieces, 1 min)"
        assert begun(pieces.run) == {"merge a", "merge b"}
        forget(pieces.run)
        assert begun(pieces.run) == set()
