"""The two ways in which a run ends without a result."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input. Its text is one line that says where, what was found, what was expected and what to do.

    The command line prints it without a stack trace and exits with status 2; it is never retried.
    """


class StepError(RuntimeError):
    """A step failed for a reason that is not the user's input; the text names the step and where it ran."""


@contextmanager
def noted(text: str) -> Iterator[None]:
    """Add a note to whatever the block raises: what it was working on, or where."""
    try:
        yield
    except Exception as error:
        error.add_note(text)
        raise
