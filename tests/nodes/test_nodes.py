"""Clusters whose nodes share nothing but a bucket."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from sensmerge.pipeline.execute.pieces import AHEAD
from sensmerge.pipeline.store.cache import LIMIT
from sensmerge.tasks.checkpoints.layers import group_by_layer
from tests.conftest import make_llama, perturbed, tiny_recipe, write_recipe
from tests.here import run_here
from tests.nodes.bucket import UnreliableBucket
from tests.nodes.cluster import Nodes

MLFLOW = "sqlite:///{}/mlflow.db"
SHARD = 1_000_000
"""Bytes of a shard: less than a layer has."""
CACHE_BYTES = 5_000_000
"""What a node keeps of models and artifacts: less than it reads in a run."""
SMALL_FILES = 500_000
"""Bytes that configs, tokenizers, rows and records take on a node at most."""
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
    cluster = Nodes(tmp_path_factory.mktemp("nodes"), bucket.environment | {LIMIT: str(CACHE_BYTES)})
    try:
        cluster.start(*WORKERS)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def models(request: pytest.FixtureRequest, files: Any, save: Callable[..., Path]) -> dict[str, Path]:
    """A base and two experts of some layers, whose weights count as large; they are at URLs too."""
    wide = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": request.param}
    found = {"base": save(make_llama(**wide), "base")}
    for seed, name in enumerate(("math", "code"), start=1):
        found[name] = save(perturbed(make_llama(**wide), seed), name)
    for name, folder in found.items():
        for path in folder.iterdir():
            files.put_file(str(path), f"models/{name}/{path.name}")
    return found


def recipe_of(
    models: Mapping[str, object], folder: Path, placement: object = "streamed", is_scored: bool = False
) -> dict[str, Any]:
    """Sens and SE, whose rows go to the folder; few scores or none, which are not what this is about."""
    recipe = tiny_recipe({name: Path(str(model)) for name, model in models.items()}, folder)
    for task in ("code",) if is_scored else ("code", "math"):
        del recipe["tasks"][task]["evaluation"]
    recipe["merges"] = {
        "ties-sens": recipe["merges"]["ties-sens"] | {"shard_size": SHARD},
        "ta-se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}},
    }
    recipe["resources"] = {stage: {"resources": {"worker": 0.5}} for stage in ("statistics", "merge", "evaluate")}
    return named(recipe, models) | {"placement": placement}


def merge_of(models: Mapping[str, object]) -> dict[str, Any]:
    """A plain merge."""
    merge = {"method": "task_arithmetic", "weight": 0.5, "shard_size": SHARD}
    return named({"name": "plain", "merges": {"ta": merge}}, models)


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


def layer_bytes(folder: Path) -> list[int]:
    """The size of each layer of a model."""
    found = load_file(folder / WEIGHTS)
    return [sum(found[name].nbytes for name in names) for names in group_by_layer(found).values()]


def made_here(recipe: dict[str, Any], folder: Path) -> dict[str, set[bytes]]:
    """What a run on this machine alone makes, see `contents`; rows are in the folder."""
    assert run_here(write_recipe(folder, recipe), "--store", folder / "store") == 0
    found = [path.relative_to(folder / "store").as_posix() for path in (folder / "store").rglob("*") if path.is_file()]
    return contents(found, lambda name: (folder / "store" / name).read_bytes())


def at(files: Any, store: str) -> dict[str, set[bytes]]:
    """What is in a store in the bucket, see `contents`."""
    place = store.removeprefix("s3://")
    files.invalidate_cache()
    found = [name.removeprefix(f"{place}/") for name in files.find(place)]
    return contents(found, lambda name: files.cat_file(f"{place}/{name}"))


def contents(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, set[bytes]]:
    """The weights, routing statistics and scores of a store's artifacts, by stage and what they are of.

    The name of a folder ends with a fingerprint, which tells models at a URL from those of a folder.
    """
    found: dict[str, set[bytes]] = {}
    for name in names:
        stage, _, rest = name.partition("/")
        folder, _, file = rest.partition("/")
        if stage in STAGES and file.endswith((".safetensors", "scores.json", "distances.json")):
            found.setdefault(f"{stage}/{folder[:-9]}/{file}", set()).add(read(name))
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


@pytest.mark.parametrize("models", [14], indirect=True)
def test_nodes_share_out_a_merge_and_read_it_once(
    nodes: Nodes, bucket: UnreliableBucket, files: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    driver = nodes.own("driver")
    write_recipe(driver, merge_of({name: f"s3://models/{name}" for name in models}), "plain.yaml")
    store = "s3://models/plain"
    words = ["--store", store, "--tracking-uri", MLFLOW.format(nodes.disk)]
    with nodes.watched() as disks:
        nodes.do("driver", "run", nodes.disk / "plain.yaml", *words)
    needed = sum((folder / WEIGHTS).stat().st_size for folder in models.values())
    assert needed <= sum(bucket.sent[f"/models/{name}/{WEIGHTS}"] for name in models) <= 1.1 * needed
    for name in nodes.names:  # each did something, and none read all
        assert list(nodes.own(name).glob(f"cache/*/hub/urls/*/*/.{WEIGHTS}.here"))
        assert not list(nodes.own(name).glob("cache/*/merge/*.partial/*.safetensors"))
    assert not list(driver.glob(f"cache/*/hub/urls/*/*/{WEIGHTS}"))
    (folder,) = files.ls("models/plain/merge")
    assert len(files.glob(f"{folder}/*.safetensors")) > 2
    assert not files.glob(f"{folder}/.bundle*")
    layers = layer_bytes(models["base"])
    # What it keeps, what one piece reads, and what it makes; all that it reads in the end would be more.
    bound = CACHE_BYTES + (len(models) + AHEAD) * max(layers) + SMALL_FILES
    assert max(disks.values()) <= bound < len(models) * sum(layers) / len(WORKERS), disks
    merged = at(files, store)
    assert merged.keys() >= {f"merge/ta/{Path(name).name}" for name in files.glob(f"{folder}/*.safetensors")}
    assert merged == made_here(merge_of(models), tmp_path)


@pytest.mark.parametrize("models", [2], indirect=True)
def test_a_bucket_is_all_that_nodes_share(
    nodes: Nodes, bucket: UnreliableBucket, files: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    driver, store = nodes.own("driver"), "s3://models/store"
    at_urls = {name: f"s3://models/{name}" for name in models}
    write_recipe(driver, recipe_of(at_urls, driver, {"actors": 2}))
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
    bucket.busy = bucket.cut = 0
    assert at(files, store) == made_here(recipe_of(models, tmp_path), tmp_path)
    assert bucket.refused
    assert bucket.broken

    after = models | {"code": changed(models["code"], tmp_path / "code")}
    files.put_file(str(after["code"] / WEIGHTS), f"models/code/{WEIGHTS}")
    # One node is left, and no room for two actors.
    write_recipe(driver, recipe_of(at_urls, driver, is_scored=True))
    said = nodes.do("driver", "refresh", nodes.disk / "recipe.yaml", *words)
    assert "download math" not in said
    made, expected = at(files, store), made_here(recipe_of(after, tmp_path, is_scored=True), tmp_path)
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
