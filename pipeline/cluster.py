"""The Ray cluster that this process works on."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline.stop import Stopped
from tasks.errors import InputError


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one. It ends with the thread that does so.

    Args:
        address: of the cluster; None takes RAY_ADDRESS (as a Ray job has it) or starts Ray on this machine.

    Raises:
        InputError: no cluster answers.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here = {"include_dashboard": False} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level="ERROR", **here)
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers ({error}); start one with ray start --head"
        ) from error
    except SystemExit:  # of the handler that Ray has while it starts
        ray.shutdown()
        raise Stopped(signal.SIGTERM) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # in place of Ray's, which prints a stack and exits with status 15


@contextmanager
def closed() -> Iterator[None]:
    """Leave no connection behind when the block is left."""
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be connected to a cluster within the block; a connection that there is already is used, and closed too.

    Args:
        address: as in `connect`.

    Raises:
        InputError: no cluster answers.
    """
    with closed():
        if not ray.is_initialized():
            connect(address)
        yield
