"""A database that is made whole or not at all, and a server that refuses what is large."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.tracking.client import connected
from sensmerge.tasks.errors import StepError

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


class Narrow(BaseHTTPRequestHandler):
    """Answers as MLflow does of one run, and as nginx does where files or parameters come."""

    def do_GET(self) -> None:
        """Say where the run's files go."""
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "0", "artifact_uri": "mlflow-artifacts:/0/r/artifacts"}
        self._answer(200, json.dumps({"run": {"info": info, "data": {}}}))

    def do_PUT(self) -> None:
        """Refuse."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(413, "<html><h1>413 Request Entity Too Large</h1><hr>nginx</html>")

    do_POST = do_PUT

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def narrow() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Narrow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_a_proxy_finds_too_large_is_said_in_a_line_with_a_way_out(narrow: str) -> None:
    with pytest.raises(StepError) as of_a_file, connected(narrow) as client:
        client.log_text("r", "x" * 2000, "tables/report.json")
    with pytest.raises(StepError) as of_a_request, connected(narrow) as client:
        client.set_tag("r", "a", "b" * 2000)
    for found, what in ((of_a_file, "report.json of 2.0 kB"), (of_a_request, "a request")):
        assert str(found.value) == (
            f"MLflow at {narrow} failed: {what} is more than it takes (413), or than a proxy before it does; raise the "
            "limit there (nginx: client_max_body_size)"
        )
