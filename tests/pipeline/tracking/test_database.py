"""MLflow's database: empty ones of its version are copies of one, and none is left half made."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sensmerge.pipeline.tracking.database import make_database


def tables(path: Path) -> dict[str, list[object]]:
    """The tables, each with its columns."""
    with closing(sqlite3.connect(path)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f"PRAGMA table_info('{name}')").fetchall() for name in names}


def test_a_copy_is_what_mlflow_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own.db"
    MlflowClient(f"sqlite:///{own}", f"sqlite:///{own}").search_experiments()
    made = [tmp_path / name / "mlflow.db" for name in ("first", "second")]
    for path in made:
        make_database(path)
        assert tables(path) == tables(own)
        client = MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}")
        (default,) = client.search_experiments()
        assert default.artifact_location == (path.parent / "mlartifacts" / "0").as_uri()
        assert client.create_experiment("other")
        assert [one.name for one in path.parent.iterdir() if "partial" in one.name] == []
    assert len(list((tmp_path / "cache" / "databases").iterdir())) == 1


def test_one_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"mine")
    make_database(path)
    assert path.read_bytes() == b"mine"


def test_without_a_place_for_copies_mlflow_makes_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    make_database(tmp_path / "mlflow.db")
    assert "experiments" in tables(tmp_path / "mlflow.db")
