"""A run that finds nothing to do says what the last one found, and records it again only where MLflow lacks it."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import command_line, tiny_recipe, write_recipe

pytestmark = pytest.mark.ray

NO_CLUSTER = "no such cluster"


@pytest.fixture(scope="module")
def settled(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    """A recipe that has run, with models and rows old enough for digests to be kept; the tests leave it whole."""
    folder = tmp_path_factory.mktemp("settled")
    recipe = write_recipe(folder, tiny_recipe(llamas, folder))
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (10**9, 10**9))
    assert command_line("run", recipe, "--store", folder / "store", "--address", ray_address) == 0
    return recipe


def run(recipe: Path, address: str, *more: Any) -> dict[str, Any]:
    """Run a recipe once more and return its report."""
    report = recipe.with_name("report.json")
    command = ("run", recipe, "--store", recipe.with_name("store"), "--address", address, "--report", report, *more)
    assert command_line(*command) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def runs(database: Path) -> list[Any]:
    """The runs of MLflow that are not deleted and have no parent."""
    client = MlflowClient(f"sqlite:///{database}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments, "tags.role = 'recipe'"))


def names(store: Path) -> Counter[str]:
    """The names of the recipes that MLflow has runs of, each as often as it has one."""
    return Counter(one.info.run_name.split()[0] for one in runs(store / "mlflow.db"))


def test_the_same_result_without_ray_or_another_record(settled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = settled.with_name("store")
    before = len(runs(store / "mlflow.db"))
    capsys.readouterr()
    quick = run(settled, NO_CLUSTER)
    said = capsys.readouterr().out
    assert "MLflow has this run: mlflow ui --backend-store-uri sqlite" in said
    assert len(runs(store / "mlflow.db")) == before

    (store / "plans" / "tiny.json").unlink()
    assert run(settled, NO_CLUSTER) == quick
    assert capsys.readouterr().out.replace("MLflow: ", "MLflow has this run: ") == said
    assert len(runs(store / "mlflow.db")) == before + 1


def test_it_is_recorded_where_it_has_not_been(settled: Path) -> None:
    database, other = settled.with_name("store") / "mlflow.db", settled.with_name("other.db")
    earlier = [one.info.run_id for one in runs(database)]
    run(settled, NO_CLUSTER, "--tracking-uri", f"sqlite:///{other}")
    assert (len(runs(database)), len(runs(other))) == (len(earlier), 1)
    for one in earlier:
        MlflowClient(f"sqlite:///{database}").delete_run(one)
    for _ in range(2):
        run(settled, NO_CLUSTER)
        (again,) = runs(database)
        assert again.info.run_id not in earlier


def test_weights_that_were_deleted_and_made_again_are_recorded_again(
    settled: Path, ray_address: str, llamas: dict[str, Path]
) -> None:
    """Their versions were marked as lost meanwhile, whichever recipe makes them again."""
    store = settled.with_name("store")
    before = names(store)
    damaged = next((store / "merge").glob("*/model.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert command_line("verify", "--store", store, "--delete") == 1
    (settled.parent / "same").mkdir()
    same = write_recipe(settled.parent / "same", tiny_recipe(llamas, settled.parent / "same") | {"name": "same"})
    assert command_line("run", same, "--store", store, "--address", ray_address) == 0
    run(settled, NO_CLUSTER)
    assert names(store) - before == Counter({"same": 1, "tiny": 1})


def test_it_takes_no_torch(settled: Path) -> None:
    program = (
        "import sys\nfrom sensmerge.pipeline.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'ray', 'numba'} & set(sys.modules)), file=sys.stderr)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, "run", str(settled), "--store", str(settled.with_name("store"))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert "MLflow has this run" in told.stdout
    assert told.stderr.endswith("[]\n")


class Broken(BaseHTTPRequestHandler):
    """A server that takes no run, as one whose disk is full; that it is there can be seen all the same."""

    def do_GET(self) -> None:
        self._answer(200 if self.path.startswith("/api/2.0/mlflow/experiments/search") else 507)

    def do_POST(self) -> None:
        self._answer(507)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def broken() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_mlflow_did_not_take_is_recorded_later(
    settled: Path, broken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store, later = settled.with_name("store"), settled.with_name("later.db")
    arguments = (settled, "--store", store, "--set", "gate.tolerance=0.5")
    capsys.readouterr()
    assert command_line("run", *arguments, "--address", NO_CLUSTER, "--tracking-uri", broken) == 1
    said = capsys.readouterr()
    assert "mean" in said.out  # the tables are printed before
    (*_, error) = said.err.splitlines()
    assert error.startswith(f"error: MLflow at {broken} failed: ")
    remedy = "`sensmerge record`, with the recipe and the options of this command, records them"
    assert f"; the results are in the store: {remedy} (its stack: " in error
    (unfinished,) = (store / "runs" / "unfinished").iterdir()

    assert command_line("record", *arguments, "--tracking-uri", f"sqlite:///{later}") == 0
    (recorded,) = runs(later)
    assert recorded.info.status == "FINISHED"
    assert not unfinished.exists()
    out = capsys.readouterr().out
    assert f"MLflow: mlflow ui --backend-store-uri sqlite:///{later}, then http" in out
    # Once is enough, and a run knows of it.
    for command in ("record", "run"):
        assert command_line(command, *arguments, "--tracking-uri", f"sqlite:///{later}") == 0
        assert "MLflow has this run: " in capsys.readouterr().out
    assert len(runs(later)) == 1


def test_what_has_not_run_is_not_recorded(settled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = settled.with_name("store")
    before = len(runs(store / "mlflow.db"))
    assert command_line("record", settled, "--store", store, "--set", "merges.ta.weight=0.123") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "tiny: the store lacks 3 of " in error
    assert "such as merge ta (" in error
    assert error.endswith("`record` runs none: `run` or `refresh` does, and records them")
    assert len(runs(store / "mlflow.db")) == before
