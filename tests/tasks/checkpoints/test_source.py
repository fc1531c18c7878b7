"""Models listed and their headers read, with the real client of the hub against a small hub on the loopback."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save, save_file

from sensmerge.tasks.checkpoints.hub import list_commit
from sensmerge.tasks.checkpoints.listing import HubModel, ListedFile, Listing, LocalModel, parse_model_id
from sensmerge.tasks.checkpoints.source import resolve, safetensors_header
from sensmerge.tasks.errors import InputError
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
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path: Path) -> LocalModel:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in model_files().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
            os.utime(folder / name, (0, 10**9))  # written long ago
    return LocalModel(folder)


def hashed(listing: Listing, cache: Path) -> Listing:
    for file in listing.unhashed():
        listing = listing.hashed(file.name, cache)
    return listing


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


HTML = b"<html>Sign in to the network</html>"


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ((429, {"Retry-After": "30"}, b"{}"), r"answers 429 Too Many Requests \(Retry-After: 30\)"),
        ((407, {}, b""), "answers 407 Proxy Authentication Required"),
        ((200, {"Content-Type": "text/html"}, HTML), r"can be read \(.*\): look at HF_TOKEN, and for a proxy"),
    ],
)
def test_what_is_no_answer_of_the_hub(
    instead: Any, said: str, hub: HubServer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the revision named last is taken, if it is known; else that is the error."""
    commit = hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": b"x"})
    source = HubModel(REPO, "main")
    before = hub.instead
    hub.instead = instead
    with pytest.raises(InputError, match=f"{said}; nothing of it is cached"):
        list_commit(source, cache)
    hub.instead = before
    listing = list_commit(source, cache)
    hub.instead = instead
    assert list_commit(source, cache) == listing
    assert re.search(f"{said}; taking {commit[:12]}, which it was the last time\n$", capsys.readouterr().err)


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


def test_header_of_a_file_that_the_model_lacks(hub: HubServer, cache: Path) -> None:
    hub.add_repo(REPO, model_files())
    with pytest.raises(InputError, match=r"has no file 'model-00002-of-00002\.safetensors', which its index names"):
        safetensors_header(resolve(MAIN, cache), "model-00002-of-00002.safetensors", cache)


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


def test_local_digests_are_kept(local: LocalModel, cache: Path) -> None:
    weights = local.folder / "model.safetensors"
    listing = resolve(local, cache)
    assert [file.name for file in listing.unhashed()] == ["model.safetensors"]
    listing = hashed(listing, cache)
    assert listing.files[1].digest == f"blake3:{blake3(weights.read_bytes()).hexdigest()}"
    # The same size, time and inode with other bytes: only a listing that reads them again could tell.
    stat = weights.stat()
    zeros = b"\0" * stat.st_size
    weights.write_bytes(zeros)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert resolve(local, cache) == listing
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert resolve(local, cache).unhashed()
    assert hashed(resolve(local, cache), cache).files[1].digest == f"blake3:{blake3(zeros).hexdigest()}"


def test_weights_that_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model/checkpoint-500").mkdir(parents=True)
    (tmp_path / "model/config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "model/checkpoint-500/model.safetensors")
    with pytest.raises(InputError, match=r"no weights found at its top level; .* folders checkpoint-500 with"):
        resolve(LocalModel(tmp_path / "model"), tmp_path / "cache")
    resolve(parse_model_id("model", tmp_path, "checkpoint-500"), tmp_path / "cache")
