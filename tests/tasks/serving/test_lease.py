"""What is being served is known to others, as long as it is."""

import gc
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from sensmerge.tasks.serving.lease import LIFE, Held, Lease, held, release

ARTIFACT = "merge/ta-12345678"


@pytest.fixture(params=["folder", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store with one artifact, in a folder or at a URL."""
    place = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid4().hex}/store"
    files, folder = fsspec.url_to_fs(place)
    files.makedirs(f"{folder}/{ARTIFACT}")
    files.pipe_file(f"{folder}/{ARTIFACT}/manifest.json", b"{}")
    return place


def test_a_lease_lives_as_long_as_who_has_it(store: str) -> None:
    first, second = Lease(f"{store}/{ARTIFACT}"), Lease(f"{store}/{ARTIFACT}/")
    assert [one.artifact for one in held(store)] == [ARTIFACT, ARTIFACT]
    assert all(one.is_live for one in held(store))
    first.release()
    assert len(held(store)) == 1
    del second
    gc.collect()
    assert held(store) == []


def test_a_lease_that_is_not_renewed_ends(store: str) -> None:
    lease = Lease(f"{store}/{ARTIFACT}")
    (one,) = held(store)
    late = Held(one.artifact, one.host, datetime.now(UTC) - LIFE - timedelta(seconds=1), one.path)
    assert one.is_live
    assert not late.is_live
    release(store, late)
    assert held(store) == []
    lease.release()


def test_what_is_no_artifact_of_a_store_has_no_lease(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    Lease(str(tmp_path / "copy"))
    Lease("copy")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_store_that_cannot_be_written_is_served_from_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ARTIFACT).mkdir(parents=True)
    (tmp_path / ARTIFACT / "manifest.json").write_text("{}")
    (tmp_path / "leases").write_text("")  # no folder can be made of it, whoever asks
    with caplog.at_level(logging.WARNING):
        Lease(str(tmp_path / ARTIFACT))
    assert "gc does not know that this version is served" in caplog.text


def test_a_killed_server_leaves_a_lease_that_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).mkdir(parents=True)
    (tmp_path / ARTIFACT / "manifest.json").write_text("{}")
    program = (
        "from sensmerge.tasks.serving.lease import Lease\n"
        f"x = Lease({str(tmp_path / ARTIFACT)!r})\n"
        "print('up', flush=True)\n"
        "input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        server.kill()
    (one,) = held(str(tmp_path))
    assert one.is_live
    path = Path(one.path)
    long_ago = datetime.now(UTC) - 2 * LIFE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"renewed": long_ago.isoformat()}))
    assert not held(str(tmp_path))[0].is_live


def test_a_store_that_is_only_read_is_served_from_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Over http, where the refusal is an error of the library that asks, not of the operating system."""
    (tmp_path / ARTIFACT).mkdir(parents=True)
    (tmp_path / ARTIFACT / "manifest.json").write_text("{}")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with caplog.at_level(logging.WARNING):
            lease = Lease(f"http://127.0.0.1:{server.server_port}/{ARTIFACT}")
        server.shutdown()
    assert "gc does not know that this version is served (ClientResponseError)" in caplog.text
    lease.release()


def test_a_lease_that_its_server_removes_at_the_same_moment(store: str) -> None:
    lease = Lease(f"{store}/{ARTIFACT}")
    (one,) = held(store)
    lease.release()
    release(store, one)
    assert held(store) == []


def test_a_time_without_zone_is_utc(store: str) -> None:
    Lease(f"{store}/{ARTIFACT}").release()
    files, folder = fsspec.url_to_fs(store)
    now = datetime.now(UTC).replace(tzinfo=None)
    for name, renewed in (("now", now), ("old", now - 2 * LIFE)):
        path = f"{folder}/leases/merge--ta-12345678/{name}.json"
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        files.pipe_file(path, json.dumps({"host": name, "renewed": renewed.isoformat()}).encode())
    assert {one.host: one.is_live for one in held(store)} == {"now": True, "old": False}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"host": "a"}', b"\xff", b'{"host": "a", "renewed": 3}'])
def test_an_unreadable_lease_counts_from_when_it_was_written(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "leases" / "merge--ta-12345678" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (one,) = held(str(tmp_path))
    assert (one.artifact, one.is_live) == (ARTIFACT, True)
    long_ago = (datetime.now(UTC) - 2 * LIFE).timestamp()
    os.utime(path, (long_ago, long_ago))
    (one,) = held(str(tmp_path))
    assert not one.is_live
    release(str(tmp_path), one)
    assert not path.exists()


def test_a_fork_of_a_server_keeps_its_lease(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT).mkdir(parents=True)
    (tmp_path / ARTIFACT / "manifest.json").write_text("{}")
    lease = Lease(str(tmp_path / ARTIFACT))
    child = multiprocessing.get_context("fork").Process(target=lease.release)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert len(held(str(tmp_path))) == 1
    lease.release()
    assert held(str(tmp_path)) == []
