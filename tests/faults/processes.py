"""Faults of a real run on Ray: processes are killed or told to stop, the disk is full, the MLflow server is gone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.faults import harm
from tests.faults.kills import DONE, Outcome, Trials
from tests.faults.world import LIMIT, RUN, command, restore

PROJECT = Path(__file__).resolve().parents[2]
AFTER = 30
"""Seconds within which nothing of a run may be left after its end."""
STEPS = ("merge ta", "cross_task all", "evaluate ties-sens", "route ta-se")
"""At which faults come; others take so little time that they are missed. A worker is called by what it does."""
IDLE = ("Agent", "dashboard", "log_monitor")
"""In the command lines of what watches Ray, which notices within a minute that there is none any more."""
RAYLET, GCS = "raylet/raylet", "gcs_server"
"""In the command lines of Ray's other processes."""
TRIES = 6
PATIENCE = 900
"""Seconds within which a run gives up a server that is gone; MLflow asks it again and again, for some minutes."""
LINES = 3
"""So many lines may end a run that was disturbed; a traceback is longer."""


class Real:
    """A command line in a process of its own, in a world."""

    def __init__(self, world: Path, words: Sequence[str] = RUN, log: str = "real.log") -> None:
        """Start it."""
        self._log = world.with_name(f"{world.name}-{log}")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with self._log.open("w") as file:
            self.process = psutil.Popen(
                [sys.executable, "-W", "ignore", "-m", "sensmerge.pipeline", *words],
                cwd=world,
                env=environment | {"PYTHONPATH": str(PROJECT), "SENSMERGE_CACHE": str(world / "cache")},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def find(self, what: str) -> psutil.Process | None:
        """Return a process that it has started, by a part of its command line; None once it has ended itself."""
        deadline = time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < deadline:
            for one in self._started():
                if what in _line(one):
                    return one
            time.sleep(0.002)
        return None

    def _started(self) -> list[psutil.Process]:
        try:
            return list(self.process.children(recursive=True))
        except psutil.Error:
            return []

    def ended(self, limit: float = LIMIT) -> tuple[int, str]:
        """Wait so many seconds for its end, and return its exit status and what it has said."""
        status = self.process.wait(limit)
        return int(status), self._log.read_text()

    def survivors(self) -> list[str]:
        """Return the processes left behind that may still write after a while; all are ended."""
        deadline = time.monotonic() + AFTER
        while found := [line for line in map(_line, self._left()) if line and not any(name in line for name in IDLE)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.3)
        for one in self._left():
            with suppress(psutil.Error):
                one.kill()
        return [line[:80] for line in found]

    def _left(self) -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if self._is_of(one)]

    def _is_of(self, one: psutil.Process) -> bool:
        try:
            return os.getsid(one.pid) == self.process.pid and one.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ProcessLookupError):
            return False


