"""One model's way from two experts to a server, command by command, as its user goes it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import ray
import yaml
from mlflow import MlflowClient
from ray import serve as ray_serve
from transformers import PreTrainedTokenizerFast

from infra import serve
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.serving.static_model import StaticModel
from tests.conftest import command_line, make_llama, perturbed, write_recipe, write_rows
from tests.pipeline.tracking.test_registry import TEXTS, trained, weights_of

PROJECT = Path(__file__).resolve().parents[2]
NAME = "base-merged"
SIX = {"max_new_tokens": 6}


@pytest.mark.ray
@pytest.mark.usefixtures("_serve_ends")
def test_from_two_experts_to_a_server(
    save: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    ray_address: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, report = tmp_path / "store", tmp_path / "report.json"
    here, on_ray = ("--store", store), ("--store", store, "--address", ray_address)
    uri = f"sqlite:///{store / 'mlflow.db'}"
    client = MlflowClient(uri, uri)

    def said(*words: object, status: int = 0) -> str:
        capsys.readouterr()
        assert command_line(*words) == status, capsys.readouterr().err
        out, error = capsys.readouterr()
        return f"{out}{error}"

    def versions() -> dict[str, str]:
        """The newest version of each variant."""
        found = client.search_model_versions(f"name = '{NAME}'")
        return {one.tags["variant"]: str(one.version) for one in sorted(found, key=lambda one: int(one.version))}

    def aliases() -> dict[str, str]:
        return {name: str(number) for name, number in client.get_registered_model(NAME).aliases.items()}

    # A recipe to start from, which its user completes.
    models = [save(make_llama(), "base", tmp_path)]
    models += [save(trained(tokenizer, text, 20), name, tmp_path) for name, text in TEXTS.items()]
    recipe = tmp_path / "recipe.yaml"
    assert f"next: sensmerge plan {recipe}" in said("init", *models, "-o", recipe)
    content = yaml.safe_load(recipe.read_text())
    assert content["name"] == NAME
    assert content["merges"]["ta"] == {"method": "task_arithmetic", "weight": [0.3, 0.5, 0.7, 1.0]}
    write_recipe(tmp_path, completed(content, tmp_path))

    # Plan, and run it.
    planned = said("plan", recipe, *here)
    assert f"{NAME}: 18 of 18 steps to run" in planned
    assert re.search(r"merge *│ ta-weight-0\.6 *│ RUN │ new", planned)
    run = said("run", recipe, *on_ray, "--report", report)
    assert re.search(r"best of 2 static variants: ta-weight-0\.\d, chosen by math/perplexity", run)
    assert f"{NAME}: all 18 steps are in the store" in said("plan", recipe, *here)
    first = versions()
    assert set(first) == {"ta-weight-0.3", "ta-weight-0.6", "ta-se"}

    # Compare two variants; the better one becomes the first champion, and nothing has to run for that.
    both = [f"{NAME}/{first[f'ta-weight-{weight}']}" for weight in ("0.3", "0.6")]
    compared = said("compare", *both, *here)
    assert compared.count("perplexity") == len(TEXTS)
    refreshed = said("refresh", recipe, *here, "--address", "no such cluster")
    champion = aliases()["champion"]
    assert f"{NAME}/{champion} (ta-weight-0.6) is the first champion" in refreshed
    assert champion == first["ta-weight-0.6"]

    # A worse expert is refused, and made champion by hand all the same.
    save(perturbed(trained(tokenizer, TEXTS["math"], 20), 1, scale=0.2), "math", tmp_path)
    refused = said("refresh", recipe, *on_ray, "--report", report, status=3)
    assert "gate, math: perplexity" in refused
    challenger = aliases()["challenger"]
    assert f"{NAME}/{challenger} " in refused
    assert f"stays challenger, {NAME}/{champion} (ta-weight-0.6) stays champion" in refused
    assert f"{NAME}/{challenger} " in said("promote", f"{NAME}/{challenger}", *here)
    assert aliases() == {"champion": challenger}

    # What nobody names is freed, and can no more be promoted; the former champion can be had back.
    client.set_model_version_tag(NAME, champion, "pinned", "true")
    lost = first["ta-weight-0.3"]
    assert weights_of(client, NAME, lost).is_file()
    assert f"{NAME}/{lost}: its weights are deleted" in said("gc", *here, "--keep", "1", "--delete")
    assert not weights_of(client, NAME, lost).exists()
    gone = said("promote", f"{NAME}/{lost}", *here, status=2)
    assert f"{NAME}/{lost} (ta-weight-0.3): " in gone
    assert "is not there; run the recipe as it was" in gone
    assert aliases() == {"champion": challenger}
    assert f"{NAME}/{champion} (ta-weight-0.6) is champion again" in said("rollback", NAME, *here)
    assert aliases() == {"champion": champion}

    # Servers of the champion and of the dynamic variant, which start while rows of a file are answered.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder, registered = Path(json.loads(report.read_text())["models"]["ta-se"]), f"models:/{NAME}@champion"
    with mlflow_server(registered, tmp_path) as ready:
        on_ray_serve = ray_servers(ray_address, {"model": registered, "tracking_uri": uri}, {"model": str(folder)})
        rows, target = [{"begin": "x"}, {"begin": "one"}], tmp_path / "answers.jsonl"
        source = write_rows(tmp_path / "questions.jsonl", [dict(row) for row in rows])
        options = ("--task", "math", "--max-new-tokens", 6, "--address", ray_address)
        assert f"{target}: 2 rows" in said("predict", folder, source, target, *options)
        found = [json.loads(line) for line in target.read_text().splitlines()]
        texts = [row["begin"] for row in rows]
        routed = [(one.prediction, one.expert) for one in DynamicModel.load(folder).predict(texts, 6)]
        assert [(one["begin"], (one["prediction"], one["expert"])) for one in found] == list(
            zip(texts, routed, strict=True)
        )

        # All are asked as the task asks, and answer alike.
        answers = StaticModel.load(weights_of(client, NAME, champion).parent).predict(texts, 6)
        asked = [row | {"task": "math"} for row in rows]
        body = {"rows": asked, "parameters": SIX}
        static, dynamic = (post(f"{place}/predict", body)["answers"] for place in on_ray_serve)
        assert [one["prediction"] for one in static] == answers
        assert [(one["prediction"], one["expert"]) for one in dynamic] == routed
        found = post(f"{ready()}/invocations", {"dataframe_records": asked, "params": SIX})["predictions"]
        assert [one["prediction"] for one in found] == answers
        with pytest.raises(HTTPError) as raised:
            post(f"{ready()}/invocations", {"dataframe_records": [{"task": "maths", "begin": "x"}]})
        told = json.loads(raised.value.read())
        assert (raised.value.code, "stack_trace" in told) == (400, False)
        assert "Error: text 0: task is 'maths'; expected one of " in told["message"]


def completed(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `init` has written, with rows, a sweep of two weights, and a dynamic variant."""
    for name, text in TEXTS.items():
        write_rows(folder / f"{name}.jsonl", [{"begin": "x", "completion": text}] * 4)
        write_rows(
            folder / f"{name}-train.jsonl", [{"begin": f"x{name[0] * n}", "completion": text} for n in range(1, 5)]
        )
    tasks = {
        name: {
            "kind": "completion",
            "calibration": {"path": "json", "data_files": f"{name}-train.jsonl"},
            "evaluation": {"path": "json", "data_files": f"{name}.jsonl"},
            "prompt": "{begin}",
            "metric": "perplexity",
        }
        for name in TEXTS
    }
    merges = {
        "ta": {"method": "task_arithmetic", "weight": [0.3, 0.6]},
        "ta-se": {"method": "task_arithmetic", "weight": 0.6, "application": {"kind": "se"}},
    }
    gate = {"metric": "math/perplexity", "tolerance": 0.05}
    return recipe | {"tasks": tasks, "merges": merges, "gate": gate}


