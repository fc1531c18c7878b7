"""A tracking server as a team has it: on PostgreSQL, written to by several runs at once, and not always up."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sensmerge.pipeline.tracking import record as tracking
from sensmerge.tasks.errors import StepError
from tests.pipeline.tracking.test_record import (
    MODELS,
    OUTCOMES,
    PLAN,
    RECIPE,
    _healthy,
    children,
    free_port,
    make_datasets,
    make_report,
)


class Server:
    """An MLflow server that can be stopped and started again at the same address."""

    def __init__(self, database: str, folder: Path) -> None:
        self._port, self._folder = free_port(), folder
        self._options = ["--backend-store-uri", database, "--artifacts-destination", str(folder / "kept")]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # starts faster
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--workers", "1", *self._options],
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 180
        while not _healthy(self._port):
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.3)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URI of an empty PostgreSQL database, made and served for these tests."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    owner = None
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        try:
            owner = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if owner:
        shutil.chown(folder, owner)
    port = free_port()
    data, tools = folder / "data", programs[-1]
    subprocess.run(
        [tools / "initdb", "--auth=trust", "--username=mlflow", "--no-sync", data],
        user=owner,
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [tools / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", options, "start"], user=owner, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*control, "-m", "immediate", "stop"], user=owner, check=True, cwd=folder, stdout=subprocess.DEVNULL
        )
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(database, tmp_path_factory.mktemp("server"))
    one.start()
    yield one
    one.stop()


def record(server: Server, recipe: str, folder: Path) -> str:
    """Record an execution and return the id of its parent run."""
    report = make_report(folder, recipe)
    return tracking.record(tracking.Execution(report, OUTCOMES, RECIPE, PLAN, make_datasets()), server.uri, folder)


def check_complete(server: Server, parent: str) -> None:
    client = MlflowClient(server.uri, server.uri)
    assert client.get_run(parent).info.status == "FINISHED"
    assert len(client.list_artifacts(parent)) == 6
    runs = children(client, parent)
    assert {name: run.data.tags["role"] for name, run in runs.items()} == MODELS
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len({frozenset(run.data.metrics) for run in runs.values()}) == 1


def test_two_runs_write_at_once(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        parents = list(pool.map(lambda recipe: record(server, recipe, tmp_path), ("same", "same")))
    assert len(set(parents)) == 2
    for parent in parents:
        check_complete(server, parent)
    client = MlflowClient(server.uri, server.uri)
    versions = client.search_model_versions("name = 'same'")
    assert {version.tags["variant"] for version in versions} == {"ta", "ta-sens.3"}


def test_a_server_that_stops_and_comes_back(server: Server, tmp_path: Path) -> None:
    parents: list[str] = []
    recording = threading.Thread(target=lambda: parents.append(record(server, "nightly", tmp_path)))
    recording.start()
    client = MlflowClient(server.uri, server.uri)
    while (experiment := client.get_experiment_by_name("nightly")) is None or not client.search_runs(
        [experiment.experiment_id], "tags.role = 'base'"
    ):
        assert recording.is_alive(), "recorded before the server could be stopped"
    server.stop()
    time.sleep(1)
    assert recording.is_alive(), "ended without its server"
    server.start()
    recording.join(120)
    (parent,) = parents
    check_complete(server, parent)


def test_a_server_that_stops_for_good(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for a while, once, and not for each run that is open; the error is the server's."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    server = Server(database, tmp_path)
    server.start()
    errors: list[StepError] = []

    def recorded() -> None:
        with pytest.raises(StepError) as failed:
            record(server, "lost", tmp_path)
        errors.append(failed.value)

    recording = threading.Thread(target=recorded)
    recording.start()
    client = MlflowClient(server.uri, server.uri)
    while (experiment := client.get_experiment_by_name("lost")) is None or not client.search_runs(
        [experiment.experiment_id], "tags.role = 'base'"
    ):
        assert recording.is_alive(), "recorded before the server could be stopped"
    server.stop()
    recording.join(60)
    (error,) = errors
    assert str(error).startswith(f"MLflow at {server.uri} failed: ")
