"""Clusters whose nodes share nothing but a bucket."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import make_llama, perturbed, tiny_recipe, write_recipe
from tests.here import run_here
from tests.nodes.bucket import UnreliableBucket
from tests.nodes.cluster import Nodes

MLFLOW = "sqlite:///{}/mlflow.db"
SHARD = 1_000_000
"""Bytes of a shard: less than a layer has."""
WEIGHTS = "model.safetensors"
STAGES = ("statistics", "cross_task", "merge", "route", "evaluate")
WORKERS = ("one", "two", "three")
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


@pytest.fixture(scope="module")
def models(files: Any, save: Callable[..., Path]) -> dict[str, Path]:
    """A base and two experts whose weights count as large; they are at URLs too."""
    wide = {"hidden_size": 256, "intermediate_size": 512}
    found = {"base": save(make_llama(**wide), "base")}
    for seed, name in enumerate(("math", "code"), start=1):
        found[name] = save(perturbed(make_llama(**wide), seed), name)
    for name, folder in found.items():
        files.put(str(folder), f"models/{name}", recursive=True)
    return found


def recipe_of(models: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """Sens and SE, whose rows go to the folder; few scores, which are not what this is about."""
    recipe = tiny_recipe({name: Path(str(model)) for name, model in models.items()}, folder)
    del recipe["tasks"]["code"]["evaluation"]
    recipe["merges"] = {name: recipe["merges"][name] | {"shard_size": SHARD} for name in ("ta", "ties-sens")}
    recipe["merges"]["ta-se"] = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}
    return named(recipe, models)


def merge_of(models: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """The plain merge alone."""
    recipe = recipe_of(models, folder)
    return recipe | {"name": "plain", "tasks": {}, "merges": {"ta": recipe["merges"]["ta"]}}


def named(recipe: dict[str, Any], models: Mapping[str, object]) -> dict[str, Any]:
    """The recipe of models where they are."""
    return recipe | {
        "base": str(models["base"]),
        "experts": {name: {"model": str(models[name])} for name in ("math", "code")},
    }


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


def at(files: Any, store: str) -> dict[str, set[bytes]]:
    """What is in a store in the bucket, see `contents`."""
    place = store.removeprefix("s3://")
    files.invalidate_cache()
    return contents({name.removeprefix(f"{place}/"): files.cat_file(name) for name in files.find(place)})


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


def killed_at_work(nodes: Nodes, begun: str, process: "subprocess.Popen[str]") -> None:
    """Wait for a node that has begun to write what a pattern matches, and kill it."""
    while process.poll() is None:
        for name in nodes.names:
            if list(nodes.own(name).glob(f"cache/*/{begun}")):
                nodes.kill(name)
                return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_nodes_share_out_a_merge_and_read_it_once(
    nodes: Nodes, bucket: UnreliableBucket, files: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    driver = nodes.own("driver")
    write_recipe(driver, merge_of({name: f"s3://models/{name}" for name in models}, driver), "plain.yaml")
    store = "s3://models/plain"
    nodes.do("driver", "run", nodes.disk / "plain.yaml", "--store", store, "--tracking-uri", MLFLOW.format(nodes.disk))
    needed = sum((folder / WEIGHTS).stat().st_size for folder in models.values())
    assert needed <= sum(bucket.sent[f"/models/{name}/{WEIGHTS}"] for name in models) <= 1.1 * needed
    for name in nodes.names:  # each did something, and none read all
        assert list(nodes.own(name).glob(f"cache/*/hub/urls/*/*/.{WEIGHTS}.here"))
        assert not list(nodes.own(name).glob("cache/*/merge/*.partial/*.safetensors"))
    assert not list(driver.glob(f"cache/*/hub/urls/*/*/{WEIGHTS}"))
    (folder,) = files.ls("models/plain/merge")
    assert len(files.glob(f"{folder}/*.safetensors")) > 2
    assert not files.glob(f"{folder}/.bundle*")
    alone = made_here(models, tmp_path / "here")
    merged = at(files, store)
    assert merged.keys() >= {f"merge/ta/{Path(name).name}" for name in files.glob(f"{folder}/*.safetensors")}
    assert merged == {name: alone[name] for name in merged}


def test_a_bucket_is_all_that_nodes_share(
    nodes: Nodes, bucket: UnreliableBucket, files: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    driver, store = nodes.own("driver"), "s3://models/store"
    write_recipe(driver, recipe_of({name: f"s3://models/{name}" for name in models}, driver))
    bucket.busy, bucket.cut = 5, 50
    words = ["--store", store, "--tracking-uri", MLFLOW.format(nodes.disk)]

    process = nodes.begin("driver", "run", nodes.disk / "recipe.yaml", *words)
    killed_at_work(nodes, "statistics/*.partial", process)
    killed_at_work(nodes, "merge/ties-sens-*.partial/*.safetensors", process)
    said = nodes.ended(process)
    # Where no piece but the first was at work yet, it is Ray that tries again.
    assert re.search(r"statistics \w+: its node left; it begins again on another|Task check failed.*retried", said), (
        said
    )
    assert re.search(r"merge ties-sens, parts \d+ to \d+: its node left; it begins again on another", said), said
    assert not list(nodes.own("head").rglob("*"))
    assert at(files, store) == made_here(models, tmp_path / "before")
    bucket.busy = bucket.cut = 0
    assert bucket.refused
    assert bucket.broken

    after = models | {"code": changed(models["code"], tmp_path / "code")}
    files.put_file(str(after["code"] / WEIGHTS), f"models/code/{WEIGHTS}")
    said = nodes.do("driver", "refresh", nodes.disk / "recipe.yaml", *words)
    assert "download math" not in said
    made, expected = at(files, store), made_here(after, tmp_path / "after")
    assert {name: content - made[name] for name, content in expected.items() if content - made[name]} == {}

    left = f"{store}/merge/left-00000000"
    files.pipe_file(f"{left}/{WEIGHTS}", b"0" * 10_000)
    files.call_s3("create_multipart_upload", Bucket="models", Key="store/merge/left-00000000/model.safetensors")
    said = nodes.do("driver", "gc", "--keep", "1", "--delete", "--store", store)
    assert "merge/left-00000000: 10.0 kB" in said
    assert not files.exists(left)
    assert files.list_multipart_uploads("models") == []
    assert "all intact" in nodes.do("driver", "verify", "--store", store)
    assert list(nodes.disk.iterdir()) == []  # where there is no node
