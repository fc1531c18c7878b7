"""A static merge and a dynamic model behind Ray Serve: answers, refusals, health and metrics, over HTTP."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import psutil
import pytest
import ray
from ray import serve as ray_serve

from infra import serve
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.generation import Decoding
from sensmerge.tasks.serving.static_model import StaticModel
from tests.pipeline.tracking import test_record
from tests.tasks.serving import test_static_model

pytestmark = pytest.mark.ray

# the same models serve here
static_writer, dynamic_writer, heads = test_static_model.writer, test_record.writer, test_static_model.trunk
PROJECT = Path(__file__).resolve().parents[2]
TOKEN = "t" * 20
FIVE = {"max_new_tokens": 5}
ROWS = [{"task": "math", "prompt": "1+2="}, "9", {"text": "x"}]
TEXTS = ["1+2=", "9", "x"]
SENT: Counter[str] = Counter()
"""What the dynamic model was asked so far: answered rows, and requests by their status."""


@pytest.fixture(scope="module")
def url(
    static_writer: Path, dynamic_writer: Any, heads: Path, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> Iterator[str]:
    """Where they are served: /static, with a token, /dynamic, and /heads, classifiers that share a trunk."""
    port, token = free_port(), tmp_path_factory.mktemp("token") / "token"
    token.write_text(f"{TOKEN}\n")
    if not ray.is_initialized():
        ray.init(address=ray_address, logging_level="ERROR")
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    own = {
        "static": {"model": str(static_writer), "token_file": str(token)},
        "dynamic": {"model": str(dynamic_writer[0])},
        "heads": {"model": str(heads)},
    }
    targets = [
        ray_serve.RunTarget(serve.app({"cpus": 0.1, **arguments}), name=name, route_prefix=f"/{name}")
        for name, arguments in own.items()
    ]
    ray_serve.run_many(targets)
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def asked(url: str, body: Any = None, token: str | None = None) -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, headers), timeout=60) as found:
        answer = json.loads(found.read())
    if url.endswith("dynamic/predict"):
        SENT.update({"200": 1, "rows": len(answer["answers"])})
    return answer


def refused(url: str, body: Any = None, token: str | None = None) -> tuple[int, str]:
    with pytest.raises(HTTPError) as raised:
        asked(url, body, token)
    if url.endswith("dynamic/predict"):
        SENT[str(raised.value.code)] += 1
    return raised.value.code, json.loads(raised.value.read())["detail"]


def test_a_dynamic_model_answers_what_it_answers_in_python(url: str, dynamic_writer: Any) -> None:
    model = DynamicModel.load(dynamic_writer[0])
    expected = model.predict(TEXTS, 5)
    found = asked(f"{url}/dynamic/predict", {"rows": ROWS, "parameters": FIVE})["answers"]
    for one, answer in zip(found, expected, strict=True):
        assert (one["prediction"], one["expert"]) == (answer.prediction, answer.expert)
        assert one["coefficients"] == pytest.approx(answer.coefficients, abs=1e-5)
    drawn = asked(f"{url}/dynamic/predict", {"rows": ["9"], "parameters": FIVE | {"temperature": 1.0, "seed": 7}})
    (once,) = model.predict(["9"], 5, decoding=Decoding(temperature=1.0, seed=7))
    assert drawn["answers"][0]["prediction"] == once.prediction
    what = asked(f"{url}/dynamic/model")
    assert what == {
        "model": str(dynamic_writer[0]),
        "kind": "dynamic",
        "experts": ["math", "code"],
        "tasks": ["math", "code"],
    }


def test_requests_are_answered_together_and_each_by_itself(url: str, dynamic_writer: Any) -> None:
    texts = [f"{number}+{number}=" for number in range(12)]
    expected = [one.prediction for one in DynamicModel.load(dynamic_writer[0]).predict(texts, 5)]

    def ask(text: str) -> str:
        body = {"rows": [text], "parameters": FIVE}
        if text == texts[3]:  # which keeps no other from its answer
            SENT["rows"] += 1  # the first of the request's rows is answered
            return refused(f"{url}/dynamic/predict", {"rows": ["a", {"task": "maths"}], "parameters": FIVE})[1]
        return str(asked(f"{url}/dynamic/predict", body)["answers"][0]["prediction"])

    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(ask, texts))
    assert found.pop(3) == "row 1: task is 'maths'; expected one of math, code"
    del expected[3]
    assert found == expected


def test_a_static_merge_answers_those_who_know_its_token(url: str, static_writer: Path) -> None:
    place, body = f"{url}/static/predict", {"rows": TEXTS, "parameters": FIVE}
    found = asked(place, body, TOKEN)["answers"]
    assert found == [{"prediction": one} for one in StaticModel.load(static_writer).predict(TEXTS, 5)]
    for token in (None, "other"):
        assert refused(place, body, token) == (401, "expected the header Authorization: Bearer TOKEN")
        assert refused(f"{url}/static/model", token=token)[0] == 401
    assert asked(f"{url}/static/model", token=TOKEN)["kind"] == "static"
    for wrong, said in (
        ({"rows": ["a"], "parameters": {"temperature": -1}}, "temperature is -1.0; expected 0"),
        ({"rows": ["a"], "parameters": {"beams": 2}}, "found the parameter beams; expected task, max_new_tokens"),
        ({"rows": ["a" * 200]}, "row 0 has 200 tokens; the model takes 1 to 64: shorten it"),
    ):
        status, detail = refused(place, wrong, TOKEN)
        assert status == 400
        assert said in detail
    assert refused(place, {"texts": ["a"]}, TOKEN)[0] == 422


def test_a_static_classifier_answers_from_its_folder(url: str, heads: Path) -> None:
    """The request names the task whose head answers; every refusal says so."""
    place, model = f"{url}/heads/predict", StaticModel.load(heads)
    for task in ("mood", "topic"):
        found = asked(place, {"rows": ["9", {"text": "x"}], "parameters": {"task": task}})["answers"]
        assert found == [{"prediction": one} for one in model.predict(["9", "x"], task=task)]
    for body, said in (
        (
            {"rows": ["9"]},
            "task is None; expected the parameter task, one of mood, topic: its head answers",
        ),
        (
            {"rows": ["9"], "parameters": {"task": "weather"}},
            "task is weather; expected the parameter task, one of mood, topic",
        ),
        ({"rows": ["9"], "parameters": {"task": ["mood"]}}, "the parameter task is ['mood']; expected a task's name"),
        ({"rows": [{"task": "topic", "text": "9"}]}, "row 0: task is 'topic'; expected none, for the model keeps no "),
        ({"rows": [{"task": "topic", "text": "9"}]}, "name the task of all rows beside them (--task, or the parameter"),
    ):
        status, detail = refused(place, body)
        assert status == 400
        assert said in detail


def test_a_task_of_all_rows_is_their_prompt_where_the_model_keeps_it(url: str) -> None:
    place, math = f"{url}/dynamic/predict", FIVE | {"task": "math"}
    expected = asked(
        place, {"rows": [{"task": "math", "prompt": "1+2="}, {"task": "code", "prompt": "x"}], "parameters": FIVE}
    )
    assert asked(place, {"rows": [{"prompt": "1+2="}, {"task": "code", "prompt": "x"}], "parameters": math}) == expected
    status, detail = refused(place, {"rows": ["9"], "parameters": math})
    assert (status, "a bare text or picture has no fields for its prompt" in detail) == (400, True)


def test_health_and_metrics(url: str) -> None:
    with urlopen(f"{url}/-/healthz", timeout=60) as page:
        assert page.read() == b"success"
    asked(f"{url}/dynamic/predict", {"rows": ROWS, "parameters": FIVE})
    refused(f"{url}/dynamic/predict", {"rows": [{}]})
    deadline = time.monotonic() + 60
    while (found := counted()) != SENT and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found == SENT


def counted() -> Counter[str]:
    """What the nodes of the cluster export of the dynamic model."""
    found: Counter[str] = Counter()
    for node in ray.nodes():
        with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60) as page:
            text = page.read().decode()
        for name, tags, value in re.findall(r"^ray_sensmerge_(\w+?)(?:_total)?\{(.*)\} (\S+)$", text, re.MULTILINE):
            if 'application="dynamic"' in tags:
                status = re.findall(r'status="(\d+)"', tags)
                found[status[0] if status else name] += int(float(value))
    return found


def test_a_model_that_fails_is_unhealthy_until_it_answers(static_writer: Path, url: str) -> None:
    one = serve.MergedModel({"model": str(static_writer)})
    one.check_health()
    row = ("9", FIVE, "row 0")
    whole, one._together = one._together, lambda asked: 1 / 0
    with pytest.raises(ZeroDivisionError):
        asyncio.run(one.answers([row]))
    with pytest.raises(RuntimeError, match="the last batch failed: ZeroDivisionError"):
        one.check_health()
    one._together = whole
    assert len(asyncio.run(one.answers([row]))) == 1
    one.check_health()


def test_tokens_and_settings_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, said in (("none", "cannot be read"), ("empty", "is empty; write a long random text to it")):
        with pytest.raises(InputError, match=f"token_file: {tmp_path / name} {said}"):
            serve._token(str(tmp_path / name))
    with pytest.raises(ValueError, match="modle"):
        serve.app({"modle": "x"})


def test_on_this_machine_alone(static_writer: Path, tmp_path: Path) -> None:
    """Ray of its own: only the loopback answers those without a token, and a signal ends it all."""
    log, port = tmp_path / "log", free_port()
    command = [sys.executable, PROJECT / "infra" / "serve.py", static_writer, "--port", str(port), "--cpus", "0.5"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command], cwd=PROJECT, env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 120
        while f"{static_writer}: http://127.0.0.1:{port}/predict" not in log.read_text():
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        (answer,) = asked(f"http://127.0.0.1:{port}/predict", {"rows": ["9"], "parameters": FIVE})["answers"]
        assert [answer["prediction"]] == StaticModel.load(static_writer).predict(["9"], 5)
        for open_to_all in listening(psutil.Process(server.pid)):
            # What replicas of Ray Serve 2.60 say to each other goes over a port on all addresses.
            with grpc.insecure_channel(f"127.0.0.1:{open_to_all}") as channel:
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as raised:
                    call(b"", timeout=30)
                assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()[-3000:]


def listening(process: psutil.Process) -> list[int]:
    """The ports on which a process, or one that it has started, listens to more than this machine."""
    found = []
    for one in (process, *process.children(recursive=True)):
        for connection in one.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1"):
                found.append(int(connection.laddr.port))
    return found


def test_who_lets_others_ask_needs_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "folder", "--host", "0.0.0.0"])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert "--host 0.0.0.0 lets others ask; give --token-file" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert f"{tmp_path} has neither dynamic.json (a dynamic model) nor config.json" in capsys.readouterr().err
