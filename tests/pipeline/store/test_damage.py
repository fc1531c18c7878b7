"""Artifacts that were damaged since: never used, named by verify, made again by a run; and never a traceback."""

import json
from pathlib import Path

import pytest

from sensmerge.pipeline.store.history import past_runs, remember, unfinished_runs
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.store.verify import find_damage, is_intact
from sensmerge.tasks.artifacts import write_json

NONE_OF_THEM = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"files": 1}',
    b"9" * 5000,
    b'{"a": 1, "a": 2}',
]


def key(weight: float = 0.4) -> Key:
    return Key("merge", "ta", {"stage": "merge", "version": 1, "weight": weight})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.partial(key()).mkdir(parents=True)
    write_json(store.partial(key()) / "scores.json", {"accuracy": 0.5})
    store.publish(key(), {"result": {}})
    assert store.manifest(key()) is not None
    return store


@pytest.mark.parametrize(
    "content",
    [
        *NONE_OF_THEM,
        b'{"fingerprint": "", "files": {}, "checksums": {"gone.json": "a"}}',
        b'{"fingerprint": "", "files": {"a": 1}, "checksums": {"a": 1}}',
        b'{"fingerprint": "", "files": {}, "checksums": []}',
    ],
)
def test_a_manifest_that_is_none(content: bytes, store: Store) -> None:
    folder = store.folder(key())
    (folder / "manifest.json").write_bytes(content)
    assert store.manifest(key()) is None
    assert store.why(key()) == "manifest.json is damaged"
    assert list(find_damage(store)) == [(folder, ["manifest.json cannot be read"])]
    assert not is_intact(folder, "scores.json")
    assert store.lacking(store.uri(folder)) == f"{folder} is not there"
    store.partial(key()).mkdir()
    store.publish(key(), {"result": {}})
    assert store.manifest(key()) is not None


@pytest.mark.parametrize("content", NONE_OF_THEM)
def test_a_fingerprint_that_is_none(content: bytes, store: Store) -> None:
    (store.folder(key()) / "fingerprint.json").write_bytes(content)
    assert store.why(key(0.5)) in ("new", "made by another version of sensmerge")


def test_a_flipped_bit_in_a_file_that_keeps_its_size(store: Store) -> None:
    scores = store.folder(key()) / "scores.json"
    scores.write_text(scores.read_text().replace("0.5", "0.9"))
    assert store.manifest(key()) is None
    assert store.why(key()) == "scores.json is damaged"
    assert list(find_damage(store)) == [(store.folder(key()), ["scores.json has other content"])]
    (store.folder(key()) / "scores.json").write_text("")
    assert store.why(key()) in ("files were cut", "scores.json is damaged")
    scores.unlink()
    assert store.why(key()) == "files are gone"


def test_what_was_read_once_is_looked_at_again_when_it_changes(store: Store) -> None:
    assert store.manifest(key()) is not None
    assert store.manifest(key()) is not None
    scores = store.folder(key()) / "scores.json"
    before = scores.stat()
    scores.write_text(scores.read_text().replace("0.5", "0.7"))
    assert scores.stat().st_mtime_ns != before.st_mtime_ns
    assert store.manifest(key()) is None


@pytest.mark.parametrize("content", [*NONE_OF_THEM, b'{"recipe": "tiny"}', json.dumps({"x": 1}).encode()])
def test_runs_that_are_none_are_left_out(content: bytes, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    remember(store, "tiny", "run", [key()], None)
    (store.root / "runs" / "0.json").write_bytes(content)
    (store.root / "runs" / "unfinished").mkdir()
    (store.root / "runs" / "unfinished" / "tiny.json").write_bytes(content)
    assert [run.recipe for run in past_runs(store)] == ["tiny"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{store.root}/runs/0.json: tells no run (")
    assert unfinished_runs(store) == []
