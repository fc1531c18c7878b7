"""The SQLite file that MLflow keeps runs in, made before MLflow opens it."""

import shutil
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from filelock import FileLock
from mlflow import MlflowClient

from sensmerge.pipeline.store.facts import facts_folder
from sensmerge.pipeline.store.history import SQLITE
from sensmerge.tasks.artifacts import partial_of


def make_database(path: Path) -> None:
    """Make a database that is not there yet, whole or not at all.

    MLflow takes dozens of steps, and a second, to make its tables, and none of them a second time: if it is killed in
    between, the file is of no use ever after. An empty database of its version is kept for the next time.

    Raises:
        OSError: the file cannot be written; likewise what MLflow and SQLAlchemy raise.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        partial = partial_of(path)
        for left in path.parent.glob(f"{partial.name}*"):  # by a process that was killed; its journal too
            left.unlink()
        kept = facts_folder("databases") / f"mlflow-{version('mlflow')}.db"
        if kept.is_file():
            shutil.copyfile(kept, partial)
        else:
            beside = f"{SQLITE}{partial}"
            MlflowClient(tracking_uri=beside, registry_uri=beside).search_experiments(max_results=1)
            _keep(partial, kept)
        _place_default(partial, path.parent)
        partial.rename(path)


def _keep(made: Path, kept: Path) -> None:
    with suppress(OSError):  # a folder that may only be read: the next one takes as long
        kept.parent.mkdir(parents=True, exist_ok=True)
        own = kept.with_name(f".{uuid4().hex}.partial")  # others may make their first at the same time
        shutil.copyfile(made, own)
        own.rename(kept)


def _place_default(database: Path, folder: Path) -> None:
    """Have artifacts of the experiment that MLflow starts with lie beside the database, not where it was made."""
    with closing(sqlite3.connect(database)) as connection, connection:
        place = (folder.resolve() / "mlartifacts" / "0").as_uri()
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (place,))
