"""Where runs are recorded, checked before any work."""

import os
from pathlib import Path

from sensmerge.pipeline.store.history import SQLITE
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.errors import InputError

TRACKING_URI = "MLFLOW_TRACKING_URI"
"""Environment variable that names the tracking URI where `--tracking-uri` does not, as in MLflow itself."""


def default_uri(store: Store) -> str:
    """The tracking URI if the user names none: the SQLite database `mlflow.db` in the artifact store.

    Raises:
        InputError: the store is at a URL, where no database can be.
    """
    if store.remote is not None:
        raise InputError(
            f"--store {store}: runs cannot be recorded in a store at a URL; name an MLflow server with --tracking-uri "
            f"or {TRACKING_URI}"
        )
    return f"{SQLITE}{store.root.resolve() / 'mlflow.db'}"


def checked_uri(uri: str | None, store: Store) -> str:
    """The tracking URI that the user names, or the default one; InputError unless it can be used."""
    found = uri or default_uri(store)
    check_server(found)
    return found


def check_server(uri: str) -> None:
    """Raise InputError unless runs can be recorded at `uri`; nothing is written, and a dead server costs about 5 s.

    A server is asked for one experiment, as recording will do: so wrong credentials are found here too.
    """
    if is_server(uri):
        from sensmerge.pipeline.tracking.server import check_http

        check_http(uri)
    elif uri.startswith(SQLITE) and uri != SQLITE:
        _check_sqlite(Path(uri.removeprefix(SQLITE)))
    else:
        raise InputError(
            f"--tracking-uri, or {TRACKING_URI}, is {uri}: expected a server (http://… or https://…) or a database "
            "file (sqlite:///FOLDER/mlflow.db); MLflow 3 no longer writes runs into plain folders such as ./mlruns"
        )


def is_server(uri: str) -> bool:
    """Return whether a tracking URI is that of a server."""
    return uri.startswith(("http://", "https://"))


def _check_sqlite(database: Path) -> None:
    if found := {"?", "%"}.intersection(str(database)):
        raise InputError(
            f"--tracking-uri, or {TRACKING_URI}: {database} has {' and '.join(sorted(found))} in it, which the URL "
            "of a database has another use for; name a file without, and no options"
        )
    if database.is_dir():
        raise InputError(
            f"--tracking-uri, or {TRACKING_URI}: {database} is a folder: name the database file, "
            f"{SQLITE}{database}/mlflow.db"
        )
    # MLflow makes missing folders, so the nearest existing one decides.
    nearest = next(folder for folder in database.resolve().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"--tracking-uri, or {TRACKING_URI}: {database} cannot be made: {nearest} is not a folder that can be "
            "written to"
        )
