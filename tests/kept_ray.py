"""One connection to the tests' Ray cluster for all runs in this process, which then share its workers."""

import sys
from typing import Any

import ray


class KeptConnection:
    """Stands for `ray` where the workflow connects and disconnects.

    What is disconnected from the tests' cluster, without an exception, stays connected beneath: the next run finds
    workers that have imported already what they need, which takes each of them seconds.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._connected_to: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def is_initialized(self) -> bool:
        return self._connected_to is not None

    def init(self, address: str, **options: Any) -> None:
        if address != self._address:
            ray.shutdown()
        if not ray.is_initialized():
            ray.init(address=address, **options)
        self._connected_to = address

    def shutdown(self) -> None:
        if sys.exc_info()[0] is not None or self._connected_to not in (self._address, None):
            ray.shutdown()
        self._connected_to = None
