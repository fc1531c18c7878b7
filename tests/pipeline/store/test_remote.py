"""A store at a URL, on a real S3-compatible server on loopback."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from sensmerge.pipeline.store import lock
from sensmerge.pipeline.store.history import begin, past_runs, remember, unfinished_runs
from sensmerge.pipeline.store.remote import Remote
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.listing import DIGESTS
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, write_recipe
from tests.here import run_here

BUCKET = "s3://models/team"


@pytest.fixture
def machines(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machines("a")` gives the store as machine a has it."""

    def machine(name: str) -> Store:
        monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / name))
        store = Store.open(BUCKET)
        store.make()
        return store

    return machine


def key(weight: float = 0.4) -> Key:
    return Key("merge", "ta", {"weight": weight})


def publish(store: Store, one: Key, data: bytes = b"weights") -> Path:
    store.partial(one).mkdir(parents=True)
    (store.partial(one) / "heads").mkdir()
    (store.partial(one) / "heads" / "data").write_bytes(data)
    store.publish(one, {"result": {}})
    return store.folder(one)


def test_what_one_machine_publishes_another_has(machines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensmerge.pipeline.store.store.SMALL", 1000)
    large = bytes(range(256)) * 8
    here = publish(machines("a"), key(), large)
    store = machines("b")
    assert store.manifest(key()) is None
    store.look()
    manifest = store.manifest(key())
    assert manifest is not None
    assert manifest["files"]["heads/data"] == len(large)
    there = store.folder(key())
    assert there != here
    assert (there / "fingerprint.json").is_file()
    assert not (there / "heads").exists()
    assert store.local_manifest(key()) is None
    assert store.why(key(0.5)) == "weight: 0.4 → 0.5"
    store.fetch(key())
    assert (there / "heads" / "data").read_bytes() == large
    assert store.local_manifest(key()) == manifest


def test_only_what_is_new_is_downloaded(machines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(machines("a"), key())
    store = machines("b")
    store.look()
    data = store.folder(key()) / "heads" / "data"
    data.write_text("marked")
    store.look()
    store.fetch(key())
    assert data.read_text() == "marked"
    shutil.rmtree(machines("a").folder(key()))
    publish(machines("a"), key(), b"again")
    store = machines("b")
    store.look()
    assert data.read_text() == "again"


def test_what_lacks_a_file_at_the_url_is_made_again(machines: Any, bucket: Any) -> None:
    store = machines("a")
    folder = publish(store, key())
    store.look()
    assert store.manifest(key()) is not None
    bucket.rm(f"{BUCKET}/merge/{folder.name}/heads/data")
    store.look()
    assert store.manifest(key()) is None
    assert store.local_manifest(key()) is not None
    publish(store, key())
    store.look()
    assert store.manifest(key()) is not None


def test_what_is_removed_is_gone_everywhere(machines: Any, bucket: Any) -> None:
    publish(machines("a"), key())
    store = machines("b")
    store.look()
    store.remove(store.folder(key()))
    assert bucket.find(BUCKET) == []
    assert not store.folder(key()).exists()


def test_digests_are_known_everywhere(machines: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    os.utime(file, (0, 10**9))
    first = machines("a")
    first.look()
    digest = digests.compute_once(file, first.hub_cache / DIGESTS)
    first.upload_digests()
    second = machines("b")
    assert digests.find(file, file.stat(), second.hub_cache / DIGESTS) is None
    second.look()
    assert digests.find(file, file.stat(), second.hub_cache / DIGESTS) == digest


def test_runs_are_known_everywhere(machines: Any) -> None:
    store = machines("a")
    begin(store, "tiny", "refresh", [key()], "http://mlflow")
    there = machines("b")
    there.look()
    assert [run.recipe for run in unfinished_runs(there)] == ["tiny"]
    remember(store, "tiny", "refresh", [key()], "http://mlflow")
    there.look()
    assert unfinished_runs(there) == []
    assert past_runs(there) == past_runs(store)
    assert [run.command for run in past_runs(there)] == ["refresh"]


def test_two_machines_wait_for_each_other(machines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL", 0.1)
    first, second = machines("a"), machines("b")
    order = []
    with first.lock():
        with pytest.raises(InputError, match=rf"{BUCKET}: locked by another run \(process {os.getpid()} on .*--wait"):
            second.lock().__enter__()

        def other() -> None:
            with second.lock(60):
                order.append("second")

        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.5)
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"]
    with first.lock():
        pass


def claim_of(process: int, **about: Any) -> bytes:
    found = {"number": 1, "host": "elsewhere", "process": process, "since": "then", "machine": lock._machine()}
    return json.dumps(found | about).encode()


def test_a_lock_of_a_process_that_has_died_is_none(machines: Any, bucket: Any) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    bucket.pipe_file(f"{BUCKET}/.locks/gone.json", claim_of(gone.pid, started="1"))
    bucket.pipe_file(f"{BUCKET}/.locks/reused.json", claim_of(os.getpid(), started="1"))
    with machines("a").lock():
        (held,) = bucket.find(f"{BUCKET}/.locks")
        assert json.loads(bucket.cat_file(held))["process"] == os.getpid()
    assert bucket.find(f"{BUCKET}/.locks") == []


def test_processes_of_another_machine_or_container_are_not_looked_for(machines: Any, bucket: Any) -> None:
    """Two containers may have one host name, and their processes the same numbers."""
    bucket.pipe_file(f"{BUCKET}/.locks/other.json", claim_of(2**22 + 1, host=lock.platform.node(), machine="other"))
    with pytest.raises(InputError, match=rf"locked by another run \(process {2**22 + 1} on "):
        machines("a").lock().__enter__()


def test_a_lock_that_is_not_renewed_is_none(machines: Any, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe_file(f"{BUCKET}/.locks/other.json", claim_of(1, machine="other"))
    with pytest.raises(InputError, match=r"locked by another run \(process 1 on elsewhere, since then\)"):
        machines("a").lock().__enter__()
    monkeypatch.setattr(lock, "GRACE", -lock.LEASE - timedelta(seconds=1))
    with machines("a").lock():
        pass


def test_a_held_lock_is_renewed(machines: Any, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWAL", timedelta(milliseconds=50))
    with machines("a").lock():
        (held,) = bucket.find(f"{BUCKET}/.locks")
        first = bucket.info(held, refresh=True)["LastModified"]
        for _ in range(100):
            threading.Event().wait(0.1)
            if bucket.info(held, refresh=True)["LastModified"] > first:
                return
    pytest.fail("the lock was not renewed")


def test_a_renewal_that_fails_is_tried_again(
    machines: Any, bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "RENEWAL", timedelta(milliseconds=50))
    monkeypatch.setattr(lock, "RETRY", timedelta(milliseconds=50))
    writes, write = [], Remote.write

    def failing(self: Remote, path: str, content: bytes) -> None:
        writes.append(path)
        if len(writes) in (3, 4):
            raise InputError("no answer")
        write(self, path, content)

    monkeypatch.setattr(Remote, "write", failing)
    with machines("a").lock():
        while len(writes) < 6:
            threading.Event().wait(0.05)
    assert capsys.readouterr().err.count("the lock is not renewed yet (no answer); trying again") == 2


def test_a_run_that_lost_its_lock_writes_no_more(machines: Any, bucket: Any) -> None:
    store = machines("a")
    with store.lock():
        there = pickle.loads(pickle.dumps(store))  # as workers have it
        (held,) = bucket.find(f"{BUCKET}/.locks")
        bucket.rm(held)  # as a run does that takes over
        with pytest.raises(InputError, match=r"another run took it over.*nothing more is written; run again"):
            publish(there, key())
        with pytest.raises(InputError, match="another run took it over"):
            begin(store, "tiny", "refresh", [key()], "http://mlflow")
    assert bucket.find(BUCKET) == []
    publish(machines("a"), key(0.5))  # what holds no lock is not kept from it


def test_any_file_system_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    for url in (f"file://{tmp_path}/shared", "memory://team"):
        store = Store.open(url)
        with store.lock():
            publish(store, key())
            with pytest.raises(InputError, match="locked by another run"):
                Store.open(url).lock().__enter__()
            store.look()
            assert store.manifest(key()) is not None


@pytest.mark.parametrize(
    ("place", "said"),
    [("s3://no-such-bucket/team", "cannot be used"), ("nothing://models", "cannot be used .*Protocol not known")],
)
def test_places_that_are_none(
    place: str, said: str, bucket: Any, llama_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, llama_recipe)
    tracking = ("--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert command_line("run", recipe, "--store", place, *tracking) == 2
    assert re.fullmatch(f"error: --store {place}: {said}.*\n", capsys.readouterr().err)


def test_runs_need_a_place_to_be_recorded(
    bucket: Any, llama_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("run", write_recipe(tmp_path, llama_recipe), "--store", BUCKET) == 2
    assert f"--store {BUCKET}: runs cannot be recorded in a store at a URL; name an MLflow" in capsys.readouterr().err


def test_urls_travel_and_folders_stay(tmp_path: Path) -> None:
    store = Store.open(f"{BUCKET}/")
    assert store.remote == Remote(BUCKET)
    assert str(store) == BUCKET
    assert store.uri(store.root / "merge" / "ta-12345678") == f"{BUCKET}/merge/ta-12345678"
    assert str(Store.open(str(tmp_path))) == str(tmp_path)


@pytest.mark.ray
def test_a_store_works_from_any_machine(
    bucket: Any,
    llama_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path, llama_recipe)
    common = ("--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")

    def work(command: str, machine: str, store: str, *more: str) -> dict[str, Any]:
        monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / machine))
        report = tmp_path / f"{machine}.json"
        # A process of its own, which starts Ray: a cluster that was there before does not know where the server is, and
        # once a process has been in another cluster, it loses the actors that it has in the tests' own.
        words = [recipe, "--store", store, *common, "--report", report, *more]
        if command == "run here":
            assert run_here(*words) == 0
        else:
            subprocess.run([sys.executable, "-m", "pipeline", command, *map(str, words)], check=True)
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def ran(report: dict[str, Any]) -> set[str]:
        return {f"{stage['stage']} {stage['name']}" for stage in report["stages"] if stage["status"] == "run"}

    first = work("run", "a", BUCKET)
    assert first["uris"]["ta"].startswith(f"{BUCKET}/merge/ta-")
    assert bucket.exists(f"{first['uris']['ta']}/README.md")

    # Another machine has nothing to do, and starts no Ray.
    again = work("refresh", "b", BUCKET, "--address", "no such cluster")
    assert ran(again) == set()
    assert again["scores"] == first["scores"]

    # MLflow loads the champion from the URL, without anything of this machine.
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.source == first["uris"][champion.tags["variant"]]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    loaded = mlflow.transformers.load_model("models:/tiny@champion").model.state_dict()
    made = load_file(Path(first["models"][champion.tags["variant"]]) / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.items())
    assert len(mlflow.pyfunc.load_model("models:/tiny@champion").predict(["1+2="])) == 1

    # What it changes is made of what the first one made.
    changed = ("--set", "merges.ta.weight=0.45")
    third = work("run here", "b", BUCKET, *changed)
    assert ran(third) == {"merge ta", "evaluate ta/math", "evaluate ta/code"}
    assert third["variants"]["ties-sens"]["digest"] == first["variants"]["ties-sens"]["digest"]
    weights = Path(third["models"]["ta"]) / "model.safetensors"
    assert bucket.cat_file(f"{third['uris']['ta']}/model.safetensors") == weights.read_bytes()

    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "d"))
    assert command_line("verify", "--store", BUCKET) == 0
    weights_there = f"{third['uris']['ties-sens']}/model.safetensors"
    content = bytearray(bucket.cat_file(weights_there))
    content[-1] ^= 1
    bucket.pipe_file(weights_there, bytes(content))
    capsys.readouterr()
    assert command_line("verify", "--store", BUCKET) == 1
    assert "model.safetensors: other weights than were written" in capsys.readouterr().out

    # The first run is not kept, but for its champion.
    scored = {f"evaluate/{path.rpartition('/')[2]}" for path in bucket.ls(f"{BUCKET}/evaluate") if "/ta--math-" in path}
    assert command_line("gc", "--store", BUCKET, *common, "--keep", "1", "--delete") == 0
    said = capsys.readouterr().out
    freed = {name for name in scored if f"{name}: " in said}
    assert len(scored) == 2
    assert len(freed) == 1
    assert not bucket.exists(f"{BUCKET}/{freed.pop()}")
    assert bucket.exists(first["uris"]["ta"])