def post(url: str, body: Mapping[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as found:
        return json.loads(found.read())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def mlflow_server(model: str, folder: Path) -> Iterator[Callable[[], str]]:
    """`mlflow models serve` in a process of its own, and what waits for it to answer and returns its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    log = folder / "mlflow.log"
    with log.open("w") as out:
        # It looks for uvicorn in the PATH; and what is logged with the model has to do, not this checkout.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
        server = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )

    def ready() -> str:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    return f"http://127.0.0.1:{port}"
            except (URLError, OSError):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)

    try:
        yield ready
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def ray_servers(address: str, *models: dict[str, Any]) -> list[str]:
    """Ray Serve on the tests' cluster with some models, and their addresses."""
    if not ray.is_initialized():
        ray.init(address=address, logging_level="ERROR")
    port, names = free_port(), [f"m{number}" for number in range(len(models))]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    targets = [
        ray_serve.RunTarget(serve.app({"cpus": 0.1, **one}), name=name, route_prefix=f"/{name}")
        for name, one in zip(names, models, strict=True)
    ]
    ray_serve.run_many(targets)
    return [f"http://127.0.0.1:{port}/{name}" for name in names]


@pytest.fixture
def _serve_ends() -> Iterator[None]:
    yield
    if ray.is_initialized():
        ray_serve.shutdown()
