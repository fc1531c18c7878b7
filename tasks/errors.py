"""The two ways in which a run ends without a result."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from sensmerge.tasks.urls import public_text

MOST = 500
"""Characters of a message."""


class InputError(ValueError):
    """Bad input. Its text is one line that says where, what was found, what was expected and what to do.

    The command line prints it without a stack trace and exits with status 2; it is never retried. Of a long text, as
    other programs' messages and names from damaged files may be, the middle is left out; no URL in it lets
    anyone in.
    """

    def __init__(self, text: str) -> None:
        """Take a text, in one line of at most `MOST` characters."""
        line = " ".join(public_text(text).split())
        super().__init__(line if len(line) <= MOST else f"{line[: MOST // 2]} … {line[3 - MOST // 2 :]}")


class StepError(RuntimeError):
    """A step failed for a reason that is not the user's input; the text names the step and where it ran."""

    def __init__(self, text: str) -> None:
        """Take a text of any length."""
        super().__init__(public_text(text))


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_trouble(error: BaseException | None) -> str | None:
    """Return what is to be said where a disk is full or may not be written; None of any other error."""
    if not isinstance(error, OSError) or error.errno not in {*_FULL, errno.EROFS}:
        return None
    where = error.filename2 or error.filename
    way_out = "make room on it" if error.errno in _FULL else "choose another --store"
    return f"{f'{where}: ' if where else ''}{error.strerror}; {way_out}, and run again: what is done is kept"


def shown(value: object) -> str:
    """Return a value as messages show it: its repr, of which little is left if it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return text if len(text) <= 100 else f"{text[:80]} … ({len(text):,} characters)"


@contextmanager
def noted(text: str) -> Iterator[None]:
    """Add a note to whatever the block raises: what it was working on, or where."""
    try:
        yield
    except Exception as error:
        error.add_note(text)
        raise
