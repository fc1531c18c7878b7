"""Models stay what they were planned as, or whoever reads them is told."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensmerge.tasks.checkpoints import digests, unchanged
from sensmerge.tasks.checkpoints.listing import HubModel, Listing, LocalModel
from sensmerge.tasks.checkpoints.source import fetch_files, resolve, verify
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.errors import InputError
from tests.hub_server import HubServer

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(llamas: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(llamas["math"], tmp_path / "math")


@pytest.fixture
def models(folder: Path, tmp_path: Path) -> PlannedModels:
    return PlannedModels((hashed(resolve(LocalModel(folder), tmp_path), tmp_path),), tmp_path)


def hashed(listing: Listing, cache: Path) -> Listing:
    for file in listing.unhashed():
        listing = listing.hashed(file.name, cache)
    return listing


def flip(path: Path) -> None:
    """Change one bit, and with it the time."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def add_ten(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: one + 10 for name, one in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def new_shard(folder: Path) -> None:
    save_file({"other": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: flip(folder / WEIGHTS), WEIGHTS),
        (lambda folder: flip(folder / "config.json"), "config.json"),
        (lambda folder: flip(folder / "tokenizer.json"), "tokenizer.json"),
        (add_ten, WEIGHTS),
        (new_shard, "model-00001-of-00001.safetensors"),
    ],
)
def test_what_changed_is_named(change: Callable[[Path], None], named: str, models: PlannedModels, folder: Path) -> None:
    models.check()
    change(folder)
    for _ in range(2):
        with pytest.raises(InputError, match=f"{named} changed after it was planned; run again"):
            models.check()


def test_a_file_that_is_gone(models: PlannedModels, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read any more"):
        models.check()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read any more"):
        models.states()


def test_the_same_content_in_another_file(models: PlannedModels, folder: Path) -> None:
    before = models.states()
    shutil.copyfile(folder / WEIGHTS, folder / "copy")
    (folder / "copy").rename(folder / WEIGHTS)
    models.check()
    assert models.states() != before


def test_nothing_is_read_twice(models: PlannedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time_ns() + 2 * digests.SETTLED
    monkeypatch.setattr(unchanged.time, "time_ns", lambda: later)
    models.check()
    monkeypatch.setattr(unchanged, "verify", verify_nothing)
    monkeypatch.setattr(digests, "compute", verify_nothing)
    models.check()


def test_files_that_were_just_written_are_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = (folder / WEIGHTS).stat().st_mtime_ns
    monkeypatch.setattr(unchanged.time, "time_ns", lambda: written + digests.SETTLED // 2)
    models = PlannedModels((hashed(resolve(LocalModel(folder), tmp_path), tmp_path),), tmp_path)
    models.check()
    flip(folder / WEIGHTS)
    os.utime(folder / WEIGHTS, ns=(written, written))  # within one tick of the file system's clock
    with pytest.raises(InputError, match=r"model\.safetensors changed after it was planned"):
        models.check()


def verify_nothing(*_: object) -> None:
    raise AssertionError("read again")


def test_a_model_of_the_hub(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.add_repo("org/name", {path.name: path.read_bytes() for path in folder.iterdir()})
    listing = resolve(HubModel("org/name", "main"), tmp_path / "cache")
    verify(listing, tmp_path / "cache")
    models = PlannedModels((listing,), tmp_path / "cache")
    models.check()
    asked = len(hub.requests)
    flip((listing.folder / WEIGHTS).resolve())
    with pytest.raises(InputError, match=r"hub:org/name@main: model\.safetensors changed after it was downloaded"):
        models.check()
    assert len(hub.requests) == asked
    fetch_files(listing, [WEIGHTS], tmp_path / "cache")  # what is damaged is fetched again
    models.check()
