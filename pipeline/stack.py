"""The stack of an error that is said in one line, for whoever has to look behind what another system answered."""

import os
import re
import traceback
from pathlib import Path

from sensmerge.pipeline.store.store import cache_folder
from sensmerge.tasks.artifacts import partial_of
from sensmerge.tasks.urls import public_text

LEAST = 6
"""Characters of a secret: what is shorter may stand anywhere, and mean nothing."""
_SECRETS = re.compile(
    r"(^|_|API)(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|KEY|KEY_ID|CONNECTION_STRING)$", re.IGNORECASE
)
"""Ends of the names of environment variables that hold what lets somebody in: HF_TOKEN, MLFLOW_TRACKING_PASSWORD,
AWS_SECRET_ACCESS_KEY, AWS_ACCESS_KEY_ID, …"""


def keep_stack(error: BaseException) -> Path | None:
    """Write the stack of an error that another one caused to a file that this user alone may read, over the last one's.

    Returns:
        The file; None of an error that nothing else caused, whose line says all, and where no file can be written.
    """
    if error.__cause__ is None:
        return None
    path = cache_folder() / "last-error.txt"
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # an interrupted try left it
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(without_secrets(public_text("".join(traceback.format_exception(error)))))
        partial.replace(path)
    except OSError:
        return None
    return path


def without_secrets(text: str) -> str:
    """Return a text without what environment variables hold that let somebody in, told by their names."""
    found = {value: name for name, value in os.environ.items() if _SECRETS.search(name) and len(value) >= LEAST}
    for value in sorted(found, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, f"[{found[value]}]")
    return text
