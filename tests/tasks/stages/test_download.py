"""The download stage, with the real client of the hub against a small hub on the loopback."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.checkpoints.listing import HubModel, ListedFile, Listing, LocalModel, parse_model_id
from sensmerge.tasks.checkpoints.source import resolve, safetensors_header, small_files
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages.download import DownloadJob
from tests.hub_server import HubServer

REPO = "org/name"
MAIN = HubModel(REPO, "main")


def model_files(seed: int = 0, size: int = 2000) -> dict[str, bytes]:
    weights = torch.randn(size, 10, generator=torch.Generator().manual_seed(seed))
    return {
        "config.json": json.dumps({"model_type": "llama", "seed": seed}).encode(),
        "model.safetensors": save({"weight": weights}),
        "tokenizer.json": b'{"version": "1.0"}',
        "modeling_evil.py": b"print('never fetched')",
        "pytorch_model.bin": b"never fetched",
        "consolidated.safetensors": b"never fetched",
        "onnx/model.safetensors": b"never fetched",
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_model_strings(tmp_path: Path) -> None:
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    assert parse_model_id("../models/base", tmp_path / "recipes") == LocalModel(tmp_path / "models/base")
    assert parse_model_id("hub:org/name", tmp_path) == HubModel("org/name", "main")
    assert parse_model_id("hub: org/name@refs/pr/1", tmp_path) == HubModel("org/name", "refs/pr/1")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert parse_model_id("~/base", tmp_path / "elsewhere") == LocalModel(tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/name", "no such folder .* write hub:org/name"),
        ("org/name@main", "no such folder .* write hub:org/name@main"),
        ("../gone", "no such folder [^;]*$"),
        ("hub:a/b/c", "not the id of a repository"),
        ("hub:../b", "not the id of a repository"),
        ("hub:org/name@../../evil", "cannot be a revision"),
    ],
)
def test_bad_model_strings(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parse_model_id(text, tmp_path)


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
    assert {file["name"]: (file["size"], file["sha256"]) for file in written["files"]} == {
        file.name: (len(files[file.name]), sha256(files[file.name]).hexdigest()) for file in listing.files
    }
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


def test_unknown_repository(hub: HubServer, cache: Path) -> None:
    with pytest.raises(InputError, match=f"no repository {REPO} at {hub.endpoint}"):
        resolve(MAIN, cache)


@pytest.mark.parametrize("revision", ["v2", "0" * 40])
def test_unknown_revision(revision: str, hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files())
    with pytest.raises(InputError, match=f"no branch, tag or commit '{revision}'"):
        resolve(HubModel(REPO, revision), cache)


def test_gated_repository(hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files())
    hub.gated.add(REPO)
    with pytest.raises(InputError, match="restricts access"):
        resolve(MAIN, cache)


def test_bad_token(hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files())
    hub.bad_token = True
    with pytest.raises(InputError, match=r"refuses access \(401\)"):
        resolve(MAIN, cache)


def test_pickle_only(hub: HubServer, cache: Path) -> None:
    files = model_files()
    del files["model.safetensors"], files["consolidated.safetensors"]
    hub.add_repo(REPO, files)
    with pytest.raises(InputError, match=r"only in pickle form \(pytorch_model.bin\).*save_pretrained"):
        resolve(MAIN, cache)


def test_no_weights(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no weights found"):
        resolve(LocalModel(tmp_path), cache)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "a/../../evil.json", "..\\evil.safetensors"]
)
def test_names_outside_the_folder(name: str, hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files() | {name: b"evil"})
    with pytest.raises(InputError, match="do not use this model"):
        resolve(MAIN, cache)
    with pytest.raises(InputError, match="not a plain file name"):
        ListedFile(name, 4, "sha256:0")


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


def test_header_of_a_file_that_the_model_lacks(hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files())
    with pytest.raises(InputError, match=r"has no file 'model-00002-of-00002\.safetensors', which its index names"):
        safetensors_header(resolve(MAIN, cache), "model-00002-of-00002.safetensors", cache)


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


def test_header_without_the_hub(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model_files())
    listing = resolve(MAIN, cache)
    hub.stop()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's pauses between its attempts, 23 s in all
    with pytest.raises(InputError, match=rf"hub at {hub.endpoint} cannot be reached \(.*refused\); nothing of it"):
        safetensors_header(listing, "model.safetensors", cache)


def test_header_of_a_file_that_is_not_safetensors(hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files() | {"model.safetensors": b"not safetensors"})
    with pytest.raises(InputError, match=r"model.safetensors is not a safetensors file"):
        safetensors_header(resolve(MAIN, cache), "model.safetensors", cache)


@pytest.fixture
def local(tmp_path: Path) -> LocalModel:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in model_files().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return LocalModel(folder)


def test_local_folder_is_referenced(local: LocalModel, cache: Path, tmp_path: Path) -> None:
    listing = resolve(local, cache)
    assert [(file.name, file.digest) for file in listing.files] == [
        (name, f"sha256:{sha256(model_files()[name]).hexdigest()}")
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    total = sum(file.size for file in listing.files)
    assert DownloadJob(listing, cache).finish(tmp_path / "out") == {
        "folder": str(local.folder),
        "revision": None,
        "bytes": total,
    }
    written = json.loads((tmp_path / "out/files.json").read_text())
    assert [f"sha256:{file['sha256']}" for file in written["files"]] == [file.digest for file in listing.files]


def test_local_digests_are_kept(local: LocalModel, cache: Path) -> None:
    weights = local.folder / "model.safetensors"
    listing = resolve(local, cache)
    # The same size and time with other bytes: only a listing that reads them again could tell.
    stat = weights.stat()
    zeros = b"\0" * stat.st_size
    weights.write_bytes(zeros)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert resolve(local, cache) == listing
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert resolve(local, cache).files[1].digest == f"sha256:{sha256(zeros).hexdigest()}"


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_local_file_changed_after_planning(change: str, local: LocalModel, cache: Path, tmp_path: Path) -> None:
    listing = resolve(local, cache)
    name = "merges.txt" if change == "added" else "tokenizer.json"
    if change == "removed":
        (local.folder / name).unlink()
    else:
        (local.folder / name).write_text("other")
    with pytest.raises(InputError, match=f"{name} changed"):
        DownloadJob(listing, cache).finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("checkpoint-500/model.safetensors", r"no weights found at its top level; .* some in checkpoint-500: give a"),
        ("consolidated.safetensors", r"no weights found .* in Mistral's own layout; expected a copy in the Hugging"),
    ],
)
def test_weights_that_lie_elsewhere(file: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "model" / file).parent.mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "model" / file)
    with pytest.raises(InputError, match=found):
        resolve(LocalModel(tmp_path / "model"), tmp_path / "cache")
