"""Nothing that a run prints, logs, records or keeps holds a password or token that a URL or a variable gave it."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe
from tests.pipeline.test_tracking_server import Server

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).resolve().parents[2]
CANARY = "kanarie4711"


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[str]:
    """URL of a server of the files in a folder, with a password."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:{CANARY}@127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(f"sqlite:///{tmp_path}/server/server.db", tmp_path / "server")
    server.start()
    yield server
    with suppress(ProcessLookupError):  # stopped by the test
        server.stop()


def found_in(folder: Path) -> list[str]:
    """The files below a folder that hold the canary, and those whose names do."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]


@pytest.fixture
def ray_logs() -> Iterator[Path]:
    """A folder for Ray whose path is short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        yield Path(folder)


def test_a_canary_in_urls_and_variables_is_nowhere(
    llama_recipe: dict[str, Any], tmp_path: Path, files: str, mlflow_server: Server, ray_logs: Path
) -> None:
    for split in ("calibration", "evaluation"):
        source = llama_recipe["tasks"]["math"][split]
        source["data_files"] = f"{files}/{Path(source['data_files']).name}?token={CANARY}"
    recipe = write_recipe(tmp_path, llama_recipe)
    out = tmp_path / "out"
    out.mkdir()
    secret = dict.fromkeys(("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"), CANARY)
    # What `datasets` keeps of the addresses it has downloaded from is in its own cache, which the user's account owns.
    places = {"HF_HOME": str(tmp_path / "hf"), "RAY_TMPDIR": str(ray_logs), "PYTHONPATH": str(PROJECT)}
    server = mlflow_server.uri.replace("://", f"://user:{CANARY}@")

    def command(*words: str) -> int:
        with (out / f"{words[0]}.txt").open("a") as said:
            command = [sys.executable, "-m", "pipeline", *words, "--store", str(tmp_path / "store")]
            environment = os.environ | secret | places
            return subprocess.run(command, cwd=PROJECT, env=environment, stdout=said, stderr=said).returncode

    report = str(out / "report.json")
    assert command("run", str(recipe), "--tracking-uri", server, "--report", report) == 0, (out / "run.txt").read_text()
    assert command("plan", str(recipe)) == 0
    assert command("refresh", str(recipe), "--tracking-uri", server) == 0, (out / "refresh.txt").read_text()
    assert command("gc", "--tracking-uri", server) == 0
    (tmp_path / "math.jsonl").unlink()
    subprocess.run(["rm", "-r", tmp_path / "hf"], check=True)
    assert command("plan", str(recipe)) == 2
    assert "/math.jsonl?token=…" in (out / "plan.txt").read_text()
    mlflow_server.stop()
    assert command("run", str(recipe), "--tracking-uri", server) == 2
    assert mlflow_server.uri in (out / "run.txt").read_text()

    held = {folder.name: found_in(folder) for folder in (tmp_path / "store", tmp_path / "server", out, ray_logs)}
    assert not any(held.values()), held
    assert list(ray_logs.rglob("*.log")), "Ray wrote no logs where they were looked for"
    assert CANARY.encode() in recipe.read_bytes(), "the canary was looked for in the right way"


def test_a_store_at_a_url_holds_no_password(tmp_path: Path, llama_recipe: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path, llama_recipe)
    command = [sys.executable, "-m", "pipeline", "plan", str(recipe), "--store", f"sftp://team:{CANARY}@host/store"]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr.startswith("error: --store sftp://host/store: the URL holds a password or token; leave it out")
    assert CANARY not in told.stdout + told.stderr
