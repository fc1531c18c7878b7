"""Models listed and their headers read, with the real client of the hub against a small hub on the loopback."""

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from blake3 import blake3
from huggingface_hub import close_session
from safetensors.torch import save, save_file

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


ODD = {
    200: "answers with something else than JSON, as a login page does; check HF_ENDPOINT and the proxy",
    407: "a proxy before the hub asks for a login (407); put its user and password into HTTPS_PROXY",
    418: "answers 418 I'm a Teapot; try again later",
    429: "has had too many requests (429); try again in 30 s, or log in, which allows more",
}
"""What is said of a page of HTML, by its status."""


@pytest.mark.parametrize("status", ODD)
def test_whoever_answers_in_place_of_the_hub_is_named(status: int, hub: HubServer, cache: Path) -> None:
    hub.page = status
    with pytest.raises(InputError) as caught:
        resolve(MAIN, cache)
    assert str(caught.value).endswith(f"{ODD[status]}; nothing of it is cached")


@pytest.mark.parametrize("status", [*ODD, 500, 502])
def test_where_the_hub_does_not_answer_as_one_the_last_commit_is_used_and_that_is_said(
    status: int, hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.add_repo(REPO, model_files())
    before = resolve(MAIN, cache)
    hub.page = status
    assert resolve(MAIN, cache) == before
    if status in ODD:  # of the others the hub's own library says it
        assert f"{ODD[status]}; the commit that it named the last time is used: {commit}" in caplog.text


@pytest.fixture
def closed_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A proxy that connects nobody who does not log in, in front of a hub."""

    class Refusing(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_response(407)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        close_session()  # it has asked the environment for proxies
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
        yield
        server.shutdown()
    close_session()


NOT_CONNECTED = (
    "the hub at https://hub.example.org cannot be reached (407 Proxy Authentication Required); check the proxy, and if "
    "it asks for a login (407), put its user and password into HTTPS_PROXY"
)


def test_a_proxy_that_does_not_connect(closed_proxy: None, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        resolve(MAIN, cache)
    assert str(caught.value).endswith(f"{NOT_CONNECTED}; nothing of it is cached")


def test_behind_a_proxy_that_does_not_connect_the_last_commit_is_used(
    hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    commit = hub.add_repo(REPO, model_files())
    before = resolve(MAIN, cache)
    request.getfixturevalue("closed_proxy")
    assert resolve(MAIN, cache) == before
    assert f"{NOT_CONNECTED}; the commit that it named the last time is used: {commit}" in caplog.text


def test_a_token_that_cannot_be_one(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    with pytest.raises(InputError, match=r"the token of the hub .* holds a character that no token has; set it again"):
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
