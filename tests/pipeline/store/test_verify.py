"""Damage of a store is found, deleted and made good; what nobody needs is freed."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.store.verify import find_damage
from sensmerge.pipeline.tracking.registry import ModelRegistry
from sensmerge.tasks.artifacts import read_json, sha256_file, write_json
from tests.conftest import command_line, do_steps, plan_of, write_recipe
from tests.here import run_here
from tests.hub_server import HubServer


def publish(store: Store, one: Key) -> Path:
    store.partial(one).mkdir(parents=True)
    for name in ("first", "second"):
        (store.partial(one) / name).write_text(f"content of {name}")
    store.publish(one, {"result": {}})
    return store.folder(one)


def damage(store: Store) -> dict[str, list[str]]:
    return {folder.name: wrong for folder, wrong in find_damage(store) if wrong}


def test_files_that_are_gone_cut_or_altered(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = publish(store, Key("sensitivity", "math", {}))
    assert damage(store) == {}
    (folder / "first").write_text("Content of first")
    (folder / "second").write_text("cut")
    (folder / "fingerprint.json").unlink()
    (wrong,) = damage(store).values()
    assert sorted(wrong) == [
        "fingerprint.json is gone",
        "first has other content",
        "second has 3 bytes instead of 17",
    ]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_file_that_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    store, key = Store(tmp_path), Key("sensitivity", "math", {})
    folder = publish(store, key)
    (folder / "first").unlink()
    (folder / "first").symlink_to("/proc/self/mem")  # reading it fails, as from a broken disk
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["first"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage(store) == {folder.name: ["first has other content"]}
    assert Store(tmp_path).manifest(key) is None
    assert Store(tmp_path).why(key) == "first is damaged"


@pytest.mark.parametrize("version", [2, 3])
def test_models_of_the_hub_are_read_again_and_local_ones_left_alone(version: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_text("weights")
    sha256 = sha256_file(weights)
    digest = {"sha256": sha256} if version == 2 else {"digest": f"sha256:{sha256}"}
    files = [{"name": weights.name, "size": 7} | digest]
    for name, revision in (("local", None), ("remote", "a" * 40)):
        one = Key("download", name, {"name": name})
        store.partial(one).mkdir(parents=True)
        write_json(store.partial(one) / "files.json", {"folder": str(model), "revision": revision, "files": files})
        store.publish(one, {"result": {}})
    assert damage(store) == {}
    weights.write_text("Weights")
    assert list(damage(store).values()) == [[f"{weights} has other content"]]


def test_a_damaged_download_is_made_good(
    hub: HubServer, llama_recipe: dict[str, Any], llamas: dict[str, Path], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in llamas["math"].iterdir()}
    hub.add_repo("team/math", files)
    llama_recipe["experts"]["math"]["model"] = "hub:team/math"
    plan = plan_of(tmp_path, llama_recipe)
    do_steps(replace(plan, steps=(plan.step("download", "math"),)))
    weights = (plan.models()["math"] / "model.safetensors").resolve()
    stat = weights.stat()
    last = files["model.safetensors"][-1]
    # As a bad disk would: neither size nor time tells.
    weights.write_bytes(files["model.safetensors"][:-1] + bytes([last ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    ((folder, _),) = damage(plan.store).items()
    assert plan.artifact("download", "math").name == folder
    plan.store.remove(plan.artifact("download", "math"))
    again = plan_of(tmp_path, llama_recipe)
    do_steps(replace(again, steps=(again.step("download", "math"),)))
    assert weights.read_bytes() == files["model.safetensors"]
    assert damage(plan.store) == {}


def test_a_store_is_verified_healed_and_tidied(
    llama_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del llama_recipe["tasks"]
    llama_recipe["merges"] = {
        "ta": {"method": "task_arithmetic"},
        "ta-sharded": {"method": "task_arithmetic", "shard_size": 20_000},
    }
    recipe, store = write_recipe(tmp_path, llama_recipe), tmp_path / "store"

    def run(*more: str) -> str:
        capsys.readouterr()
        assert run_here(recipe, "--store", store, *more) == 0
        return capsys.readouterr().out

    run("--set", "merges.ta.weight=0.3")
    (first,) = (store / "merge").glob("ta-????????")
    run("--set", "merges.ta.weight=0.4")
    (second,) = set((store / "merge").glob("ta-????????")) - {first}
    assert command_line("verify", "--store", store) == 0
    assert "all intact" in capsys.readouterr().out

    weights = second / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert command_line("verify", "--store", store, "--delete") == 1
    said = capsys.readouterr().out
    assert f"merge/{second.name}: model.safetensors: other weights than were written" in said
    assert "1 of them damaged; deleted" in said
    assert "1 of 5 steps to run" in run("--set", "merges.ta.weight=0.4")
    assert weights.read_bytes() == before

    def free(*more: str) -> str:
        assert command_line("gc", "--store", store, "--keep", "1", *more) == 0
        return capsys.readouterr().out

    assert f"merge/{first.name}: " in free()
    registry = ModelRegistry(f"sqlite:///{store}/mlflow.db", "tiny")
    registry.promote(registry.find("1"))
    assert "kept: champion of tiny" in free("--delete")
    registry.promote(registry.find("3"))
    assert "kept: former champion of tiny" in free("--delete")
    assert first.is_dir()
    MlflowClient(registry_uri=registry.uri).delete_registered_model_alias("tiny", "champion")
    assert f"merge/{first.name}: " in free("--delete")
    assert not first.exists()
    assert command_line("verify", "--store", store) == 0


def test_a_store_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "gc"):
        assert command_line(command, "--store", tmp_path / "none") == 2
        assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
