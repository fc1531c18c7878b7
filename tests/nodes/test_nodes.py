"""Clusters whose nodes share nothing but a bucket."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_recipe, write_recipe
from tests.here import run_here
from tests.nodes.bucket import UnreliableBucket
from tests.nodes.cluster import Nodes

STORE = "s3://models/store"
WEIGHTS = "model.safetensors"
STAGES = ("statistics", "cross_task", "merge", "route", "evaluate")
WORKERS = ("one", "two")
CAN_UNSHARE = not subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not CAN_UNSHARE, reason="needs the right to mount folders")]


@pytest.fixture(scope="module")
def bucket() -> Iterator[UnreliableBucket]:
    with UnreliableBucket() as server:
        yield server


@pytest.fixture(scope="module")
def files(bucket: UnreliableBucket) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patched:
        for key, value in bucket.environment.items():
            patched.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        system = fsspec.filesystem("s3")
        system.mkdir("models")
        yield system
        # moto keeps one state for all servers of a process.
        bucket.busy = bucket.cut = 0
        system.rm("models", recursive=True)


@pytest.fixture(scope="module")
def nodes(bucket: UnreliableBucket, files: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path_factory.mktemp("nodes"), bucket.environment)
    try:
        cluster.start(*WORKERS)
        yield cluster
    finally:
        cluster.stop()


def recipe_of(models: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """Sens and SE on the tiny models, whose rows go to the folder; few scores, which are not what this is about."""
    recipe = tiny_recipe({name: Path(str(model)) for name, model in models.items()}, folder)
    del recipe["tasks"]["code"]["evaluation"]
    recipe["merges"] = {name: recipe["merges"][name] for name in ("ties-sens",)}
    recipe["merges"]["ta-se"] = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}
    recipe["base"] = str(models["base"])
    recipe["experts"] = {name: {"model": str(models[name])} for name in ("math", "code")}
    return recipe


def changed(folder: Path, target: Path) -> Path:
    """A copy of a model with one other tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(target / WEIGHTS)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def made_here(models: Mapping[str, Path], folder: Path) -> dict[str, set[bytes]]:
    """What a run on this machine alone makes, see `contents`."""
    folder.mkdir()
    recipe = write_recipe(folder, recipe_of(models, folder))
    assert run_here(recipe, "--store", folder / "store") == 0
    found = [path for path in (folder / "store").rglob("*") if path.is_file()]
    return contents({path.relative_to(folder / "store").as_posix(): path.read_bytes() for path in found})


def contents(files: Mapping[str, bytes]) -> dict[str, set[bytes]]:
    """The weights, routing statistics and scores of a store's artifacts, by stage and what they are of.

    The name of a folder ends with a fingerprint, which tells models at a URL from those of a folder.
    """
    found: dict[str, set[bytes]] = {}
    for name, content in files.items():
        stage, _, rest = name.partition("/")
        folder, _, file = rest.partition("/")
        if stage in STAGES and file.endswith((".safetensors", "scores.json", "distances.json")):
            found.setdefault(f"{stage}/{folder[:-9]}/{file}", set()).add(content)
    return found


def killed_at_work(nodes: Nodes, step: str, process: "subprocess.Popen[str]") -> None:
    """Wait for a node that has begun to write weights in a step, and kill it."""
    while process.poll() is None:
        for name in WORKERS:
            if list(nodes.own(name).glob(f"cache/*/{step}-*.partial/{WEIGHTS}")):
                nodes.kill(name)
                return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_a_bucket_is_all_that_nodes_share(
    nodes: Nodes, bucket: UnreliableBucket, files: Any, llamas: dict[str, Path], tmp_path: Path
) -> None:
    driver = nodes.own("driver")
    for name, folder in llamas.items():
        files.put(str(folder), f"models/{name}", recursive=True)
    write_recipe(driver, recipe_of({name: f"s3://models/{name}" for name in llamas}, driver))
    bucket.busy, bucket.cut = 5, 50
    words = ["--store", STORE, "--tracking-uri", f"sqlite:///{nodes.disk}/mlflow.db"]

    def there() -> dict[str, set[bytes]]:
        found = files.find("models/store")
        return contents({name.removeprefix("models/store/"): files.cat_file(name) for name in found})

    process = nodes.begin("driver", "run", nodes.disk / "recipe.yaml", *words)
    killed_at_work(nodes, "merge/ties-sens", process)
    said = nodes.ended(process)
    assert "merge ties-sens: its node left; it begins again on another" in said, said
    for name in WORKERS:  # both did something, for themselves
        assert list(nodes.own(name).glob("cache/*/*/*/manifest.json"))
        assert list(nodes.own(name).glob(f"cache/*/hub/urls/*/*/{WEIGHTS}"))
    assert not list(driver.glob(f"cache/*/hub/urls/*/*/{WEIGHTS}"))
    assert not list(nodes.own("head").rglob("*"))
    assert there() == made_here(llamas, tmp_path / "before")

    files.put_file(str(changed(llamas["code"], tmp_path / "code") / WEIGHTS), f"models/code/{WEIGHTS}")
    said = nodes.do("driver", "refresh", nodes.disk / "recipe.yaml", *words)
    assert "download math" not in said
    assert "all intact" in nodes.do("driver", "verify", "--store", STORE)
    assert bucket.refused
    assert bucket.broken
    assert list(nodes.disk.iterdir()) == []  # where there is no node
