"""Where runs are recorded, checked before any work."""

import os
import re
import sqlite3
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sensmerge.pipeline.store.history import SQLITE
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.errors import InputError

TRACKING_URI = "MLFLOW_TRACKING_URI"
"""Environment variable that names the tracking URI where `--tracking-uri` does not, as in MLflow itself."""
LOCKED = 20.0
"""Seconds to wait for a database that another run writes to, as MLflow itself does."""


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
    if database.exists():
        _check_tables(database)
        return
    # MLflow makes missing folders, so the nearest existing one decides.
    nearest = next(folder for folder in database.resolve().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"--tracking-uri, or {TRACKING_URI}: {database} cannot be made: {nearest} is not a folder that can be "
            "written to"
        )


def _check_tables(database: Path) -> None:
    """Refuse a file that is no database, is locked, may not be written, or has the tables of another MLflow."""
    where = f"--tracking-uri, or {TRACKING_URI}: {database}"
    try:
        with closing(sqlite3.connect(database, timeout=LOCKED, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # as what writes begins
            is_used = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone()
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone() if is_used else None
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        raise InputError(f"{where}: {error}; end what else has it open, or name another file") from error
    except sqlite3.DatabaseError as error:
        raise InputError(f"{where}: {error}; restore it from a copy, or name another file") from error
    if found is None:
        return
    known, newest = _table_versions()
    if found[0] not in known:
        raise InputError(
            f"{where}: has tables of a newer MLflow than {version('mlflow')} (version {found[0]}); install that one, "
            "or name another file"
        )
    if found[0] not in newest:
        raise InputError(
            f"{where}: has tables of an older MLflow than {version('mlflow')}; copy the file, then run "
            f"`mlflow db upgrade {SQLITE}{database}`"
        )


def _table_versions() -> tuple[set[str], set[str]]:
    """Return the versions of its tables that the installed MLflow knows, and the newest; MLflow is not imported."""
    spec = find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None
    known, left = set[str](), set[str]()
    for step in (Path(spec.origin).parent / "store" / "db_migrations" / "versions").glob("*.py"):
        for down, found in re.findall(r"^(down_)?revision\b[^=\n]*= ['\"](\w+)['\"]", step.read_text(), re.MULTILINE):
            (left if down else known).add(found)
    return known, known - left
