"""Tells a web address of a gate that did not let the best variant pass, for chats and alerts."""

import json
from collections.abc import Sequence
from urllib.parse import urlsplit

from sensmerge.tasks.errors import InputError

WEBHOOK = "SENSMERGE_WEBHOOK"
"""Environment variable with the address, where `--webhook` names none: it is as good as a password."""
SECONDS = 10.0
"""What an answer may take."""


def checked_webhook(url: str | None) -> str | None:
    """Return an address, if there is one.

    Raises:
        InputError: nothing can be sent there. The address is not shown: whoever knows it may write to a chat.
    """
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--webhook, or {WEBHOOK}: expected an address that begins with https:// or http://")
    return url


def send_refusal(url: str, recipe: str, said: Sequence[str]) -> str | None:
    """Post what the gate said, as JSON, and return what went wrong; None if nothing did.

    `text` is all that chats need (Slack, Mattermost, Microsoft Teams and others take it); `recipe`, `gate` and `lines`
    are for programs.
    """
    from http.client import HTTPException  # takes a while to import, and most commands send nothing
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    text = "\n".join([f"{recipe}: the best variant did not pass the gate", *said])
    body = {"text": text, "recipe": recipe, "gate": "refused", "lines": list(said)}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=SECONDS):
            return None
    except HTTPError as error:
        reason = f"it answered {error.code} {error.reason}"
    except (OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error or type(error).__name__)
    return f"webhook at {urlsplit(url).hostname}: {reason.replace(url, '…')}; nobody was told of the refusal"
