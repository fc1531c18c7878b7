"""Digests of files: right, computed once, and kept so that nobody takes one for another."""

import hashlib
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from blake3 import blake3

from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.checkpoints.digests import bytes_per_second, compute, compute_once, find, forget, keep
from sensmerge.tasks.errors import InputError

CONTENT = bytes(range(256)) * 1000
DIGEST = f"blake3:{blake3(CONTENT).hexdigest()}"
LONG_AGO = (0, 10**9)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    os.utime(path, LONG_AGO)
    return path


@pytest.mark.parametrize("size", [0, 1, 1024, 1025, 200_000])
def test_digests_are_those_of_other_implementations(size: int, tmp_path: Path) -> None:
    content = CONTENT[:size]
    (tmp_path / "file").write_bytes(content)
    assert compute(tmp_path / "file", "blake3") == f"blake3:{blake3(content).hexdigest()}"
    assert compute(tmp_path / "file", "sha256") == f"sha256:{hashlib.sha256(content).hexdigest()}"
    git = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    assert compute(tmp_path / "file", "git") == f"git:{git}"


def test_the_official_vector_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert compute(tmp_path / "file", "blake3") == f"blake3:{expected}"


def test_every_state_has_its_digest(file: Path, tmp_path: Path) -> None:
    assert compute_once(file, tmp_path / "records") == find(file, file.stat(), tmp_path / "records") == DIGEST
    moved = file.rename(tmp_path / "moved")  # the same inode at another path
    assert find(moved, moved.stat(), tmp_path / "records") is None
    moved.rename(file)
    other = tmp_path / "other"  # another inode at the same path
    other.write_bytes(CONTENT)
    os.utime(other, LONG_AGO)
    kept = other.stat().st_ino
    other.rename(file)
    assert file.stat().st_ino == kept
    assert find(file, file.stat(), tmp_path / "records") is None
    assert compute_once(file, tmp_path / "records") == DIGEST
    assert len([*(tmp_path / "records").iterdir()]) == 2


def test_what_is_forgotten(file: Path, tmp_path: Path) -> None:
    compute_once(file, tmp_path / "records")
    for _ in range(2):
        forget(file, tmp_path / "records")
        assert find(file, file.stat(), tmp_path / "records") is None


def test_what_was_just_written_is_not_kept(file: Path, tmp_path: Path) -> None:
    os.utime(file)
    assert compute_once(file, tmp_path / "records") == DIGEST
    assert find(file, file.stat(), tmp_path / "records") is None


def test_a_file_that_changes_meanwhile(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute_late(path: Path, kind: str) -> str:
        path.write_bytes(CONTENT + b"more")
        return compute(path, kind)

    monkeypatch.setattr(digests, "compute", compute_late)
    with pytest.raises(InputError, match="changed while its digest was computed"):
        compute_once(file, tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 3}', '{"digest": "blake3:cut"}'])
def test_a_damaged_record_counts_for_nothing(text: str, file: Path, tmp_path: Path) -> None:
    compute_once(file, tmp_path / "records")
    (record,) = (tmp_path / "records").iterdir()
    record.write_text(text)
    assert find(file, file.stat(), tmp_path / "records") is None
    assert compute_once(file, tmp_path / "records") == find(file, file.stat(), tmp_path / "records") == DIGEST


def _keep_many(cache: Path, file: Path, first: int) -> None:
    for number in range(first, first + 40):
        keep(file.with_name(str(number)), file.stat(), f"blake3:{number:064x}", cache)


def test_many_write_at_once(file: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(_keep_many, tmp_path / "cache", file, first) for first in (0, 20, 20, 40)]
        for one in done:
            one.result()
    for number in range(80):
        found = find(file.with_name(str(number)), file.stat(), tmp_path / "cache")
        assert found == f"blake3:{number:064x}"
    assert not [*(tmp_path / "cache").glob(".*")]


@pytest.mark.parametrize("kind", ["blake3", "sha256", "git"])
def test_a_file_that_is_gone(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: cannot be read \(No such file or directory"):
        compute(tmp_path / "gone", kind)


def test_the_speed(file: Path) -> None:
    begin = time.perf_counter()
    speed = bytes_per_second(file, len(CONTENT))
    assert len(CONTENT) / speed <= time.perf_counter() - begin
