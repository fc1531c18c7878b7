"""Refreshes at the times of a cron expression: one at a time, each in a process of its own, until told to stop."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from filelock import FileLock, Timeout
from rich.console import Console

from sensmerge.pipeline.execute.stop import SIGNALS
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.errors import InputError

HEALTH = "health.json"
BEAT = 30.0
"""The health file is written at every event and this often in between, in seconds. One that is older than a few of
these belongs to a schedule that hangs or is gone."""
MEANING = {
    0: "succeeded",
    1: "failed",
    2: "could not start, see above",
    3: "succeeded, but its challenger was not promoted",
    143: "was stopped; the next one continues it",
}
"""What the exit status of a refresh says."""


class Times:
    """The moments that a cron expression means in a time zone, as Debian's cron reads it."""

    def __init__(self, cron: str, timezone: str) -> None:
        """Read an expression.

        Args:
            cron: minute, hour, day of month, month, day of week (0 and 7 are Sunday); before them seconds, if wanted.
            timezone: a name of the IANA database.

        Raises:
            InputError: one of them means nothing, or the expression no moment at all.
        """
        try:
            self._zone = ZoneInfo(timezone)
        except (KeyError, ValueError, OSError) as error:
            raise InputError(f"--timezone {timezone}: unknown; give an IANA name such as Europe/Berlin") from error
        self._cron = cron
        try:
            self.next()
        except CronSimError as error:
            raise InputError(
                f'--cron "{cron}": {error}; give minute, hour, day of month, month and day of week, as in "0 3 * * *"'
            ) from error
        except StopIteration as error:
            raise InputError(f'--cron "{cron}": does not occur in the next 50 years; check day and month') from error

    def next(self, moment: datetime | None = None) -> datetime:
        """Return the first of the moments that is later than the given one, or than now."""
        return next(CronSim(self._cron, (moment or datetime.now(UTC)).astimezone(self._zone)))

    def now(self) -> str:
        """Return the present moment in the time zone, as ISO 8601."""
        return datetime.now(self._zone).isoformat(timespec="seconds")


@dataclass
class Run:
    """A refresh: when it began and ended (ISO 8601, in the schedule's time zone), and its exit status.

    The last two are None while it runs. A negative status is the signal that it died of.
    """

    start: str
    end: str | None = None
    exit_status: int | None = None


@dataclass
class Health:
    """What `health.json` says of a schedule."""

    pid: int = field(default_factory=os.getpid)
    state: str = "idle"
    """idle | running | stopped"""
    last_run: Run | None = None
    """the latest that this process has started"""
    next_run: str | None = None
    """ISO 8601, in the schedule's time zone; None once it is stopped"""


def keep(command: Sequence[str], times: Times, store: Store, console: Console) -> None:
    """Run a command at its times until SIGTERM or SIGINT; a run that is under way is told to stop, and waited for.

    Runs never overlap: if times pass during a run, one run follows right after it. A run that fails does not end the
    schedule; a line says how each run ended.

    Args:
        command: the refresh.
        times: when.
        store: its folder gets `health.json`.
        console: where a line for each event goes.

    Raises:
        InputError: another schedule holds the store.
    """
    store.make()
    lock = FileLock(store.root / ".schedule.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{store.root}: another schedule uses this store; stop it or pass another --store") from error
    try:
        asyncio.run(_Schedule(command, times, store.root / HEALTH, console).keep())
    finally:
        lock.release()


class _Schedule:
    """The loop of a schedule, and what it says of itself."""

    def __init__(self, command: Sequence[str], times: Times, path: Path, console: Console) -> None:
        self._command = command
        self._times = times
        self._path = path
        self._console = console
        self._health = Health()

    async def keep(self) -> None:
        """Wait and run, until told to stop."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[signal.Signals] = loop.create_future()
        for each in SIGNALS:
            loop.add_signal_handler(each, _tell, told, each)
        due = self._times.next()
        self._event(f"up, pid {self._health.pid}, {self._next(due)}")
        while not told.done():
            await self._wait(told, until=due)
            if not told.done():
                # Counted from here, however many times pass before the run ends, one of them is next.
                due = self._times.next()
                await self._run(told, due)
        self._health.state, self._health.next_run = "stopped", None
        self._event(f"stopped by {told.result().name}")

    async def _run(self, told: "asyncio.Future[signal.Signals]", due: datetime) -> None:
        """Run the command once. It is told to stop when this process is, and has ended when this returns."""
        begun = time.monotonic()
        run = self._health.last_run = Run(self._times.now())
        self._health.state = "running"
        # In a session of its own, so that a terminal's Ctrl-C does not reach it as well: it is told once.
        process = await asyncio.create_subprocess_exec(*self._command, start_new_session=True)
        try:
            self._event(f"refresh started, pid {process.pid}, {self._next(due)}")
            ended = asyncio.ensure_future(process.wait())
            await self._wait(told, ended)
            if not ended.done():
                self._event(f"{told.result().name}: stopping the refresh")
        finally:
            if process.returncode is None:
                process.terminate()
            run.exit_status = await process.wait()
        run.end = self._times.now()
        self._health.state = "idle"
        after = "" if told.done() else f", {self._next(due)}"
        self._event(f"refresh {_meaning(run.exit_status)}, {time.monotonic() - begun:.0f} s{after}")

    async def _wait(self, *ends: "asyncio.Future[Any]", until: datetime | None = None) -> None:
        """Wait for one of the futures or for a moment, and show meanwhile that this process lives."""
        while not any(end.done() for end in ends):
            # The clock is read again after every beat: someone may set it, or the machine may have slept.
            seconds = BEAT if until is None else min(BEAT, (until - datetime.now(UTC)).total_seconds())
            if seconds <= 0:
                return
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            self._beat()

    def _next(self, due: datetime) -> str:
        self._health.next_run = due.isoformat()
        return f"next run {due.isoformat()}"

    def _event(self, text: str) -> None:
        self._say(text)
        self._beat()

    def _say(self, text: str) -> None:
        self._console.print(f"{self._times.now()} schedule: {text}", markup=False, highlight=False, soft_wrap=True)

    def _beat(self) -> None:
        try:
            write_json(self._path, asdict(self._health))
        except OSError as error:
            # No reason to end a run: a probe sees the old file, and decides.
            self._say(f"{self._path} cannot be written ({error.strerror})")


def _tell(told: "asyncio.Future[signal.Signals]", by: signal.Signals) -> None:
    if not told.done():
        told.set_result(by)


def _meaning(exit_status: int) -> str:
    if exit_status < 0:
        return f"was ended by {signal.Signals(-exit_status).name}"
    return f"{MEANING.get(exit_status, 'failed')} (exit status {exit_status})"
