"""`keep: best`: weights of variants that lost against another one of their sweep go, and come back where needed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.freed import free
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.tracking.uri import default_uri
from tests.conftest import command_line, tiny_recipe, write_recipe
from tests.here import run_here

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def place(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that has run, `recipe.yaml`, and its report and store."""
    folder = tmp_path_factory.mktemp("keep")
    recipe = tiny_recipe(llamas, folder)
    recipe["merges"] = {"ta": {"method": "task_arithmetic", "weight": [0.2, 0.4, 0.6], "keep": "best"}}
    write_recipe(folder, recipe)
    assert run(folder) == 0
    return folder


def run(folder: Path, *options: object) -> int:
    (path,) = folder.glob("*.yaml")
    return run_here(path, "--store", folder / "store", "--report", folder / "report.json", *options)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def with_weights(folder: Path) -> set[str]:
    """The variants whose weights are there."""
    return {
        name
        for name, role in report_of(folder)["roles"].items()
        if role == "variant" and (Path(report_of(folder)["models"][name]) / WEIGHTS).is_file()
    }


def test_weights_go_and_come_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, store = report_of(place), Store(place / "store")
    best = report["sweeps"]["ta"]["best"]
    assert with_weights(place) == {best}
    capsys.readouterr()

    # What went is no damage, and its step need not run.
    assert command_line("verify", "--store", store.root) == 0
    assert ", all intact" in capsys.readouterr().out
    (path,) = place.glob("*.yaml")
    assert command_line("plan", path, "--store", store.root) == 0
    assert "steps are in the store" in capsys.readouterr().out

    # Its version says so, and is not promoted.
    client = MlflowClient(default_uri(store), default_uri(store))
    versions = {one.tags["variant"]: one for one in client.search_model_versions(f"name = '{report['recipe']}'")}
    assert {name for name, one in versions.items() if "weights" in one.tags} == versions.keys() - {best}
    loser = min(versions.keys() - {best})
    assert command_line("promote", f"{report['recipe']}/{versions[loser].version}", "--store", store.root) == 2
    assert re.search(rf"{WEIGHTS} was freed \(`keep: best`.*with `keep: all` a run makes it", capsys.readouterr().err)

    # A variant that an alias names stays, when all are made again for rows that they were not scored on.
    client.set_registered_model_alias(report["recipe"], "mine", versions[loser].version)
    digests = {name: one["digest"] for name, one in report["variants"].items()}
    assert run(place, "--set", "tasks.math.evaluation.samples=5") == 0
    out = capsys.readouterr().out
    assert "freed: the weights of ta-weight-" in out
    again = report_of(place)
    assert {name: one["digest"] for name, one in again["variants"].items()} == digests
    assert with_weights(place) == {again["sweeps"]["ta"]["best"], loser}
    made = {one["name"] for one in again["stages"] if one["stage"] == "merge" and one["status"] == "run"}
    assert made == versions.keys() - {best}

    # With all kept, the rest comes back.
    recipe = yaml.safe_load(path.read_text())
    recipe["merges"]["ta"]["keep"] = "all"
    write_recipe(place, recipe)
    assert run(place) == 0
    assert with_weights(place) == versions.keys()
    tags = [one.tags for one in client.search_model_versions(f"name = '{report['recipe']}'")]
    assert [one.get("weights") for one in tags] == [None] * 3


def test_in_a_store_at_a_url(
    llamas: dict[str, Path], bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(llamas, tmp_path)
    recipe["merges"] = {"ta": {"method": "task_arithmetic", "weight": [0.2, 0.4], "keep": "best"}}
    options = (write_recipe(tmp_path, recipe), "--store", "s3://models/store", "--report", tmp_path / "report.json")
    tracking = ("--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}")

    def weights_of_variants() -> list[str]:
        bucket.invalidate_cache()
        return [path for path in bucket.find("models/store/merge") if path.endswith(WEIGHTS)]

    assert run_here(*options, *tracking) == 0
    (kept,) = weights_of_variants()
    assert f"/{report_of(tmp_path)['sweeps']['ta']['best']}-" in kept
    assert command_line("verify", "--store", "s3://models/store") == 0

    # Another machine makes again what it needs, and frees it again.
    shutil.rmtree(Store.open("s3://models/store").root)
    capsys.readouterr()
    assert run_here(*options, *tracking, "--set", "tasks.math.evaluation.samples=5") == 0
    assert "freed: the weights of ta-weight-" in capsys.readouterr().out
    (kept,) = weights_of_variants()
    assert f"/{report_of(tmp_path)['sweeps']['ta']['best']}-" in kept
    made = {one["name"] for one in report_of(tmp_path)["stages"] if one["stage"] == "merge" and one["status"] == "run"}
    assert len(made) == 1


def test_a_kill_in_between_leaves_files_that_the_next_call_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, key = Store(tmp_path), Key("merge", "ta", {"weight": 1})
    store.partial(key).mkdir(parents=True)
    for name in (WEIGHTS, "config.json"):
        (store.partial(key) / name).write_text("x" * 9)
    store.publish(key, {"result": {}})

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            free(store, key, [WEIGHTS])
    manifest = store.manifest(key)
    assert manifest is not None
    assert manifest["freed"] == {WEIGHTS: 9}
    assert (store.folder(key) / WEIGHTS).exists()
    lacking = store.lacking(store.uri(store.folder(key)))
    assert lacking is not None
    assert "was freed" in lacking
    assert free(store, key, [WEIGHTS]) == 0
    assert not (store.folder(key) / WEIGHTS).exists()
    assert store.manifest(key) == manifest


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"keep": "best"}, "keep says whose weights of a sweep stay, and this is no sweep"),
        ({"weight": [1, 2], "keep": "none"}, r"merges\.ta\.keep: found 'none'; expected all or best"),
    ],
)
def test_keep_is_of_sweeps(entry: dict[str, Any], said: str) -> None:
    models = {"name": "r", "base": {"model": "b"}, "experts": {"math": {"model": "m"}, "code": {"model": "c"}}}
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate(models | {"merges": {"ta": {"method": "task_arithmetic"} | entry}})
