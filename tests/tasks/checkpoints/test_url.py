"""Models at URLs, on a real S3-compatible server on loopback."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sensmerge.tasks.checkpoints import sparse, url
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.header import read_header
from sensmerge.tasks.checkpoints.listing import Listing, UrlModel, parse_model_id
from sensmerge.tasks.checkpoints.source import bring, resolve, safetensors_header, small_files, verify
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.remote import RemoteFolder

WEIGHTS = "model.safetensors"
URL = "s3://models/experts/math"


@pytest.fixture
def folder(llamas: dict[str, Path], bucket: Any) -> Path:
    """A model that is at the URL as well."""
    bucket.put(str(llamas["math"]), URL, recursive=True)
    bucket.pipe_file(f"{URL}/checkpoint-10/{WEIGHTS}", b"never fetched")
    bucket.pipe_file(f"{URL}/training_args.bin", b"never fetched")
    return llamas["math"]


@pytest.fixture
def listing(folder: Path, tmp_path: Path) -> Listing:
    return resolve(parse_model_id(f"{URL}/", tmp_path), tmp_path)


def changed(folder: Path, tmp_path: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: one + 1 for name, one in tensors.items()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return tmp_path / WEIGHTS


def test_a_model_is_listed_and_its_header_read_before_its_weights_come(
    listing: Listing, folder: Path, tmp_path: Path
) -> None:
    assert listing.source == UrlModel(URL)
    assert {file.name: file.size for file in listing.files} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    assert listing.unhashed() == ()
    small = small_files(listing, tmp_path)
    assert (small / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert safetensors_header(listing, WEIGHTS, tmp_path) == read_header(folder / WEIGHTS)
    assert [file.name for file in listing.missing()] == [WEIGHTS]


def test_weights_come_once_and_are_known_again(
    listing: Listing, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = PlannedModels((listing,), tmp_path)
    states = models.states()
    models.bring()
    models.check()
    assert (listing.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert models.states() == states  # whether files are here or not
    monkeypatch.setattr(RemoteFolder, "bring", None)
    models.bring()  # reads nothing again


def test_what_somebody_wrote_to_is_fetched_again(listing: Listing, folder: Path, tmp_path: Path) -> None:
    bring(listing, tmp_path)
    path = listing.folder / WEIGHTS
    path.write_bytes(path.read_bytes()[::-1])
    models = PlannedModels((listing,), tmp_path)
    with pytest.raises(InputError, match=f"{WEIGHTS} changed after it was downloaded"):
        models.check()
    models.bring()
    models.check()
    assert path.read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_model_that_changes_at_its_url_is_another_one(
    listing: Listing, folder: Path, bucket: Any, tmp_path: Path
) -> None:
    verify(listing, tmp_path)
    small_files(listing, tmp_path)
    bucket.put_file(str(changed(folder, tmp_path)), f"{URL}/{WEIGHTS}")
    for read in (verify, bring):
        with pytest.raises(InputError, match=f"model {URL}: {WEIGHTS} changed after it was planned; run again"):
            read(listing, tmp_path)
    assert not (listing.folder / WEIGHTS).exists()
    again = resolve(UrlModel(URL), tmp_path)
    assert again.folder != listing.folder
    bring(again, tmp_path)
    assert (again.folder / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_the_same_content_written_again_is_the_same_model(
    listing: Listing, folder: Path, bucket: Any, tmp_path: Path
) -> None:
    bucket.put_file(str(folder / WEIGHTS), f"{URL}/{WEIGHTS}")
    assert resolve(UrlModel(URL), tmp_path) == listing


def test_a_header_that_lies(listing: Listing, bucket: Any, tmp_path: Path) -> None:
    bucket.pipe_file(f"{URL}/{WEIGHTS}", b"\xff" * 1000)
    listing = resolve(UrlModel(URL), tmp_path)
    with pytest.raises(InputError, match=f"^model {URL}: {WEIGHTS}: truncated or corrupt safetensors file"):
        safetensors_header(listing, WEIGHTS, tmp_path)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://models/nothing", "model s3://models/nothing: no file is there; check the URL, and that you may list it"),
        ("s3://no-such-bucket/a", "model s3://no-such-bucket/a: no file is there; check the URL"),
        ("nothing://models/a", "model nothing://models/a: cannot be used .*Protocol not known"),
        ("https://user:secret@host/a", "the URL holds a password or token; leave it out"),
        ("https://host/a?token=secret", "the URL holds a password or token; leave it out"),
    ],
)
def test_places_that_are_none(place: str, said: str, bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as raised:
        resolve(parse_model_id(place, tmp_path), tmp_path)
    assert "secret" not in str(raised.value)


def test_a_model_without_weights(listing: Listing, bucket: Any, tmp_path: Path) -> None:
    bucket.rm(f"{URL}/{WEIGHTS}")
    with pytest.raises(InputError, match=rf"model {URL}: no weights found.*name one of the folders checkpoint-10"):
        resolve(UrlModel(URL), tmp_path)


def test_a_subfolder(folder: Path, tmp_path: Path) -> None:
    assert parse_model_id("s3://models/experts", tmp_path, "math") == UrlModel(URL)


def test_a_folder_may_be_named_as_a_url(folder: Path, tmp_path: Path) -> None:
    listing = resolve(UrlModel(folder.as_uri()), tmp_path)
    bring(listing, tmp_path)
    assert (listing.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    shutil.rmtree(listing.folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges of files that are asked for; all weights count as large."""
    ranges: list[tuple[int, int]] = []
    read = RemoteFolder.read

    def counted(self: RemoteFolder, path: str, start: int | None = None, end: int | None = None) -> bytes:
        assert start is not None
        assert end is not None
        ranges.append((start, end))
        return read(self, path, start, end)

    monkeypatch.setattr(url, "LARGE", 1)
    monkeypatch.setattr(url, "_FIRST", 8)
    monkeypatch.setattr(RemoteFolder, "read", counted)
    return ranges


