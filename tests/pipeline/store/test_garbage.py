"""What a store keeps: for champions, challengers, the last runs, and runs that have not ended."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from sensmerge.pipeline.store.garbage import delete, find_garbage, needed_artifacts
from sensmerge.pipeline.store.history import begin, remember
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.tracking.registry import Registered
from sensmerge.pipeline.tracking.versions import known_versions
from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.serving.lease import Lease
from tests.conftest import command_line

SIZE = 1000


def key(number: int, stage: str = "merge") -> Key:
    return Key(stage, "ta", {"stage": stage, "settings": {"weight": number}, "reads": {}})


def publish(store: Store, one: Key) -> Path:
    store.partial(one).mkdir(parents=True)
    (store.partial(one) / "data").write_bytes(bytes(SIZE))
    if one.stage == "download":
        write_json(store.partial(one) / "files.json", {"revision": None})
    store.publish(one, {"result": {}})
    return store.folder(one)


def garbage_names(store: Store, last: int = 1, registered: Sequence[Registered] = ()) -> list[str]:
    found = find_garbage(store, needed_artifacts(store, last, registered))
    return [folder.name for folder in found.folders]


def test_the_last_runs_of_each_recipe_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folders = [publish(store, key(number)) for number in range(4)]
    for number in range(3):
        remember(store, "one", "run", [key(number)], None)
    remember(store, "two", "refresh", [key(3)], None)
    assert garbage_names(store) == sorted(folder.name for folder in folders[:2])
    assert garbage_names(store, last=2) == [folders[0].name]
    assert garbage_names(store, last=3) == []


def test_what_is_registered_stays_wherever_the_store_is_mounted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = (publish(store, key(number)) for number in range(2))
    for number in range(2):
        remember(store, "one", "run", [key(number)], None)
    assert garbage_names(store) == [old.name]
    for place in (f"file:///elsewhere/merge/{old.name}", f"s3://bucket/team/merge/{old.name}"):
        assert garbage_names(store, registered=[Registered("one", "1", place, "champion of one", False)]) == []
        assert garbage_names(store, registered=[Registered("one", "1", place, None, False)]) == [old.name]
    assert garbage_names(store, registered=[Registered("one", "1", new.as_uri(), "champion of one", False)]) == [
        old.name
    ]


def test_an_interrupted_run_can_go_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, key(0))
    remember(store, "one", "run", [key(0)], None)
    begin(store, "one", "run", [key(1), key(2)], None)
    publish(store, key(1))
    store.partial(key(2)).mkdir()
    store.partial(key(3)).mkdir()  # of a run that nobody will continue
    assert garbage_names(store) == [store.partial(key(3)).name]
    store.partial(key(2)).rmdir()
    publish(store, key(2))
    remember(store, "one", "run", [key(1), key(2)], None)
    assert set(garbage_names(store)) == {store.folder(key(0)).name, store.partial(key(3)).name}


def test_only_what_was_listed_is_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = (publish(store, key(number)) for number in range(2))
    remember(store, "one", "run", [key(1)], None)
    (tmp_path / "mlflow.db").write_text("runs")
    delete(store, find_garbage(store, needed_artifacts(store, 1, [])))
    assert not old.exists()
    assert store.manifest(key(1)) is not None
    assert new.is_dir()
    assert (tmp_path / "mlflow.db").exists()


def test_rows_stay_with_the_artifacts_that_were_made_with_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sets = [[{"number": number}] for number in range(2)]
    stored = [StoredRows.of(rows, store.rows) for rows in sets]
    made = [Key("route", "se", {"stage": "route", "rows": {"digest": one.digest}}) for one in stored]
    for number, one in enumerate(made):
        stored[number].write(sets[number])
        publish(store, one)
        remember(store, "one", "run", [one], None)
    found = find_garbage(store, needed_artifacts(store, 1, []))
    assert found.rows == [stored[0].path]
    assert found.freed[f"rows/{stored[0].path.name}"] == stored[0].path.stat().st_size
    delete(store, found)
    assert [one.path.exists() for one in stored] == [False, True]


def test_bytes_that_links_share_count_where_the_last_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second, third = (publish(store, key(number)) for number in range(3))
    for folder in (second, third):
        (folder / "data").unlink()
        os.link(first / "data", folder / "data")
    remember(store, "one", "run", [key(2)], None)
    freed = find_garbage(store, needed_artifacts(store, 1, [])).freed
    assert len(freed) == 2
    assert sum(freed.values()) < SIZE  # the third keeps the bytes
    remember(store, "one", "run", [], None)
    assert SIZE < sum(find_garbage(store, needed_artifacts(store, 1, [])).freed.values()) < 6 * SIZE


def hub_model(store: Store, commit: str, content: bytes, shared: bytes) -> None:
    """A commit in the cache as huggingface_hub lays it out."""
    repo = store.hub_cache / "models--team--expert"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir(exist_ok=True)
    for name, data in (("model.safetensors", content), ("config.json", shared)):
        blob = repo / "blobs" / f"{len(data):040d}"
        blob.write_bytes(data)
        link = repo / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_commits_of_hub_models_go_with_the_runs_that_used_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = "a" * 40, "b" * 40
    for number, (commit, size) in enumerate(((old, 3000), (new, 4000))):
        hub_model(store, commit, bytes(size), bytes(10))
        one = key(number, "download")
        store.partial(one).mkdir(parents=True)
        write_json(store.partial(one) / "files.json", {"revision": commit})
        store.publish(one, {"result": {}})
        remember(store, "one", "run", [one], None)
    garbage = find_garbage(store, needed_artifacts(store, 1, []))
    assert garbage.revisions == [old]
    assert garbage.freed[f"hub:team/expert@{old[:12]}"] == 3000
    begin(store, "one", "refresh", [key(2, "download")], None)
    assert find_garbage(store, needed_artifacts(store, 1, [])).revisions == []
    remember(store, "one", "refresh", [key(1, "download")], None)
    delete(store, find_garbage(store, needed_artifacts(store, 1, [])))
    snapshots = store.hub_cache / "models--team--expert" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [new]
    assert (snapshots / new / "model.safetensors").stat().st_size == 4000
    assert (snapshots / new / "config.json").stat().st_size == 10


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///{folder}/moved.db"])
def test_without_the_registry_nothing_is_deleted(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    champion = publish(store, key(0))
    where = uri.format(folder=tmp_path)
    remember(store, "one", "refresh", [key(0)], where)
    remember(store, "one", "refresh", [key(1)], where)
    assert command_line("gc", "--store", store.root, "--keep", "1", "--delete") == 2
    error = capsys.readouterr().err
    assert where in error
    assert error.count("\n") == 1
    assert champion.is_dir()


def test_mlflow_of_the_environment_is_asked_as_well_as_those_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only one of them knows stays; the environment has the password that the history leaves out."""
    asked: list[str] = []
    monkeypatch.setattr("sensmerge.pipeline.tracking.versions.check_server", asked.append)
    monkeypatch.setattr("sensmerge.pipeline.tracking.versions.registered_versions", lambda uri: [])
    store = Store(tmp_path)
    remember(store, "one", "refresh", [key(0)], "http://user:secret@mlflow/a")
    remember(store, "one", "refresh", [key(1)], "http://mlflow/b")
    assert asked == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow/a")
    assert set(known_versions(store, None)) == {"http://mlflow/b", "http://user:secret@mlflow/a"}
    assert asked == ["http://mlflow/b", "http://user:secret@mlflow/a"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow/c")
    known_versions(store, None)
    assert asked[2:] == ["http://mlflow/a", "http://mlflow/b", "http://mlflow/c"]
    known_versions(store, "http://mlflow/d")
    assert asked[5:] == ["http://mlflow/d"]


def test_what_a_server_has_loaded_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    served, other = publish(store, key(0)), publish(store, key(1))
    lease = Lease(str(served))
    ended = tmp_path / "leases" / f"merge--{other.name}" / "a.json"
    ended.parent.mkdir(parents=True)
    ended.write_text('{"host": "gone", "renewed": "2020-01-01T00:00:00+00:00"}')
    assert command_line("gc", "--store", tmp_path, "--delete") == 0
    assert f"kept: served by {socket.gethostname()}" in capsys.readouterr().out
    assert served.is_dir()
    assert not other.exists()
    assert not ended.exists()
    lease.release()
    assert command_line("gc", "--store", tmp_path, "--delete") == 0
    assert not served.exists()
