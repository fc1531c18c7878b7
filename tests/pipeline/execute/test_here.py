"""Ray on this machine: nobody else reaches it, and it may take its time. Each test starts one in its own process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sensmerge.pipeline.execute.cluster import connect
from sensmerge.tasks.errors import InputError

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).resolve().parents[3]
START = "from sensmerge.pipeline.execute import cluster\nfrom sensmerge.pipeline.execute import here\n"
LISTENS = (
    START
    + """
import os, subprocess, sys, time
import psutil, ray

with cluster.cluster("local"):
    assert ray.get(ray.remote(lambda: 5).remote()) == 5
    names, ports = set(), 0
    while "ray::RuntimeEnvAgent" not in names or ports < 6:  # its processes come one after the other
        names, ports = set(), 0
        for process in psutil.Process().children(recursive=True):
            for one in process.net_connections("inet"):
                if one.status == "LISTEN":
                    names.add(process.name())
                    ports += 1
                    assert one.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process.name(), one.laddr)
        time.sleep(0.1)
    for process in psutil.Process().children(recursive=True):  # what it has no use for takes a second to start
        command = " ".join(process.cmdline())
        assert "monitor.py" not in command.replace("log_monitor.py", ""), command
        assert "dashboard/dashboard.py" not in command, command

    address = ray.get_runtime_context().gcs_address
    ask = f"from ray._raylet import GcsClient; GcsClient(address={address!r}).internal_kv_keys(b'', None, timeout=30)"
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    for more, status in (
        ({"RAY_AUTH_MODE": "disabled"}, 1),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 32}, 1),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}, 0),
    ):
        told = subprocess.run([sys.executable, "-c", ask], env=plain | more, capture_output=True, text=True)
        assert told.returncode == status, told.stderr
        assert status == 0 or "AuthenticationError" in told.stderr, told.stderr

    if "HOME_WITH" in os.environ:
        program = f"from sensmerge.pipeline.execute.cluster import connect\\nconnect({address!r})"
        with_one, without = os.environ["HOME_WITH"], os.environ["HOME_WITHOUT"]
        for more in (
            {"HOME": without},
            {"HOME": with_one},
            {"HOME": without, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 32},
            {"HOME": without, "RAY_AUTH_MODE": "token"},
        ):
            told = subprocess.run([sys.executable, "-c", program], env=plain | more, capture_output=True, text=True)
            print(told.stderr.splitlines()[-1])
"""
)
SLOW = (
    START
    + """
import time
from types import SimpleNamespace
import ray
from ray._private import node, services

# Ray's own clock, while it waits for its node, runs so fast that its 30 seconds are over when the node is there.
node.time = SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), sleep=time.sleep, time=time.time)
began, found = time.monotonic(), services.get_node
def late(*what):
    if time.monotonic() - began < 8:
        raise RuntimeError("no such node yet")
    return found(*what)
services.get_node = late
here.SAY_EVERY = 2
with cluster.cluster("local"):
    assert ray.get(ray.remote(lambda: 5).remote()) == 5
"""
)
NEVER = (
    START
    + """
import time
from types import SimpleNamespace
from ray._private import node, services
from sensmerge.tasks.errors import StepError

def never(*what):
    raise RuntimeError("no such node yet")
node.time = SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), sleep=time.sleep, time=time.time)
services.get_node = never
here.WAIT = 1
try:
    with cluster.cluster("local"):
        raise AssertionError("it did start")
except StepError as error:
    print(error)
"""
)

ENDS = (
    START
    + """
import threading, time
import psutil, ray

def end_the_first():
    while True:
        for one in psutil.Process().children():
            if one.name() == "raylet":
                one.kill()
                return
        time.sleep(0.01)

threading.Thread(target=end_the_first).start()
with cluster.cluster("local"):
    assert ray.get(ray.remote(lambda: 5).remote()) == 5
"""
)


def told(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment = plain | {"PYTHONPATH": str(PROJECT)} | variables
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def test_it_listens_on_loopback_and_asks_for_a_token_whatever_the_environment_says() -> None:
    done = told(LISTENS, RAY_AUTH_MODE="disabled")
    assert (
        "RAY_AUTH_MODE=disabled counts for clusters (--address) only: Ray on this machine asks for a token\n"
        in done.stderr
    )


def test_who_has_another_token_or_none_is_told_what_to_do(tmp_path: Path) -> None:
    token = tmp_path / "with" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("y" * 32)
    done = told(LISTENS, HOME_WITH=str(tmp_path / "with"), HOME_WITHOUT=str(tmp_path))
    way_out = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to it or RAY_AUTH_TOKEN_PATH to a file that has it"
    asks = "the cluster asks for a token: "
    assert [line.partition(": ")[2].partition(": ")[2] for line in done.stdout.splitlines()] == [
        f"{asks}{way_out}",
        f"{asks}set RAY_AUTH_MODE=token, and it gets the one in {token}",
        f"{asks}the one in RAY_AUTH_TOKEN is not its own",
        f"RAY_AUTH_MODE is token, and there is none; {way_out}",
    ]
    assert "RAY_AUTH_MODE" not in done.stderr


def test_it_may_take_longer_than_ray_waits() -> None:
    done = told(SLOW)
    assert "Ray is starting on this machine: 2 s, of 300 s at most\n" in done.stderr


def test_one_that_does_not_start_ends_with_a_line() -> None:
    (line,) = told(NEVER).stdout.splitlines()
    assert line.startswith("Ray did not start on this machine: The current node timed out during startup.")
    assert "see its logs in" in line


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_told_of_at_once(scheme: str) -> None:
    with socket.socket() as taken:  # and listens to nobody
        taken.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"^--address {address}: nobody listens there \(Connection refused\); "):
            connect(address)


def test_where_its_raylet_ends_while_it_starts_it_starts_once_more() -> None:
    told(ENDS)