def some(listing: Listing, *names: str) -> dict[Path, set[str]]:
    return {listing.folder / WEIGHTS: set(names)}


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def test_tensors_come_and_not_the_file(
    listing: Listing, folder: Path, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    models, path = PlannedModels((listing,), tmp_path), listing.folder / WEIGHTS
    models.bring(some(listing, NORM, QUERY))
    models.check()
    there = open_checkpoint(folder)
    header = sparse.places(path)
    first = min(begin for begin, _ in header.values())
    sizes = [there.tensors[name].nbytes for name in (NORM, QUERY)]
    assert sum(end - begin for begin, end in asked) == first + sum(sizes)
    assert path.stat().st_size == (folder / WEIGHTS).stat().st_size
    here = open_checkpoint(listing.folder)
    assert all(here.read(name).equal(there.read(name)) for name in (NORM, QUERY))
    with pytest.raises(InputError, match=r"tensor model\.embed_tokens\.weight is not on this machine"):
        here.read("model.embed_tokens.weight")
    asked.clear()
    models.bring(some(listing, NORM))
    assert asked == []

    models.bring()
    assert path.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert sum(end - begin for begin, end in asked) == path.stat().st_size - first - sum(sizes)
    assert not sparse.record_of(path).exists()
    models.check()
    asked.clear()
    models.bring(some(listing, NORM))
    assert asked == []


def test_of_a_model_that_nothing_is_read_of_the_small_files_come(
    listing: Listing, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    models = PlannedModels((listing,), tmp_path)
    models.bring({})
    models.check()
    assert [file.name for file in listing.missing()] == [WEIGHTS]
    assert asked == []


def test_who_is_killed_while_tensors_come_has_cost_only_these(
    listing: Listing, folder: Path, tmp_path: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, path = PlannedModels((listing,), tmp_path), listing.folder / WEIGHTS
    models.bring(some(listing, NORM))

    def half(descriptor: int, content: bytes, offset: int) -> None:
        sparse.write_at(descriptor, content[: len(content) // 2], offset)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(url, "write_at", half)
        with pytest.raises(KeyboardInterrupt):
            models.bring(some(listing, QUERY))
    assert sparse.is_here(path, NORM)
    assert not sparse.is_here(path, QUERY)
    asked.clear()
    models.bring(some(listing, NORM, QUERY))
    assert asked == [sparse.places(path)[QUERY]]
    models.check()
    assert open_checkpoint(listing.folder).read(QUERY).equal(open_checkpoint(folder).read(QUERY))


def test_a_file_with_holes_that_somebody_wrote_to(
    listing: Listing, folder: Path, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    models, path = PlannedModels((listing,), tmp_path), listing.folder / WEIGHTS
    models.bring(some(listing, NORM))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=f"{WEIGHTS} changed after it was downloaded"):
        models.check()
    models.bring(some(listing, QUERY))
    models.check()
    assert not sparse.is_here(path, NORM)
    models.bring()
    assert path.read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_model_that_changes_while_tensors_come(
    listing: Listing, folder: Path, bucket: Any, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    models = PlannedModels((listing,), tmp_path)
    models.bring(some(listing, NORM))
    bucket.put_file(str(changed(folder, tmp_path)), f"{URL}/{WEIGHTS}")
    with pytest.raises(InputError, match=f"model {URL}: {WEIGHTS} changed after it was planned; run again"):
        models.bring(some(listing, QUERY))
    assert not (listing.folder / WEIGHTS).exists()


def test_a_large_file_whose_header_lies(
    listing: Listing, bucket: Any, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    bucket.pipe_file(f"{URL}/{WEIGHTS}", b"\xff" * 1000)
    listing = resolve(UrlModel(URL), tmp_path)
    with pytest.raises(InputError, match=f"^model {URL}: {WEIGHTS}: truncated or corrupt safetensors file"):
        bring(listing, tmp_path)
    assert not (listing.folder / WEIGHTS).exists()


def test_a_disk_without_room(
    listing: Listing, tmp_path: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(listing, tmp_path, {})
    monkeypatch.setattr(url.shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10, 5, 5))
    with pytest.raises(InputError, match=f"model {URL}: 128 bytes to fetch, but {listing.folder} has room for 5"):
        bring(listing, tmp_path, some(listing, NORM))
