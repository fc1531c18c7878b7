"""Where commands write what they say."""

import os

from rich.console import Console

UNBOUNDED = 100_000
"""Characters; no table is as wide."""


def console_of(stderr: bool = False) -> Console:
    """Return standard output or error: a terminal is as wide as it is, a file or pipe as wide as what is written.

    Args:
        stderr: whether it is standard error.
    """
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNBOUNDED
    return console