def _line(process: psutil.Process) -> str:
    """Return the command line of a process; nothing if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class MissedError(Exception):
    """The run has ended before the fault came."""


@dataclass(frozen=True)
class Processes:
    """Faults of processes, each with the trials that say what comes of it."""

    trials: Trials
    draw: random.Random

    def outcomes(self, share: int = 0, shares: int = 1) -> Iterator[Outcome]:
        """Do a share of them, one after the other."""
        faults: list[tuple[str, str, Callable[[], list[str]]]] = []
        for step in STEPS:
            faults.append(("SIGKILL of a worker", step, partial(self._worker, step)))
            faults.append(("SIGKILL of the driver", step, partial(self._driver, signal.SIGKILL, step)))
            faults.append(
                ("SIGKILL of the driver, then at once the next run", step, partial(self._driver_and_on, step))
            )
        for step in STEPS[::2]:
            faults.append(("SIGKILL of the raylet", step, partial(self._of_ray, RAYLET, step)))
            faults.append(("SIGTERM of the driver", step, partial(self._driver, signal.SIGTERM, step)))
        faults.append(("SIGKILL of the GCS", STEPS[0], partial(self._of_ray, GCS, STEPS[0])))
        faults.append(("SIGINT of the driver", STEPS[1], partial(self._driver, signal.SIGINT, STEPS[1])))
        faults += [
            ("a small disk is full", size, partial(self._small_disk, size)) for size in ("400k", "900k", "1500k")
        ]
        faults.append(("a disk is read-only", "", self._read_only_disk))
        faults += [("MLflow's server is killed", "record", self._server)] * 2
        faults.append(("two runs at once", "", partial(self._two, (), (0, 2))))
        faults.append(("two runs at once, and one waits", "", partial(self._two, ("--wait", "120"), (0, 0))))
        for name, where, fault in faults[share::shares]:
            yield self._outcome(name, where, fault)

    def _outcome(self, name: str, where: str, fault: Callable[[], list[str]]) -> Outcome:
        begin, wrong = time.monotonic(), ["the fault never came in time"]
        for _ in range(TRIES):
            restore(self.trials.template, self.trials.folder)
            try:
                wrong = fault()
                break
            except MissedError:
                continue
        wrong += self.trials.after_fault()
        return Outcome(name, "run on Ray", where, time.monotonic() - begin, wrong)

    def _at(self, step: str, words: Sequence[str] = RUN) -> Real:
        """Start a run and return it when a worker is at a step."""
        real = Real(self.trials.folder, words)
        if real.find(f"ray::{step}") is None:
            real.survivors()
            raise MissedError
        return real

    def _worker(self, step: str) -> list[str]:
        """Kill the worker at a step; its work is done again, so the run goes on."""
        real = self._at(step)
        worker = real.find(f"ray::{step}")
        if worker is None:
            raise MissedError
        worker.kill()
        status, said = real.ended()
        wrong = [] if status in DONE else [f"the run ends with status {status}: {said[-500:]}"]
        return wrong + _left(real)

    def _of_ray(self, what: str, step: str) -> list[str]:
        real = self._at(step)
        one = real.find(what)
        if one is None:
            raise MissedError
        one.kill()
        status, said = real.ended()
        return [*_long(status, said), *_left(real)]

    def _driver(self, number: signal.Signals, step: str) -> list[str]:
        real = self._at(step)
        real.process.send_signal(number)
        status, said = real.ended()
        wrong = [] if number == signal.SIGKILL else list(_long(status, said))
        return wrong + _left(real)

    def _driver_and_on(self, step: str) -> list[str]:
        """Kill the driver while a worker is at a step, and do not wait for the worker's end."""
        real = self._at(step)
        real.process.kill()
        real.process.wait()
        again = command(self.trials.folder, self.trials.scenario.words)
        wrong = [] if again.status in DONE else [f"the next run ends with status {again.status}: {again.said[-700:]}"]
        return wrong + _left(real)

    def _small_disk(self, size: str) -> list[str]:
        """Run in a store on a file system of its own, which is full at some point; then there is room."""
        store, aside = self.trials.folder / "store", self.trials.folder / "aside"
        store.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", store], check=True)
        try:
            real = Real(self.trials.folder)
            status, said = real.ended()
            shutil.copytree(store, aside, symlinks=True)
        finally:
            subprocess.run(["umount", store], check=True)
        store.rmdir()
        aside.rename(store)
        wrong = [] if status else ["there was room enough"]
        return [*wrong, *_long(status, said), *_left(real)]

    def _read_only_disk(self) -> list[str]:
        """Run in a store that only can be read, and that has nothing yet."""
        store = self.trials.folder / "store"
        store.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", store], check=True)
        try:
            real = Real(self.trials.folder)
            status, said = real.ended()
        finally:
            subprocess.run(["umount", store], check=True)
        wrong = [] if status == 2 and len(said.splitlines()) == 1 else [f"status {status}: {said[-500:]}"]
        return wrong + _left(real)

    def _server(self) -> list[str]:
        """Kill MLflow's server while a run works or is recorded; once it is back, the run is recorded."""
        from tests.pipeline.test_tracking_server import Server

        folder = self.trials.folder / "server"
        folder.mkdir()
        server = Server(f"sqlite:///{folder / 'mlflow.db'}", folder)
        server.start()
        words = (*RUN, "--tracking-uri", server.uri)
        try:
            real = self._at(STEPS[0], words)
            while real.process.poll() is None and not self._is_recording(folder / "mlflow.db"):
                time.sleep(0.05)
            time.sleep(self.draw.uniform(0, 1))
            server.stop()
            status, said = real.ended(PATIENCE)
            wrong = [*_long(status, said), *_left(real)]
            server.start()
            again = Real(self.trials.folder, words)
            status, said = again.ended()
            wrong += [] if status == 0 else [f"the run again ends with status {status}: {said[-500:]}"]
            expected = {key: one for key, one in self.trials.expected.items() if key.startswith("MLflow")}
            wrong += harm.differences(expected, harm.recorded(folder / "mlflow.db"))
        finally:
            with suppress(ProcessLookupError):  # it was not started again
                server.stop()
        return wrong

    def _is_recording(self, database: Path) -> bool:
        return any(name.endswith("is open") for name in harm.recorded(database))

    def _two(self, more: Sequence[str], statuses: tuple[int, int]) -> list[str]:
        two = [Real(self.trials.folder, (*RUN, *more), log=f"{name}.log") for name in ("one", "other")]
        ended = [one.ended() for one in two]
        wrong = [] if tuple(sorted(status for status, _ in ended)) == statuses else [str(ended)[-800:]]
        return wrong + [left for one in two for left in _left(one)]


def _long(status: int, said: str) -> Iterator[str]:
    """Yield what a run has said that was disturbed, if that is no short message or the run has not ended by itself."""
    last = said[said.rfind("error: ") :] if status else ""
    if status < 0 or "Traceback" in said or (status and len(last.splitlines()) > LINES):
        yield f"ends with status {status}: {said[-700:]}"


def _left(real: Real) -> list[str]:
    return [f"a process is left: {one}" for one in real.survivors()]
