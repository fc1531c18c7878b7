"""Ray's nodes on this machine, each in a mount namespace: they have one path in common, and no disk there."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

PROJECT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
ALIVE = GcsNodeInfo.ALIVE
PATIENCE = 120
"""Seconds that a node may take to start."""
WORKS = '{"worker": 1}'
"""What nodes have that do work, and the head has not."""
TRIES = 3
"""How often a node is started; Ray gives up one that takes more than 30 seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def on_disk(folder: Path) -> int:
    """How many bytes the files in a folder take on the disk, where holes take none."""
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.lstat(f"{path}/{name}").st_blocks * 512
    return found


class Nodes:
    """A cluster whose nodes, and who works with it, have disks of their own at the path `disk`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Prepare to start nodes.

        Args:
            folder: with the place `disk`, which stays empty, and a folder for each disk that is seen there.
            environment: of all processes.
        """
        self._folder, self.disk = folder, folder / "disk"
        self.disk.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
        own = {"SENSMERGE_CACHE": str(self.disk / "cache"), "PYTHONPATH": str(PROJECT)}
        own |= {"RAY_health_check_period_ms": "1000"}
        self._environment = {**kept, **own, **environment}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"127.0.0.1:{free_port()}"

    @property
    def names(self) -> list[str]:
        """The nodes that are there and do work."""
        return [name for name in self._processes if name != "head"]

    def own(self, name: str) -> Path:
        """The folder that a node sees at `disk`, as others may look into it."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, *names: str) -> None:
        """Start a head, which does no work, and nodes of one CPU each."""
        # Sockets need short paths, which pytest's own folders are not.
        temporary = self._folder.parents[1] / f"r{secrets.token_hex(2)}"
        port = self.address.partition(":")[2]
        place = (f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false", "--no-monitor")
        self._start("head", "--head", "--num-cpus=0", *place)
        self._wait("head", lambda: not socket.socket().connect_ex(("127.0.0.1", int(port))))
        gcs = GcsClient(address=self.address)

        def nodes() -> int:
            return sum(one.state == ALIVE for one in gcs.get_all_node_info().values())

        self._wait("head", lambda: nodes() == 1)
        for count, name in enumerate(names, start=2):  # at once, they would take each other's sockets
            for _ in range(TRIES):
                self._start(name, "--num-cpus=1", f"--resources={WORKS}", f"--address={self.address}")
                if self._wait(name, lambda count=count: nodes() == count):
                    break
            else:
                raise AssertionError(f"node {name} did not start")

    def _start(self, name: str, *words: str) -> None:
        ports = [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
        command = [RAY, "start", "--block", "--disable-usage-stats", "--include-log-monitor=false", *ports, *words]
        with (self._folder / f"{name}.log").open("w") as log:
            self._processes[name] = subprocess.Popen(
                self._there(name, command), env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def _there(self, name: str, command: Sequence[object]) -> list[str]:
        """Return a command as one that sees a folder of its own at `disk`."""
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        words = ["unshare", "--mount", "sh", "-c", script, "sh", self.own(name), self.disk, *command]
        return [str(word) for word in words]

    def _wait(self, name: str, is_there: Callable[[], bool]) -> bool:
        """Wait for a node; return whether it came, or ended, as it does on a busy machine."""
        deadline = time.monotonic() + PATIENCE
        while not is_there():
            if self._processes[name].poll() is not None:
                return False
            assert time.monotonic() < deadline, f"node {name} did not come up"
            time.sleep(0.1)
        return True

    def begin(self, name: str, *words: object) -> "subprocess.Popen[str]":
        """Start a `sensmerge` command that sees a disk of its own."""
        command = [sys.executable, "-m", "pipeline", *words]
        options = {"env": self._environment | {"RAY_ADDRESS": self.address}, "cwd": PROJECT, "text": True}
        return subprocess.Popen(self._there(name, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    def do(self, name: str, *words: object) -> str:
        """Do a `sensmerge` command to its end, and return what it says."""
        return self.ended(self.begin(name, *words))

    def ended(self, process: "subprocess.Popen[str]") -> str:
        """Return what a command says that ends well."""
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    @contextmanager
    def watched(self) -> Iterator[dict[str, int]]:
        """Watch, until the block ends, how many bytes at most each node has on its disk."""
        most, finished = dict.fromkeys(self.names, 0), threading.Event()

        def keep_looking() -> None:
            while not finished.wait(0.005):
                for name in most:
                    most[name] = max(most[name], on_disk(self.own(name)))

        thread = threading.Thread(target=keep_looking)
        thread.start()
        try:
            yield most
        finally:
            finished.set()
            thread.join()

    def kill(self, name: str) -> None:
        """Have a node gone from one moment to the next, with all its processes."""
        leader = psutil.Process(self._processes.pop(name).pid)
        # A worker that is left alone for a moment could still end its work, and say so.
        for one in (*leader.children(recursive=True), leader):
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def stop(self) -> None:
        """Stop all nodes."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
