"""Which Ray cluster a command works on; Ray itself takes half a second to import."""

import os

LOCAL = "local"
"""A Ray that the command starts on this machine, and ends with itself."""


def cluster_address(address: str | None) -> str:
    """Return the address that was given, the one in RAY_ADDRESS (as a Ray job has it), or `LOCAL`."""
    return address or os.environ.get("RAY_ADDRESS") or LOCAL
