"""The download stage, with the real client of the hub against a small hub on the loopback."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from huggingface_hub import constants
from safetensors.torch import save

from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.checkpoints.listing import HubModel, ListedFile, Listing, LocalModel
from sensmerge.tasks.checkpoints.source import resolve, safetensors_header, small_files
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages.download import DownloadJob, listed_files
from tests.hub_server import HubServer
from tests.tasks.checkpoints import test_source
from tests.tasks.checkpoints.test_source import MAIN, REPO, hashed, model_files

cache, local = test_source.cache, test_source.local


def test_download_lists_fetches_and_verifies(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    files = model_files()
    commit = hub.add_repo(REPO, files)
    listing = resolve(MAIN, cache)
    assert [file.name for file in listing.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert listing.files[1].digest == f"sha256:{sha256(files['model.safetensors']).hexdigest()}"
    assert [file.name for file in listing.missing()] == ["model.safetensors", "tokenizer.json"]

    result = DownloadJob(listing, cache).finish(tmp_path / "out")
    total = sum(len(files[file.name]) for file in listing.files)
    assert result == {"folder": str(listing.folder), "revision": commit, "bytes": total}
    assert {path.name: path.read_bytes() for path in listing.folder.iterdir()} == {
        file.name: files[file.name] for file in listing.files
    }
    written = json.loads((tmp_path / "out/files.json").read_text())
    assert written["source"] == "hub:org/name@main"
    assert [ListedFile(**file) for file in written["files"]] == [*listing.files] == listed_files(written)
    assert listing.missing() == ()

    hub.requests.clear()
    assert DownloadJob(listing, cache).finish(tmp_path / "again") == result
    assert hub.requests == []


def test_small_files_travel_from_known_subfolders(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    wanted = {
        "preprocessor_config.json": b"{}",
        "sentencepiece.bpe.model": b"s",
        "tekken.json": b"{}",
        "LICENSE.md": b"l",
        "additional_chat_templates/rag.jinja": b"{{ x }}",
        "1_Pooling/config.json": b"{}",
        "2_Dense/model.safetensors": save({"linear.weight": torch.ones(2, 2)}),
    }
    left = ["README.md", ".gitattributes", "optimizer.pt", "trainer_state.json", "training_args.bin"]
    left += ["onnx/config.json", "original/params.json", "1_Pooling/pooling.py", "2_Dense/pytorch_model.bin"]
    files = model_files() | wanted | dict.fromkeys(left, b"left")
    hub.add_repo(REPO, files)
    listing = resolve(MAIN, cache)
    names = {"config.json", "model.safetensors", "tokenizer.json"} | wanted.keys()
    assert {file.name for file in listing.files} == names

    small_files(listing, cache)
    lacking = [file.name for file in listing.missing()]
    assert lacking == ["2_Dense/model.safetensors", "model.safetensors"]
    DownloadJob(listing, cache).finish(tmp_path / "out")
    assert {file.name: (listing.folder / file.name).read_bytes() for file in listing.files} == {
        name: files[name] for name in names
    }

    folder = tmp_path / "local"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert {file.name for file in resolve(LocalModel(folder), cache).files} == names


def test_git_digest_is_the_one_of_git(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    files = model_files()
    hub.add_repo(REPO, files)
    (tmp_path / "config.json").write_bytes(files["config.json"])
    blob = subprocess.run([git, "hash-object", tmp_path / "config.json"], capture_output=True, text=True, check=True)
    listing = resolve(MAIN, cache)
    assert listing.files[0].digest == f"git:{blob.stdout.strip()}"
    DownloadJob(listing, cache).finish(tmp_path / "out")


def test_moving_branch_does_not_move_a_listing(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    first = hub.add_repo(REPO, model_files(seed=1))
    before = resolve(MAIN, cache)
    second = hub.add_repo(REPO, model_files(seed=2))
    after = resolve(MAIN, cache)
    assert (before.revision, after.revision) == (first, second)
    for listing, seed in ((before, 1), (after, 2)):
        DownloadJob(listing, cache).finish(tmp_path / "out")
        assert (listing.folder / "model.safetensors").read_bytes() == model_files(seed)["model.safetensors"]


def test_broken_transfer_is_resumed(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    files = model_files(size=300_000)
    size, written = len(files["model.safetensors"]), constants.DOWNLOAD_CHUNK_SIZE  # what came is written by the chunk
    hub.add_repo(REPO, files)
    hub.cut["model.safetensors"] = written + 50_000
    listing = resolve(MAIN, cache)
    DownloadJob(listing, cache).finish(tmp_path / "out")
    assert [(r.range, r.sent) for r in hub.fetched("model.safetensors")] == [
        (None, written + 50_000),
        (f"bytes={written}-", size - written),
    ]
    assert (listing.folder / "model.safetensors").read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_checksum_is_refused_and_forgotten(name: str, hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, model_files())
    listing = resolve(MAIN, cache)
    hub.corrupt.add(name)
    expected = next(file.digest for file in listing.files if file.name == name)
    with pytest.raises(InputError, match=rf"{name} is damaged: expected .* {expected}, found twice .*"):
        DownloadJob(listing, cache).finish(tmp_path / "out")
    assert len(hub.fetched(name)) == 2
    assert [file.name for file in listing.missing()] == [name]
    assert not os.path.lexists(listing.folder / name)
    assert not (tmp_path / "out").exists()

    hub.corrupt.clear()
    DownloadJob(listing, cache).finish(tmp_path / "out")
    assert (listing.folder / name).read_bytes() == model_files()[name]


def test_file_damaged_on_the_disk_is_fetched_again(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, model_files())
    listing = resolve(MAIN, cache)
    DownloadJob(listing, cache).finish(tmp_path / "out")
    with (listing.folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    hub.requests.clear()
    DownloadJob(listing, cache).finish(tmp_path / "out")
    assert len(hub.fetched("model.safetensors")) == 1
    assert (listing.folder / "model.safetensors").read_bytes() == model_files()["model.safetensors"]


@pytest.mark.parametrize("how", ["stopped", "HF_HUB_OFFLINE"])
def test_offline_repeat(how: str, hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add_repo(REPO, model_files())
    listing = resolve(MAIN, cache)
    result = DownloadJob(listing, cache).finish(tmp_path / "out")
    hub.requests.clear()
    if how == "stopped":
        hub.stop()
    else:  # the library reads the variable when it is imported
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(MAIN, cache) == listing
    assert resolve(HubModel(REPO, commit), cache).files == listing.files
    assert small_files(listing, cache) == listing.folder
    assert DownloadJob(listing, cache).finish(tmp_path / "again") == result
    assert hub.requests == []
    with pytest.raises(InputError) as caught:
        resolve(HubModel(REPO, "v2"), cache)
    for text in (hub.endpoint, REPO, "v2", f"cached: main → {commit[:12]}"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_with_a_partial_snapshot(
    hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo(REPO, model_files())
    listing = resolve(MAIN, cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be reached .*; nothing of it is cached"):
        safetensors_header(listing, "model.safetensors", cache)
    with pytest.raises(InputError, match=r"cannot be reached .*; nothing of it is cached"):
        DownloadJob(listing, cache).finish(tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot be reached .*; nothing of it is cached"):
        resolve(HubModel(REPO, commit[::-1]), cache)


def test_no_room(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, model_files())
    known = resolve(MAIN, cache)
    huge = Listing(MAIN, known.folder, known.revision, (ListedFile("model.safetensors", 10**18, "sha256:0"),))
    with pytest.raises(InputError, match=rf"{10**18} bytes to download, but .* has room for \d+"):
        DownloadJob(huge, cache).finish(tmp_path / "out")
    assert hub.fetched("model.safetensors") == []


def test_room_is_not_needed_for_what_another_commit_brought(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, model_files())
    DownloadJob(resolve(MAIN, cache), cache).finish(tmp_path / "out")
    hub.add_repo(REPO, model_files() | {"config.json": b"{}"})
    listing = resolve(MAIN, cache)
    assert [file.name for file in listing.missing()] == ["model.safetensors", "tokenizer.json"]
    blob = listing.files[1].digest.partition(":")[2]
    huge = replace(listing, files=(listing.files[0], ListedFile("model.safetensors", 10**18, f"sha256:{blob}")))
    with pytest.raises(InputError, match=f"expected {10**18} bytes"):  # past the check for room, to that of the size
        DownloadJob(huge, cache).finish(tmp_path / "out")


def test_header_is_read_without_the_file(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, model_files(size=50_000))
    listing = resolve(MAIN, cache)
    small_files(listing, cache)
    header = safetensors_header(listing, "model.safetensors", cache)
    assert header == {"weight": TensorInfo("F32", (50_000, 10), "model.safetensors")}
    (transfer,) = hub.fetched("model.safetensors")
    assert transfer.sent <= 100_001
    assert [file.name for file in listing.missing()] == ["model.safetensors"]

    DownloadJob(listing, cache).finish(tmp_path / "out")
    hub.requests.clear()
    assert safetensors_header(listing, "model.safetensors", cache) == header
    assert hub.requests == []


def test_verified_files_are_not_read_again(
    hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, model_files())
    listing = resolve(MAIN, cache)
    DownloadJob(listing, cache).finish(tmp_path / "out")
    read: list[str] = []
    compute = digests.compute
    monkeypatch.setattr(digests, "compute", lambda path, kind: read.append(path.name) or compute(path, kind))
    DownloadJob(listing, cache).finish(tmp_path / "again")
    assert read == ["config.json", "tokenizer.json"]  # small files of git
    weights = (listing.folder / "model.safetensors").resolve()
    weights.write_bytes(b"\0" * weights.stat().st_size)
    DownloadJob(listing, cache).finish(tmp_path / "again")
    assert weights.read_bytes() == model_files()["model.safetensors"]
    assert read.count("model.safetensors") == 2  # the bad ones and the new ones


def test_files_listed_by_an_earlier_version() -> None:
    assert listed_files({"files": [{"name": "config.json", "size": 2, "sha256": "ab"}]}) == [
        ListedFile("config.json", 2, "sha256:ab")
    ]


def test_local_folder_is_referenced(local: LocalModel, cache: Path, tmp_path: Path) -> None:
    listing = hashed(resolve(local, cache), cache)
    assert [(file.name, file.digest) for file in listing.files] == [
        (name, f"blake3:{blake3(model_files()[name]).hexdigest()}")
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    total = sum(file.size for file in listing.files)
    assert DownloadJob(listing, cache).finish(tmp_path / "out") == {
        "folder": str(local.folder),
        "revision": None,
        "bytes": total,
    }
    written = json.loads((tmp_path / "out/files.json").read_text())
    assert listed_files(written) == [*listing.files]


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_local_file_changed_after_planning(change: str, local: LocalModel, cache: Path, tmp_path: Path) -> None:
    listing = hashed(resolve(local, cache), cache)
    name = "merges.txt" if change == "added" else "tokenizer.json"
    if change == "removed":
        (local.folder / name).unlink()
    else:
        (local.folder / name).write_text("other")
    with pytest.raises(InputError, match=f"{name} changed"):
        DownloadJob(listing, cache).finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()
