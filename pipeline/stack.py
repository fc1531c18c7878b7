"""The stack of an error that is said in one line, for whoever has to look behind what another system answered."""

import traceback
from pathlib import Path

from sensmerge.pipeline.store.store import cache_folder
from sensmerge.tasks.artifacts import write_whole
from sensmerge.tasks.urls import public_text


def keep_stack(error: BaseException) -> Path | None:
    """Write the stack of an error that another one caused to a file of this user, in place of the last one's.

    Returns:
        The file; None of an error that nothing else caused, whose line says all, and where no file can be written.
    """
    if error.__cause__ is None:
        return None
    path = cache_folder() / "last-error.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, public_text("".join(traceback.format_exception(error))))
    except OSError:
        return None
    return path
