"""How much of what came from URLs stays on a machine's disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensmerge.pipeline.store import cache
from sensmerge.pipeline.store.bring import bring
from sensmerge.pipeline.store.cache import make_room
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.checkpoints import url
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.held import held
from sensmerge.tasks.checkpoints.listing import UrlModel
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.errors import InputError

WEIGHTS = "model.safetensors"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store at a URL, on a machine where everything but the smallest files counts as large."""
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LARGE", 10_000)
    monkeypatch.setattr(cache, "SMALL", 10_000)
    store = Store.open(f"file://{tmp_path}/shared")
    store.make()
    return store


@pytest.fixture
def models(store: Store, llamas: dict[str, Path]) -> dict[str, PlannedModels]:
    """Models at URLs that are here, the first of them used first."""
    found = {}
    for time, name in enumerate(("base", "math")):
        listing = resolve(UrlModel(llamas[name].as_uri()), store.hub_cache)
        found[name] = PlannedModels((listing,), store.hub_cache)
        found[name].bring()
        with held([listing.folder]):
            pass
        os.utime(listing.folder.with_name(f".{listing.folder.name}.used"), (time, time))
    return found


def folder_of(models: PlannedModels) -> Path:
    return models.listings[0].folder


def allow(monkeypatch: pytest.MonkeyPatch, models: PlannedModels, times: float) -> None:
    size = (folder_of(models) / WEIGHTS).stat().st_blocks * 512
    monkeypatch.setenv("SENSMERGE_CACHE_BYTES", str(int(size * times)))


def test_what_was_used_last_stays(
    store: Store, models: dict[str, PlannedModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room(store)  # without a bound
    allow(monkeypatch, models["base"], 2)
    make_room(store)
    assert all((folder_of(one) / WEIGHTS).exists() for one in models.values())
    allow(monkeypatch, models["base"], 1.5)
    make_room(store)
    assert not (folder_of(models["base"]) / WEIGHTS).exists()
    assert (folder_of(models["base"]) / "config.json").exists()
    assert (folder_of(models["math"]) / WEIGHTS).exists()
    models["base"].bring()
    open_checkpoint(folder_of(models["base"])).read("model.norm.weight")


def test_what_is_held_stays(store: Store, models: dict[str, PlannedModels], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE_BYTES", "1")
    program = f"""
import sys
from pathlib import Path
from sensmerge.tasks.checkpoints.held import held
with held([Path({str(folder_of(models["base"]))!r})]):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        make_room(store)
        assert (folder_of(models["base"]) / WEIGHTS).exists()
        assert not (folder_of(models["math"]) / WEIGHTS).exists()
        other.stdin.close()
    make_room(store)
    assert not (folder_of(models["base"]) / WEIGHTS).exists()


def test_of_a_model_in_use_tensors_go_that_nobody_reads(
    store: Store, models: dict[str, PlannedModels], llamas: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE_BYTES", "1")
    monkeypatch.setattr(url, "LARGE", 1)
    folder, large = folder_of(models["math"]), "model.embed_tokens.weight"
    path, whole = folder / WEIGHTS, load_file(llamas["math"] / WEIGHTS)
    others = {name for name in whole if name != large}
    program = f"""
import os
from pathlib import Path
from sensmerge.tasks.checkpoints.held import held
hold = held([Path({str(folder)!r})])
hold.__enter__()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)  # killed, it leaves a note that all is read
    size = path.stat().st_blocks
    with held([folder], {path: [large]}), held([folder], {path: ["model.norm.weight"]}):
        make_room(store)
    assert path.stat().st_blocks < size
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read(large), whole[large])
    assert torch.equal(checkpoint.read("model.norm.weight"), whole["model.norm.weight"])
    with pytest.raises(InputError, match="is not on this machine"):
        checkpoint.read(min(others - {"model.norm.weight"}))
    models["math"].check()
    models["math"].bring({path: others})
    assert all(torch.equal(checkpoint.read(name), one) for name, one in whole.items())
    with held([folder]), held([folder], {}):
        make_room(store)
    assert path.read_bytes() == (llamas["math"] / WEIGHTS).read_bytes()


def test_an_artifact_comes_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE_BYTES", "1")
    key = Key("merge", "one", {"one": 1})
    store.partial(key).mkdir(parents=True)
    for name, size in (("large", 20_000), ("small", 10)):
        (store.partial(key) / name).write_bytes(bytes(size))
    store.publish(key, {"result": {}})
    folder = store.folder(key)
    bring(store, folder, "run")
    with held([folder]):
        make_room(store)
        assert (folder / "large").exists()
    make_room(store)
    assert not (folder / "large").exists()
    assert (folder / "small").exists()
    bring(store, folder, "run")  # although this process had it
    assert (folder / "large").read_bytes() == bytes(20_000)


def test_what_is_nowhere_else_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE_BYTES", "1")
    partial = store.partial(Key("merge", "one", {"one": 1}))
    partial.mkdir(parents=True)
    (partial / "large").write_bytes(bytes(20_000))
    make_room(store)
    assert (partial / "large").exists()


@pytest.mark.parametrize("text", ["0", "-1", "5 GB", "1e9"])
def test_no_number_of_bytes(text: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE_BYTES", text)
    with pytest.raises(InputError, match=f"SENSMERGE_CACHE_BYTES is '{text}'; expected a number of bytes"):
        make_room(store)
