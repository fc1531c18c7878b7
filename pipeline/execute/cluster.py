"""The Ray cluster: how it is reached, what it has room for, and what it answers when work fails."""

import gc
import os
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from sensmerge.pipeline.execute.address import LOCAL, cluster_address
from sensmerge.pipeline.execute.here import start_here
from sensmerge.pipeline.execute.stop import Stopped
from sensmerge.tasks.errors import InputError, StepError, disk_trouble

MOST_WARM = 8
"""Workers that import anything before there is work; a machine may have many more cores than a recipe has steps."""
ANSWERS = 5.0
"""Seconds that a cluster has to take a connection."""
_HOST_AND_PORT = re.compile(r"(ray://)?(?P<host>[^/@:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
SYSTEM_RETRIES = 1
"""How often a piece of work is tried again after its worker or node died. Exceptions of the work itself are final."""


def connect(address: str | None, ahead: bool = False) -> None:
    """Connect to a cluster, or start one. It ends with the thread that does so.

    Args:
        address: of the cluster; None takes RAY_ADDRESS (as a Ray job has it) or starts Ray on this machine.
        ahead: whether there is nothing to run yet, so that workers of a Ray on this machine may import what takes them
            seconds.

    Raises:
        InputError: no cluster answers.
        StepError: Ray does not start on this machine.
    """
    address = cluster_address(address)
    _check_listens(address)
    _check_token(address)
    # Left to itself Ray tries a task that its memory monitor killed again without end.
    os.environ.setdefault("RAY_task_oom_retries", str(SYSTEM_RETRIES))
    is_here = address == LOCAL
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if is_here:
            start_here(lambda: ray.init(address=address, logging_level="ERROR", include_dashboard=False))
        else:
            ray.init(address=address, logging_level="ERROR")
    except StepError:
        ray.shutdown()  # what of it had started
        raise
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers ({error}); start one with ray start --head"
        ) from error
    except SystemExit:  # of the handler that Ray has while it starts
        ray.shutdown()
        raise Stopped(signal.SIGTERM) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # in place of Ray's, which prints a stack and exits with status 15
    if ahead and is_here:
        for _ in range(min(int(ray.cluster_resources().get("CPU", 0)), MOST_WARM)):
            _WARM_UP.remote()


def _check_token(address: str) -> None:
    """Show the cluster at HOST:PORT our token, where Ray itself would try for minutes whether another one is asked for.

    Ray sends a token to an address that it is given only if it is told to: whoever listens there may keep it.

    Raises:
        InputError: the cluster wants another token than it got, or got none.
    """
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    place = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(file) if file.is_file() else None
    is_sent = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    way_out = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it or RAY_AUTH_TOKEN_PATH to a file that has it"
    if is_sent and place is None and address != LOCAL:
        raise InputError(f"--address {address}: RAY_AUTH_MODE is token, and there is none; {way_out}")
    if not _HOST_AND_PORT.fullmatch(address) or address.startswith("ray:"):
        return
    try:
        GcsClient(address=address).internal_kv_keys(b"", None, timeout=ANSWERS)
    except ray.exceptions.AuthenticationError as error:
        if place is not None:
            way_out = f"set RAY_AUTH_MODE=token, and it gets the one in {place}"
        if is_sent:
            way_out = f"the one in {place} is not its own"
        raise InputError(f"--address {address}: the cluster asks for a token: {way_out}") from error
    except ray.exceptions.RayError:
        return  # Ray says it, and better, when it connects


def _check_listens(address: str) -> None:
    """Knock at HOST:PORT, or ray://HOST:PORT, where Ray itself would wait for minutes if nobody is there.

    Raises:
        InputError: nobody listens.
    """
    place = _HOST_AND_PORT.fullmatch(address)
    if place is None:
        return  # Ray knows what it is: local, auto, or nothing at all
    try:
        socket.create_connection((place["host"].strip("[]"), int(place["port"])), timeout=ANSWERS).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"--address {address}: nobody listens there ({reason}); start a cluster with ray start --head, or give the "
            "address of its head"
        ) from error


def _warm_up() -> None:
    """Import in a worker what nearly every step needs: a worker that is done with one step does the next."""
    gc.disable()  # all that is imported stays
    import_module("sensmerge.tasks.stages.merge")
    # Which methods import with their first tensor; numba, too, gets ready with the first loop that is called.
    import_module("sensmerge.tasks.methods.kernels.loops").make_ready()
    gc.freeze()
    gc.enable()


_WARM_UP = ray.remote(_warm_up)


@contextmanager
def closed() -> Iterator[None]:
    """Leave no connection behind when the block is left."""
    try:
        yield
    finally:
        _wait_for_the_last()
        ray.shutdown()


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be connected to a cluster within the block; a connection that there is already is used, and closed too.

    What comes after the block does not wait for the end of Ray's processes, which takes a second; `closed` does.

    Args:
        address: as in `connect`.

    Raises:
        InputError: no cluster answers.
    """
    _wait_for_the_last()
    try:
        if not ray.is_initialized():
            connect(address)
        yield
    except BaseException:
        ray.shutdown()
        raise
    ending = threading.Thread(target=ray.shutdown)
    _CLOSING.append(ending)
    ending.start()


_CLOSING: list[threading.Thread] = []
"""What ends a connection that nothing needs any more."""


def _wait_for_the_last() -> None:
    while _CLOSING:
        _CLOSING.pop().join()


def room_for(wanted: Mapping[str, float]) -> int:
    """Return how many workers that each take so much, by Ray's names, the cluster has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get(name, 0) / amount for name, amount in wanted.items())) for node in nodes)


def answer_of(ready: ray.ObjectRef[Any], title: str, advice: str, others: Iterable[ray.ObjectRef[Any]]) -> Any:
    """Return what a piece of work gave.

    Args:
        ready: the piece, which has ended.
        title: what it is called in messages.
        advice: what to do where memory ran out.
        others: pieces that are cancelled if this one failed.

    Raises:
        InputError: bad input that the work found.
        StepError: the work failed otherwise, or its worker died `SYSTEM_RETRIES` + 1 times.
    """
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        for other in others:
            ray.cancel(other)
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        if trouble := disk_trouble(error.cause):
            raise StepError(f"{title}: {trouble}") from None
        if _is_out_of_memory(error.cause):
            raise StepError(f"{title}: its worker ran out of memory; {advice}. It says: {error.cause}") from None
        raise StepError(f"{title} failed: {error.cause!r}\n{error}") from None  # Ray's text has process and node
    except ray.exceptions.OutOfMemoryError as error:  # Ray's memory monitor killed the worker
        what = str(error).partition("\n")[0]
        raise StepError(
            f"{title}: its worker ran out of memory {SYSTEM_RETRIES + 1} times; {advice}. Ray says: {what}"
        ) from None
    except ray.exceptions.RayError as error:
        raise StepError(
            f"{title}: its worker died {SYSTEM_RETRIES + 1} times; if it ran out of memory, {advice}. Ray says: {error}"
        ) from None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception says that a CPU's or a GPU's memory is full."""
    import torch

    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
