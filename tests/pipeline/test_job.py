"""The workflow as a Ray job: `ray start --head` and `ray job submit`, token authentication on."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.installed import REFUSE

PROJECT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")

LOAD = """
import sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
(version,) = mlflow.MlflowClient().search_model_versions("tags.variant = 'ta-se'")
model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
print(sys.modules["sensmerge"].__file__)
print(*model.predict(["math: 4123+1111 = "], params={"max_new_tokens": 2}).columns[:2])
"""

pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def ray(environment: dict[str, str], *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [str(RAY), *map(str, arguments)]
    options: dict[str, Any] = {"cwd": PROJECT, "env": environment}
    return subprocess.run(command, **options, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def head(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str]]:
    """A head node of its own, with a token: the environment of its commands, and the dashboard's address."""
    # Sockets need short paths, which pytest's own folders are not.
    temporary = tmp_path_factory.getbasetemp().parent / f"r{secrets.token_hex(2)}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"PYTHONPATH": str(installed)}
    gcs, dashboard = free_port(), free_port()
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    # The tests' own cluster has taken the default port of the agent that runs jobs.
    ports.append(f"--dashboard-agent-listen-port={free_port()}")
    started = subprocess.Popen(
        [str(RAY), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={temporary}", *ports],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        # The dashboard answers before the node's agent, which runs jobs, is there: ready is when a job has run.
        deadline = time.monotonic() + 180
        while ray(environment, "job", "submit", "--address", address, "--", "true").returncode != 0:
            assert started.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "no job agent came up"
            time.sleep(1)
        yield environment, address
    finally:
        started.terminate()
        started.wait(60)


def code_of_this_checkout(folder: Path) -> Path:
    """infra/runtime_env.yaml on a cluster whose image has another `sensmerge`, which ends whoever imports it."""
    other = folder / "image" / "sensmerge"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(REFUSE)
    config = yaml.safe_load((PROJECT / "infra" / "runtime_env.yaml").read_text())
    config["env_vars"]["PYTHONPATH"] = str(other.parent)
    path = folder / "runtime_env.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def answers_beside_the_own_modules_of(user_folder: Path, installed: Path, store: Path) -> None:
    """Check that the dynamic model answers in a program whose folder has other modules `tasks` and `pipeline`."""
    # As for a package in a virtual environment: the user's folder comes first, the package after it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": f"{user_folder}{os.pathsep}{installed}"}
    command = [sys.executable, "-c", LOAD, f"sqlite:///{store}/mlflow.db"]
    done = subprocess.run(command, cwd=user_folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    place, columns = done.stdout.splitlines()[-2:]
    assert Path(place).is_relative_to(store)  # a model brings the code that serves it
    assert columns == "prediction expert"


def test_run_and_refresh_as_submitted_jobs(
    head: tuple[dict[str, str], str], installed: Path, user_folder: Path, tmp_path: Path
) -> None:
    environment, address = head
    quickstart = PROJECT / "configs" / "quickstart"
    subprocess.run([sys.executable, quickstart / "make_models.py"], check=True)
    report = tmp_path / "report.json"

    def submitted(code: list[object], command: str, *more: str) -> tuple[str, dict[str, Any]]:
        entry = [command, quickstart / "recipe.yaml", "--store", tmp_path / "store", "--report", report, *more]
        done = ray(environment, "job", "submit", "--address", address, *code, *entry)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout
        return done.stdout, json.loads(report.read_text())

    # The package of the cluster, in a user's folder; then what the checkout has in place of it.
    package = ["--working-dir", user_folder, "--", sys.executable, installed / "bin" / "sensmerge"]
    checkout = ["--runtime-env", code_of_this_checkout(tmp_path), "--", sys.executable, "-m", "pipeline"]
    few = [f"--set=tasks.{task}.evaluation.samples=40" for task in ("math", "words", "cipher")]
    _, found = submitted(package, "run", *few)
    assert {stage["status"] for stage in found["stages"]} == {"run"}
    normalised = {model: score["value"] for model, score in found["mean_normalised"].items()}
    assert normalised["base"] < 0.5
    for expert in ("math", "words", "cipher"):
        assert found["scores"][expert][expert]["token_accuracy"]["value"] > 0.9
        for variant in ("soup", "ta", "ta-sens", "ties-sens", "dare-ties", "regmean", "ta-se"):
            assert normalised[variant] > normalised[expert] + 0.1
    answers_beside_the_own_modules_of(user_folder, installed, tmp_path / "store")

    said, refreshed = submitted(checkout, "refresh", *few, "--set", "merges.ta.weight=0.45")
    ran = {f"{stage['stage']} {stage['name']}" for stage in refreshed["stages"] if stage["status"] == "run"}
    assert ran == {"merge ta", *(f"evaluate ta/{task}" for task in ("math", "words", "cipher"))}
    assert "is the first champion" in said


def test_without_the_token_nothing_is_submitted(head: tuple[dict[str, str], str]) -> None:
    environment, address = head
    stranger = environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = ray(stranger, "job", "submit", "--address", address, "--", "true")
    assert refused.returncode != 0


def test_the_nightly_pod_that_is_ended_ends_its_job(head: tuple[dict[str, str], str]) -> None:
    environment, address = head
    manifest = yaml.safe_load((PROJECT / "infra" / "kubernetes" / "cluster" / "cronjob.yaml").read_text())
    (pod,) = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    script, _, rest = pod["args"][0].partition("sensmerge refresh")
    script += "sleep 300 &" + rest.partition("&")[2]  # in place of the refresh
    path = f"{RAY.parent}:{os.environ['PATH']}"
    own = environment | {"RAY_ADDRESS": address, "JOB": "nightly-1", "PATH": path}
    with subprocess.Popen([*pod["command"], script], env=own, stdout=subprocess.DEVNULL) as process:
        status = ["job", "status", "--address", address, "nightly-1"]
        deadline = time.monotonic() + 120
        while "RUNNING" not in (said := ray(environment, *status)).stdout:
            assert time.monotonic() < deadline, said.stdout + said.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) != 0
    assert "STOPPED" in ray(environment, *status).stdout.upper()
