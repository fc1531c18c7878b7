"""The lock of a store at a URL: one run at a time, on any file system that shows at once what was written.

Object stores differ in whether they can write a file only if nobody else has, and some servers ignore that they were
asked to. So no file is written by two: each run has one of its own, its claim, and they queue as in a bakery (L.
Lamport, "A new solution of Dijkstra's concurrent programming problem", 1974). A run that comes shows itself, takes the
number after the largest that it sees, and waits for all that have a smaller one or are still choosing theirs. A claim
that is not renewed for `LEASE` has lapsed: the others go on without it. They tell its age by the server's times alone.
The run itself counts from the moment it began to write, so it knows earlier than they do.
"""

import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from uuid import uuid4

from filelock import FileLock, Timeout

from sensmerge.pipeline.store.remote import Remote
from sensmerge.tasks.errors import InputError

LOCKS = ".locks"
"""Folder of the claims in a store at a URL."""
LEASE = timedelta(minutes=5)
"""A claim that was not renewed for so long has lapsed for the run that has it."""
GRACE = timedelta(seconds=10)
"""So much later it has for the others: some servers give times in whole seconds."""
RENEWAL = timedelta(minutes=1)
RETRY = timedelta(seconds=5)
"""After so long a renewal that failed is tried again."""
POLL = 1.0
"""Seconds between two looks at the claims of other runs."""
CHOOSING = 10.0
"""Seconds that a run waits at least for one that is still choosing its number."""


class Claims(Protocol):
    """The files of all runs that hold or wait for a store."""

    def write(self, token: str, content: bytes) -> None:
        """Write the claim of a run."""

    def tokens(self) -> list[str]:
        """Return the tokens of all claims."""

    def read(self, token: str) -> tuple[bytes, datetime] | None:
        """Return a claim and when the server wrote it; None if it is gone."""

    def remove(self, token: str) -> None:
        """Delete a claim, if it is there."""


@dataclass(frozen=True)
class RemoteClaims:
    """The claims in a folder of a store at a URL."""

    remote: Remote

    def write(self, token: str, content: bytes) -> None:
        """See `Claims`."""
        self.remote.write(_path(token), content)

    def tokens(self) -> list[str]:
        """See `Claims`."""
        return [PurePosixPath(path).stem for path in self.remote.files(LOCKS)]

    def read(self, token: str) -> tuple[bytes, datetime] | None:
        """See `Claims`."""
        return self.remote.read_with_time(_path(token))

    def remove(self, token: str) -> None:
        """See `Claims`."""
        self.remote.remove(_path(token))


def _path(token: str) -> str:
    return f"{LOCKS}/{token}.json"


def is_held(remote: Remote, token: str) -> bool:
    """Return whether no other run has taken over the store from the one with a claim."""
    return remote.exists(_path(token))


def boot_time() -> float:
    """Return seconds that go on while the machine sleeps, where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class Clock:
    """The time of one machine."""

    now: Callable[[], float] = boot_time
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class _Claim:
    """What is known of a run that holds or waits for a store."""

    token: str
    number: int | None
    """None while it chooses one"""
    is_readable: bool
    """whether the file says so: it may just be being written, or be damaged"""
    modified: datetime
    about: Mapping[str, Any]

    @classmethod
    def of(cls, token: str, content: bytes, modified: datetime) -> "_Claim":
        try:
            about = json.loads(content)
            number = about["number"]
            if number is not None and type(number) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            return cls(token, None, False, modified, {})
        return cls(token, number, True, modified, about)

    def __str__(self) -> str:
        if "process" not in self.about:
            return f"an unknown process, since {self.modified.isoformat('T', 'seconds')}"
        return f"process {self.about['process']} on {self.about.get('host')}, since {self.about.get('since')}"


@dataclass
class Claim:
    """This run's place in the queue."""

    claims: Claims
    clock: Clock = field(default_factory=Clock)
    token: str = field(default_factory=lambda: uuid4().hex)
    _about: Mapping[str, Any] = field(default_factory=lambda: _this_process())
    _number: int | None = None
    _renewed: float = -math.inf
    """when the last write that came through began"""

    @property
    def has_lapsed(self) -> bool:
        """Whether others may go on as if this run were no more."""
        return self.clock.now() - self._renewed >= LEASE.total_seconds()

    def enter(self) -> None:
        """Join the queue, still without a number."""
        self._write(None)

    def renew(self) -> None:
        """Show that this run is still there; a claim that has lapsed stays so."""
        if not self.has_lapsed:
            self._write(self._number)

    def renew_in_time(self) -> None:
        """Renew where it is time to."""
        if self.clock.now() - self._renewed >= RENEWAL.total_seconds():
            self.renew()

    def leave(self) -> None:
        """Leave the queue, or let go of the store."""
        self.claims.remove(self.token)

    def first_before(self) -> _Claim | None:
        """Return a claim that this run has to wait for; None if it is its turn, or the claim has lapsed.

        Claims of others that have lapsed are deleted, so that their runs, if there are any still, see that they may not
        go on.
        """
        others = self._others()
        if self._number is None and not self.has_lapsed:
            unknown = next((one for one in others if not one.is_readable), None)
            if unknown is not None:
                return unknown
            self._write(1 + max((one.number or 0 for one in others), default=0))
            others = self._others()
        own = (self._number or 0, self.token)
        ahead = [one for one in others if one.number is None or (one.number, one.token) < own]
        return None if self.has_lapsed else min(ahead, key=_order, default=None)

    def _write(self, number: int | None) -> None:
        begin, before = self.clock.now(), self._renewed
        self.claims.write(self.token, json.dumps({"number": number, **self._about}).encode())
        # A write that took so long may have come after others had deleted the claim and gone on.
        in_time = before == -math.inf or self.clock.now() - before < LEASE.total_seconds()
        self._number, self._renewed = number, begin if in_time else -math.inf

    def _others(self) -> list[_Claim]:
        """Return the claims of others that have not lapsed."""
        own = self.claims.read(self.token)
        if own is None:  # another run took this one for dead
            self._renewed = -math.inf
            return []
        found = []
        for token in self.claims.tokens():
            content = self.claims.read(token) if token != self.token else None
            if content is None:
                continue
            one = _Claim.of(token, *content)
            if own[1] - one.modified >= LEASE + GRACE or _has_died(one.about):
                self.claims.remove(token)
            else:
                found.append(one)
        return found


