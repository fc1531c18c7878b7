"""What a store holds, without what differs from run to run anyway; and what a fault has done to it."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

from sensmerge.pipeline.store.store import stages

VOLATILE = {"seconds", "peak_memory", "pieces", "pieces_run", "node", "milliseconds", "bytes", "folder", "checksums"}
VOLATILE |= {"taken_over", "taken_over_bytes"}
"""Keys of JSON files whose values differ between two runs that come to the same."""
DATED = {"README.md", ".synced", "routes.json", "files.json"}
"""Files with times in them, and those of which others know the size for it."""
MEASURED = ("peak_memory", "milliseconds")
"""In the names of metrics that no two runs have the same of."""


def held(world: Path, store: str) -> dict[str, str]:
    """Return what a world holds: of every file of all artifacts, and of MLflow's records, a digest or the text."""
    return contents(world / store) | recorded(world / "store" / "mlflow.db")


def contents(store: Path) -> dict[str, str]:
    """Return of every file of all artifacts, by its path, the JSON text without what is volatile, or a digest."""
    found = {}
    for stage in stages():
        for path in sorted((store / stage).rglob("*")):
            if path.is_file() and path.name not in DATED:
                name, data = str(path.relative_to(store)), path.read_bytes()
                found[name] = _lasting_text(data) if path.suffix == ".json" else sha256(data).hexdigest()
    return found


def _lasting_text(data: bytes) -> str:
    try:
        return json.dumps(_lasting(json.loads(data)), sort_keys=True)
    except ValueError:
        return f"no JSON: {data[:40]!r}"


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(one) for key, one in value.items() if key not in VOLATILE | DATED}
    return [_lasting(one) for one in value] if isinstance(value, list) else value


def recorded(database: Path) -> dict[str, str]:
    """Return what MLflow's database says: the metrics of finished runs, what has which alias, and runs left open."""
    if not database.is_file():
        return {}
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        runs = db.execute("select run_uuid, name, status from runs").fetchall()
        digests = dict(db.execute("select run_uuid, value from tags where key = 'digest'").fetchall())
        metrics: dict[str, dict[str, float]] = {run: {} for run, _, _ in runs}
        for run, key, value in db.execute("select run_uuid, key, value from latest_metrics"):
            if not key.endswith(MEASURED):
                metrics[run][key] = value
        found = {
            f"MLflow's run of {name} with {digests[run][:12]}": json.dumps(metrics[run], sort_keys=True)
            for run, name, status in runs
            if status == "FINISHED" and run in digests
        }
        found |= {f"MLflow's run {name} is open": "" for _, name, status in runs if status == "RUNNING"}
        for alias, version in db.execute("select alias, version from registered_model_aliases").fetchall():
            tags = dict(db.execute("select key, value from model_version_tags where version = ?", (version,)))
            found[f"MLflow's alias {alias}"] = f"{tags.get('variant')} {tags.get('digest')}"
    return found


def leftovers(world: Path) -> Iterator[str]:
    """Yield what lies in a world that only a run that is at work may have there."""
    for path in sorted(world.rglob("*")):
        name = str(path.relative_to(world))
        if name.endswith(".partial") or ".locks/" in name or path.parent.name == "unfinished":
            yield f"{name} is left behind"


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """Yield what is not as expected."""
    for name in sorted({*expected, *found}):
        if name not in found:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is too much"
        elif expected[name] != found[name]:
            pairs = enumerate(zip(expected[name], found[name], strict=False))
            start = max(0, next((place for place, (one, other) in pairs if one != other), 0) - 100)
            yield f"{name} has … {found[name][start:][:300]} instead of {expected[name][start:][:300]}"
