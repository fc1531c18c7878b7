import contextlib
import shutil
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking import uri as uri_module
from sensmerge.pipeline.tracking.client import connected
from sensmerge.pipeline.tracking.uri import check_server, default_uri
from sensmerge.tasks.errors import InputError
from tests.pipeline.tracking.test_record import free_port


def test_a_server_that_is_not_there_is_an_input_error() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    remedy = f"MLflow server unreachable at {uri}: start it .mlflow server .*pass --tracking-uri"
    with pytest.raises(InputError, match=remedy) as caught:
        check_server(uri)
    assert "\n" not in str(caught.value)


def test_something_else_behind_the_address_is_an_input_error() -> None:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers every request with 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match="it answered 501"):
            check_server(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "file:mlruns", "sqlite://", "sqlite:///", "databricks", ""])
def test_other_places_for_runs_are_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(InputError, match=r"expected a server .* or a database file .*sqlite:///"):
        check_server(uri)


@pytest.mark.parametrize("name", ["x.db?timeout=30", "p%20q.db"])
def test_what_sqlalchemy_reads_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has [?%] in it, which the URL of a database has another use for"):
        check_server(f"sqlite:///{tmp_path}/{name}")


def test_sqlite_needs_a_folder_that_is_there_or_can_be_made(tmp_path: Path) -> None:
    check_server(default_uri(Store(tmp_path / "new" / "store")))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        check_server(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(InputError, match="is a folder: name the database file"):
        check_server(f"sqlite:///{tmp_path}")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow makes it."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with connected(f"sqlite:///{path}") as client:
        client.create_experiment("tiny")
    return path


def changed(database: Path, folder: Path, statement: str) -> str:
    """URI of a copy of a database in which a statement was run."""
    path = Path(shutil.copy(database, folder / "mlflow.db"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    return f"sqlite:///{path}"


def test_a_database_of_this_mlflow_is_taken_as_it_is(database: Path) -> None:
    before = database.read_bytes()
    check_server(f"sqlite:///{database}")
    assert database.read_bytes() == before


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(InputError, match=r"mlflow\.db: file is not a database; restore it from a copy"):
        check_server(f"sqlite:///{tmp_path}/mlflow.db")


def test_tables_of_another_mlflow_are_refused(database: Path, tmp_path: Path) -> None:
    uri = changed(database, tmp_path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(InputError, match=r"tables of a newer MLflow than 3\..* \(version ffffffffffff\); install that"):
        check_server(uri)
    uri = changed(database, tmp_path, "UPDATE alembic_version SET version_num = '0a8213491aaa'")
    with pytest.raises(InputError, match=r"tables of an older MLflow than 3\..*`mlflow db upgrade sqlite:///"):
        check_server(uri)


def test_a_database_that_others_keep_for_themselves_is_refused(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uri_module, "LOCKED", 0.2)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match="database is locked; end what else has it open"):
            check_server(f"sqlite:///{database}")
    check_server(f"sqlite:///{database}")
