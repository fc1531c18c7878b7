"""An S3-compatible server on the loopback that is as unreliable as it is told to be."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class UnreliableBucket:
    """The server; every `busy`-th request is answered with 503, and every `cut`-th body of an answer breaks off."""

    def __init__(self, busy: int = 0, cut: int = 0) -> None:
        self.busy, self.cut = busy, cut
        self.refused, self.broken = 0, 0
        self.sent: Counter[str] = Counter()
        """bytes of answers by the path that was asked for"""
        self._requests, self._bodies = 0, 0
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "UnreliableBucket":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """Where those find the server who look as boto3 does, without a patience that would hide how it is."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def _answer(self, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self._requests += 1
            is_busy = bool(self.busy) and self._requests % self.busy == 0
            self.refused += is_busy
        if is_busy:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "text/xml"), ("Content-Length", str(len(BUSY)))])
            return [BUSY]
        body: Iterable[bytes] = self._moto(environ, start_response)
        return self._broken_off(environ["PATH_INFO"], body) if environ["REQUEST_METHOD"] == "GET" else body

    def _broken_off(self, path: str, body: Iterable[bytes]) -> Iterator[bytes]:
        content = b"".join(body)
        with self._lock:
            self._bodies += len(content) > 1
            is_cut = bool(self.cut) and len(content) > 1 and self._bodies % self.cut == 0
            self.broken += is_cut
            self.sent[path] += len(content)
        yield content[: len(content) // 2] if is_cut else content
