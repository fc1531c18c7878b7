"""Ray on this machine alone: nobody else reaches it, it may take its time to start, and has no more than it needs.

What Ray 2.60 has no option for is set where it looks: in variables that its processes inherit, and in its own modules
while it starts.
"""

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import psutil
import ray
from ray._private import ray_constants, services
from ray._private.node import Node
from ray._raylet import Config  # type: ignore[attr-defined]

from sensmerge.tasks.errors import StepError

WAIT = 300
"""Seconds that Ray's processes may take to start; left to itself, it waits for 30."""
SAY_EVERY = 15
"""Seconds after which somebody who waits is told why, again and again."""


class _RayletGone(Exception):
    """Ray's raylet ended while Ray waited for it. Of a RuntimeError Ray would think that it is not there yet."""


def start_here(start: Callable[[], Any]) -> None:
    """Start a Ray that listens on loopback only, asks for a token, and may be slow.

    Its raylet ends if a process beside it takes more than 15 seconds to start, as it may on a machine that is busy;
    then all of it starts once more.

    Args:
        start: starts it, with Ray's own `init`.

    Raises:
        StepError: it does not start.
    """
    try:
        with _patient_start():
            start()
    except StepError as error:
        if not isinstance(error.__cause__, _RayletGone):
            raise
        ray.shutdown()  # what of it had started
        with _patient_start():
            start()


@contextmanager
def _patient_start() -> Iterator[None]:
    """Let a Ray that starts within the block listen on loopback only, ask for a token, and be slow.

    Raises:
        StepError: it does not start.
    """
    _ask_for_a_token()
    before = dict(os.environ)
    for name in ("RAY_gcs_server_port_wait_time_s", "RAY_py_gcs_connect_timeout_s"):
        os.environ.setdefault(name, str(WAIT))
    # A worker counts as lost if it takes longer: on a machine that is busy, to import is enough.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(WAIT))
    # On other systems than Linux Ray uses loopback by itself; this variable tells its processes which of both to do.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    started = threading.Event()
    waiting = threading.Thread(target=_say_that_it_takes_time, args=(started,), daemon=True)
    waiting.start()
    try:
        with (
            patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False),
            patch.object(services, "get_node", _patient(services.get_node)),
            # The autoscaler has nothing to scale, and the dashboard, which is off, has a process all the same: together
            # more than a second of processor time.
            patch.object(Node, "start_monitor", _nothing),
            patch.object(Node, "start_api_server", _nothing),
        ):
            yield
    except Exception as error:
        what = str(error).strip().partition("\n")[0]
        raise StepError(
            f"Ray did not start on this machine: {what}; see its logs in {_logs()}, or whether processes, memory or "
            "disk ran out"
        ) from error
    finally:
        started.set()
        waiting.join()
        # Ray's own variables alone: others belong to threads that go on beside this.
        for name in [name for name in os.environ if name.startswith("RAY_") and name not in before]:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if name.startswith("RAY_")})


def _ask_for_a_token() -> None:
    """Have Ray's processes refuse whoever does not know a random token, whatever the environment says of it."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        sys.stderr.write(
            f"RAY_AUTH_MODE={mode} counts for clusters (--address) only: Ray on this machine asks for a token\n"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    Config.initialize("")  # it has been read when ray was imported


def _nothing(node: Node, **_: Any) -> None:
    """Start no process."""


def _patient(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a way to ask for a node that waits for it: Ray gives up when it has not found it for 30 seconds.

    It waits no longer for one whose raylet has ended.
    """

    def asked(*what: Any) -> Any:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                return ask(*what)
            except RuntimeError as error:
                if _raylet_has_ended():
                    raise _RayletGone("its raylet ended while it started") from error
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    return asked


def _raylet_has_ended() -> bool:
    """Return whether a raylet that this process has started is no more, and none runs."""
    found = [one.status() for one in psutil.Process().children() if one.name() == "raylet"]
    return bool(found) and all(status == psutil.STATUS_ZOMBIE for status in found)


def _say_that_it_takes_time(started: threading.Event) -> None:
    begin = time.monotonic()
    while not started.wait(SAY_EVERY):
        waited = time.monotonic() - begin
        sys.stderr.write(f"Ray is starting on this machine: {waited:.0f} s, of {WAIT} s at most\n")


def _logs() -> str:
    return f"{os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"
