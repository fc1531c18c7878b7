"""Artifacts: published whole or not at all, found by what they depend on."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.errors import InputError


def key(weight: float = 0.4, expert: str = "a" * 64) -> Key:
    inputs = {"stage": "merge", "version": 1, "settings": {"weight": weight}, "math": {"fingerprint": expert}}
    return Key("merge", "ta", inputs)


def publish(store: Store, one: Key) -> Path:
    store.partial(one).mkdir(parents=True)
    (store.partial(one) / "data").write_text("x")
    store.publish(one, {"seconds": 1.0})
    return store.folder(one)


def test_publish_and_find(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.manifest(key()) is None
    folder = publish(store, key())
    assert folder.name == f"ta-{key().fingerprint[:8]}"
    manifest = store.manifest(key())
    assert manifest is not None
    assert (manifest["fingerprint"], manifest["seconds"]) == (key().fingerprint, 1.0)
    assert not store.partial(key()).exists()


def test_a_folder_without_manifest_does_not_exist(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (publish(store, key()) / "manifest.json").unlink()
    assert store.manifest(key()) is None
    assert (publish(store, key()) / "data").exists()


def test_what_a_kill_left_of_a_file_is_no_part_of_an_artifact(tmp_path: Path) -> None:
    """A kill between writing the manifest and renaming it; then the step is completed."""
    store = Store(tmp_path)
    (store.partial(key()) / "inner").mkdir(parents=True)
    for left in (".manifest.json.partial", ".data.partial", "inner/.table.json.partial"):
        (store.partial(key()) / left).write_text("{")
    (store.partial(key()) / "data").write_text("x")
    store.publish(key(), {"seconds": 1.0})
    manifest = store.manifest(key())
    assert manifest is not None
    assert manifest["files"].keys() == {"data", "fingerprint.json"}
    assert {path.name for path in store.folder(key()).iterdir()} == {
        "data",
        "fingerprint.json",
        "manifest.json",
        "inner",
    }
    assert list((store.folder(key()) / "inner").iterdir()) == []


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    """Also those that safetensors writes for their owner alone."""
    before = os.umask(0o027)
    try:
        store = Store(tmp_path / "store")
        folder = store.partial(key()) / "vectors"
        folder.mkdir(parents=True)
        save_file({"weight": torch.ones(2)}, folder / "group.safetensors")
        (tmp_path / "another").touch(mode=0o600)
        os.link(tmp_path / "another", folder / "linked")
        store.publish(key(), {})
    finally:
        os.umask(before)
    rights = {path.name: path.stat().st_mode & 0o777 for path in store.folder(key()).rglob("*")}
    assert rights.pop("linked") == 0o600  # what it is a second name of is somebody else's
    assert rights.pop("vectors") == 0o750
    assert rights == dict.fromkeys(("group.safetensors", "manifest.json", "fingerprint.json"), 0o640)


def test_fingerprint_depends_on_content_and_order_and_not_on_the_name() -> None:
    assert Key("merge", "other name", key().inputs).fingerprint == key().fingerprint
    assert Key("merge", "ta", dict(reversed(key().inputs.items()))).fingerprint != key().fingerprint
    assert key(0.5).fingerprint != key().fingerprint


def test_why(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.why(key()) == "new"
    publish(store, key())
    assert store.why(key(weight=0.5)) == "settings.weight: 0.4 → 0.5"
    assert store.why(key(expert="b" * 64)) == "math changed"
    assert store.why(Key("merge", "ta", {"of": "another form"})) == "made by another version of sensmerge"
    store.partial(key(0.5)).mkdir(parents=True)
    assert store.why(key(0.5)) == "was interrupted"


def test_an_artifact_that_lost_a_file_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = publish(store, key())
    (folder / "data").unlink()
    assert store.manifest(key()) is None
    assert store.why(key()) == "files are gone"
    assert (publish(store, key()) / "data").is_file()
    (folder / "data").write_text("cut, or longer")
    assert store.manifest(key()) is None


def test_names_that_begin_alike_are_not_confused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, Key("merge", "ta-sens", {"stage": "merge", "settings": {}, "reads": {}}))
    assert store.why(key()) == "new"


def test_lock_is_held_across_processes_and_released(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sensmerge.pipeline.store.store import Store\n"
        "with Store(Path(sys.argv[1])).lock(): print('ok')"
    )

    def other() -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)

    with Store(tmp_path).lock():
        assert "locked by another run" in other().stderr
    assert other().stdout == "ok\n"


def test_a_run_waits_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from pathlib import Path; from sensmerge.pipeline.store.store import Store\n"
        "with Store(Path(sys.argv[1])).lock(): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match=r"locked by another run still, after 0\.5 s"), Store(tmp_path).lock(0.5):
            pass
        threading.Timer(1, other.stdin.close).start()
        with Store(tmp_path).lock(60):
            assert other.wait(60) == 0
    assert "waiting for it, 60 s at most" in capsys.readouterr().err


def test_store_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--store .*file: cannot be made"), Store(tmp_path / "file").lock():
        pass
