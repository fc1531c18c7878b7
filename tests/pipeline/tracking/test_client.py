"""A database that is made whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sensmerge.pipeline.tracking.client import connected

KILLED = """
import os, signal, sys
from pathlib import Path
from sensmerge.pipeline.tracking.client import connected

Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with connected(sys.argv[1]):
    pass
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process was killed that had nearly made a database."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    done = subprocess.run([sys.executable, "-c", KILLED, f"sqlite:///{database}"], check=False)
    assert done.returncode == -signal.SIGKILL
    return database


def test_a_database_that_was_not_finished_is_none(killed: Path) -> None:
    assert not killed.exists()
    assert (killed.parent / ".mlflow.db.partial").stat().st_size > 0
    (killed.parent / ".mlflow.db.partial").write_bytes(b"cut")
    (killed.parent / ".mlflow.db.partial-journal").write_bytes(b"cut")
    uri = f"sqlite:///{killed}"
    with connected(uri) as client:
        experiment = client.create_experiment("tiny")
    assert sorted(os.listdir(killed.parent)) == [".mlflow.db.lock", "mlflow.db"]
    with connected(uri) as client:
        assert client.get_experiment_by_name("tiny").experiment_id == experiment
