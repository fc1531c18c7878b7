"""Who is told of a gate that lets no variant pass."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from sensmerge.pipeline.webhook import checked_webhook, send_refusal
from sensmerge.tasks.errors import InputError
from tests.pipeline.tracking.test_record import free_port

SECRET = "T0/B0/s3cr3t"
SAID = ["gate, math: worse: failed", "tiny/2 (ta) stays challenger, tiny/1 (ta) stays champion"]


class Chat(BaseHTTPRequestHandler):
    """Keeps what is posted; refuses it below /full."""

    posted: list[tuple[str, str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.posted.append((self.path, self.headers["Content-Type"], body))
        self.send_response(507 if self.path.startswith("/full") else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def chat() -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """Address of a chat, and what was posted there."""
    Chat.posted = []
    server = HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Chat.posted
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_gate_said_is_posted(chat: tuple[str, list[tuple[str, str, Any]]]) -> None:
    url, posted = chat
    assert send_refusal(f"{url}/services/{SECRET}", "tiny", SAID) is None
    ((path, kind, body),) = posted
    assert (path, kind) == (f"/services/{SECRET}", "application/json")
    text = "\n".join(["tiny: the best variant did not pass the gate", *SAID])
    assert body == {"text": text, "recipe": "tiny", "gate": "refused", "lines": SAID}


def test_a_chat_that_does_not_take_it_is_told_of_without_its_address(
    chat: tuple[str, list[tuple[str, str, Any]]],
) -> None:
    url, _ = chat
    said = send_refusal(f"{url}/full/{SECRET}", "tiny", SAID)
    assert said == "webhook at 127.0.0.1: it answered 507 Insufficient Storage; nobody was told of the refusal"
    said = send_refusal(f"http://127.0.0.1:{free_port()}/{SECRET}", "tiny", SAID)
    assert said is not None
    assert "Connection refused" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    "url", [f"ftp://example.com/{SECRET}", f"hooks.example.com/{SECRET}", f"https:///{SECRET}", ""]
)
def test_what_is_no_address_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InputError) as raised:
        checked_webhook(url)
    assert "--webhook, or SENSMERGE_WEBHOOK" in str(raised.value)
    assert SECRET not in str(raised.value)


def test_none_is_none() -> None:
    assert checked_webhook(None) is None
