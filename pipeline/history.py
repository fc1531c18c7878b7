"""Which runs a store has seen, and the artifacts of each: a small file per run in `runs/`, oldest first by name."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from pipeline.store import Key, Store
from tasks.artifacts import read_json, write_json

RUNS = "runs"


@dataclass(frozen=True)
class PastRun:
    """A run that ended well and was recorded in MLflow."""

    recipe: str
    """its name"""
    command: Literal["run", "refresh"]
    ended: str
    """UTC, ISO 8601"""
    artifacts: list[str]
    """folders of all its steps, relative to the store"""


def remember(store: Store, recipe: str, command: Literal["run", "refresh"], keys: Iterable[Key]) -> None:
    """Write down a run that has just ended."""
    now = datetime.now(UTC)
    run = PastRun(recipe, command, now.isoformat(timespec="seconds"), _folders(store, keys))
    (store.root / RUNS).mkdir(exist_ok=True)
    write_json(store.root / RUNS / f"{now:%Y%m%dT%H%M%S.%f}-{recipe}.json", asdict(run))


def past_runs(store: Store) -> list[PastRun]:
    """Return all runs, oldest first."""
    return [PastRun(**read_json(path)) for path in sorted((store.root / RUNS).glob("*.json"))]


def last_run(store: Store, recipe: str, keys: Iterable[Key]) -> PastRun | None:
    """Return the last run of a recipe if it had these very steps."""
    runs = [run for run in past_runs(store) if run.recipe == recipe]
    return runs[-1] if runs and set(runs[-1].artifacts) == set(_folders(store, keys)) else None


def _folders(store: Store, keys: Iterable[Key]) -> list[str]:
    return sorted({str(store.folder(key).relative_to(store.root)) for key in keys})