def _order(claim: _Claim) -> tuple[bool, int, str]:
    return claim.number is None, claim.number or 0, claim.token


def take(claims: Claims, place: str, wait: float, clock: Clock | None = None) -> Claim:
    """Return a claim that holds the store.

    Args:
        claims: of all runs.
        place: the store, for messages.
        wait: seconds to wait for other runs to end.
        clock: of this machine.

    Raises:
        InputError: another run holds it after that time.
    """
    clock = clock or Clock()
    begin, said = clock.now(), False
    while True:
        claim = Claim(claims, clock)
        try:
            claim.enter()
            while (before := claim.first_before()) is not None:
                waited, patience = clock.now() - begin, wait if before.number is not None else max(wait, CHOOSING)
                if waited >= patience:
                    raise InputError(
                        f"{place}: locked by another run ({before}); wait longer (--wait SECONDS) or pass another "
                        "--store"
                    )
                if wait and not said:
                    sys.stderr.write(f"{place}: locked by {before}; waiting for it, {wait:g} s at most\n")
                    said = True
                clock.pause(min(POLL, patience - waited))
                claim.renew_in_time()
        except BaseException:
            with suppress(InputError):  # what went wrong first is what matters
                claim.leave()
            raise
        if not claim.has_lapsed:
            return claim
        claim.leave()  # this machine slept: it joins the queue again


@contextmanager
def held(claims: Claims, place: str, wait: float) -> Iterator[Claim]:
    """Hold the store within the block, and renew the claim meanwhile; arguments and errors as of `take`."""
    claim = take(claims, place, wait)
    ended = threading.Event()
    renewing = threading.Thread(target=_keep, args=(claim, place, ended), daemon=True)
    renewing.start()
    try:
        yield claim
    finally:
        ended.set()
        renewing.join()
        try:
            claim.leave()
        except InputError as error:
            sys.stderr.write(f"{place}: the lock is left behind for {LEASE} at most ({error})\n")


def _keep(claim: Claim, place: str, ended: threading.Event) -> None:
    pause = RENEWAL
    while not ended.wait(pause.total_seconds()) and not claim.has_lapsed:
        try:
            claim.renew()
            pause = RENEWAL
        except InputError as error:
            sys.stderr.write(f"{place}: the lock is not renewed yet ({error}); trying again\n")
            pause = RETRY


def _this_process() -> dict[str, Any]:
    found = {"host": platform.node(), "process": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}
    return found | {"machine": _machine(), "started": _started(os.getpid())}


def _machine() -> str | None:
    """Return what two processes share that can see each other by their numbers: machine, boot and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return None


def _started(process: int) -> str | None:
    """Return when a process of this machine started, in the system's own units; None if there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _has_died(about: Mapping[str, Any]) -> bool:
    """Return whether the process that has a claim was on this machine and is no more."""
    machine, process = _machine(), about.get("process")
    if machine is None or about.get("machine") != machine or not isinstance(process, int):
        return False
    started = _started(process)
    if started is not None:
        return started != about.get("started")
    try:  # where /proc hides the processes of other users
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def alone(root: Path, wait: float) -> Iterator[None]:
    """Hold a folder of this machine, which others that do so may be waited for.

    Raises:
        InputError: another run holds it after that many seconds, or it cannot be written.
    """
    lock = FileLock(root / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait:
                sys.stderr.write(f"{root}: locked by another run; waiting for it, {wait:g} s at most\n")
            lock.acquire(timeout=wait, poll_interval=0.2)
    except Timeout as error:
        waited = f" still, after {wait:g} s" if wait else ""
        raise InputError(
            f"{root}: locked by another run{waited}; wait longer (--wait SECONDS) or pass another --store"
        ) from error
    except OSError as error:
        raise InputError(f"--store {root}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        lock.release()
