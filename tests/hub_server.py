"""A small Hugging Face hub on the loopback: what the client asks of the real one to list and fetch models.

    with HubServer() as hub:
        commit = hub.add_repo("org/name", {"config.json": b"{}"})
        # run a client with HF_ENDPOINT=hub.endpoint
        hub.requests      # what it asked for

Adding a repository again moves its branch; older commits stay. Faults are switched on by file name.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

LFS = ("*.safetensors", "*.bin", "*.model")


@dataclass(frozen=True)
class Recorded:
    """A file of which only the beginning is here: what comes behind it is zeros when a range is asked for, and missing
    when all of it is."""

    head: bytes
    size: int
    """bytes of the whole file"""

    def __len__(self) -> int:
        """Return the size of the whole file, as of bytes."""
        return self.size

    def range(self, first: int, end: int) -> bytes:
        """Return the bytes from `first` up to `end`."""
        return self.head[first:end].ljust(end - first, b"\0")


Content = bytes | Recorded


@dataclass(frozen=True)
class Request:
    """One request that the server answered."""

    method: str
    path: str
    range: str | None
    sent: int
    """bytes of the answer's body"""


class HubServer:
    """The server, with its repositories, its log and its faults."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.commits: dict[tuple[str, str], Mapping[str, Content]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        """repositories whose files are refused"""
        self.bad_token = False
        """refuse everything, as for a token that has expired"""
        self.instead: tuple[int, Mapping[str, str], bytes] | None = None
        """status, headers and body of every answer, as of a proxy"""
        self.corrupt: set[str] = set()
        """files that are sent with their last byte altered"""
        self.cut: dict[str, int] = {}
        """files whose next transfer breaks after so many bytes; each once"""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering: later connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def add_repo(self, repo: str, files: Mapping[str, Content], branch: str = "main", commit: str = "") -> str:
        """Commit these files as the whole content of a branch and return the commit, which may have an id already."""
        text = repr((repo, sorted(files), [files[name] for name in sorted(files)], len(self.commits)))
        commit = commit or hashlib.sha1(text.encode()).hexdigest()
        self.commits[repo, commit] = files
        self.branches[repo, branch] = commit
        return commit

    def fetched(self, name: str) -> list[Request]:
        """Return the transfers of one file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}")]


def _is_lfs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LFS)


def _etag(name: str, content: Content) -> str:
    """Return the sha256 of a file in LFS (of a recorded one, something in its place), the git blob id of another."""
    if isinstance(content, Recorded):
        return hashlib.sha256(b"recorded %d\0" % content.size + content.head).hexdigest()
    if _is_lfs(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, so that no connection outlives its request and a stopped server is gone at once."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet; `HubServer.requests` is the log."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            return self._send(404, {}, b"")
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        if hub.instead is not None:
            status, headers, body = hub.instead
            return self._send(status, dict(headers), body)
        if hub.bad_token:
            return self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"")
        repo, revision = match[1], match[3] if api else match[2]
        commit = hub.branches.get((repo, revision), revision)
        if repo not in {known for known, _ in hub.commits}:
            # The real hub does not tell a stranger whether a repository is private or missing.
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self._send(401, headers, b"")
        if (repo, commit) not in hub.commits:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        files = hub.commits[repo, commit]
        if api:
            tree = [_tree_entry(name, content) for name, content in files.items()]
            answer = tree if api[2] == "tree" else {"id": repo, "sha": commit}
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        if repo in hub.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"")
        if match[3] not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        return self._send_file(hub, commit, match[3], files[match[3]])

    def _send_file(self, hub: HubServer, commit: str, name: str, content: Content) -> None:
        etag = f'"{_etag(name, content)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if _is_lfs(name):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        if name in hub.corrupt and isinstance(content, bytes):
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None and isinstance(content, Recorded):
            return self._send(200, headers, content.head, length=content.size)
        if asked is None:
            assert isinstance(content, bytes)
            return self._send(200, headers, content, hub.cut.pop(name, None) if self.command == "GET" else None)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        body = content.range(first, last + 1) if isinstance(content, Recorded) else content[first : last + 1]
        return self._send(206, headers, body)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None, length: int | None = None
    ) -> None:
        """Send an answer; with `cut`, promise the whole body (or `length` bytes) and close after so many of them."""
        sent = b"" if self.command == "HEAD" else body[:cut]
        self.server.hub.requests.append(  # type: ignore[attr-defined]
            Request(self.command, urlsplit(self.path).path, self.headers.get("Range"), len(sent))
        )
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body) if length is None else length)}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)


def _tree_entry(name: str, content: Content) -> dict[str, object]:
    """Return what the hub's list of a commit says of one file."""
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    if not _is_lfs(name):
        return entry | {"oid": _etag(name, content)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_etag(name, content)}\nsize {len(content)}\n"
    lfs = {"oid": _etag(name, content), "size": len(content), "pointerSize": len(pointer)}
    return entry | {"oid": _etag("pointer", pointer.encode()), "lfs": lfs}
