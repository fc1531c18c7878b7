"""Which runs a store has seen, and the artifacts of each: a small file per run in `runs/`, oldest first by name.

A run that has begun and not ended yet is in `runs/unfinished/`, a file per recipe.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sensmerge.pipeline.store.manifest import RUNS
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import parse_json
from sensmerge.tasks.urls import public

SQLITE = "sqlite:///"
"""Beginning of the tracking URI of a database file."""
UNFINISHED = f"{RUNS}/unfinished"


@dataclass(frozen=True)
class PastRun:
    """A run that ended well and was recorded in MLflow; or one that has begun."""

    recipe: str
    """its name"""
    command: Literal["run", "refresh"]
    ended: str | None
    """UTC, ISO 8601; None of a run that has not ended"""
    artifacts: list[str]
    """folders of all its steps, relative to the store"""
    tracking_uri: str | None
    """where it was recorded, without a password; None: the database in the store"""
    gate: str | None = None
    """settings of the gate that its best variant has passed or not; None of a `run`"""


def begin(
    store: Store, recipe: str, command: Literal["run", "refresh"], keys: Iterable[Key], tracking_uri: str | None
) -> None:
    """Write down a run that begins now, so that what it has made is kept until one of its recipe has ended."""
    run = PastRun(recipe, command, None, _folders(store, keys), lasting_uri(tracking_uri))
    store.write_run(_unfinished(store, recipe), asdict(run))


def remember(
    store: Store,
    recipe: str,
    command: Literal["run", "refresh"],
    keys: Iterable[Key],
    tracking_uri: str | None,
    gate: str | None = None,
) -> None:
    """Write down a run that has just ended."""
    now = datetime.now(UTC)
    ended = now.isoformat(timespec="seconds")
    run = PastRun(recipe, command, ended, _folders(store, keys), lasting_uri(tracking_uri), gate)
    store.write_run(store.root / RUNS / f"{now:%Y%m%dT%H%M%S.%f}-{recipe}.json", asdict(run))
    store.remove_file(_unfinished(store, recipe))


def past_runs(store: Store) -> list[PastRun]:
    """Return all runs that have ended, oldest first."""
    return list(_read(store.root / RUNS))


def unfinished_runs(store: Store) -> list[PastRun]:
    """Return the runs that have begun and not ended, by recipe."""
    return list(_read(store.root / UNFINISHED))


def _read(folder: Path) -> Iterator[PastRun]:
    """Yield the runs in a folder; of a file that cannot be read is said that it is left out."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield PastRun(**parse_json(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            sys.stderr.write(f"{path}: tells no run ({reason}); it is left out: delete it\n")


def last_run(store: Store, recipe: str, keys: Iterable[Key]) -> PastRun | None:
    """Return the last run of a recipe if it had these very steps."""
    runs = [run for run in past_runs(store) if run.recipe == recipe]
    return runs[-1] if runs and set(runs[-1].artifacts) == set(_folders(store, keys)) else None


def has_passed(store: Store, recipe: str, keys: Iterable[Key], gate: str) -> bool:
    """Return whether the last refresh of a recipe had these very steps and this gate; runs after it do not matter."""
    refreshed = [run for run in past_runs(store) if run.recipe == recipe and run.command == "refresh"]
    if not refreshed or refreshed[-1].gate != gate:
        return False
    return set(refreshed[-1].artifacts) == set(_folders(store, keys))


def lasting_uri(uri: str | None) -> str | None:
    """Return a tracking URI that can be kept: a database's with its whole path, a server's without its password."""
    if uri is not None and uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri and public(uri)


def _unfinished(store: Store, recipe: str) -> Path:
    return store.root / UNFINISHED / f"{recipe}.json"


def _folders(store: Store, keys: Iterable[Key]) -> list[str]:
    return sorted({str(store.folder(key).relative_to(store.root)) for key in keys})
