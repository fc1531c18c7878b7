"""Never two runs at once: every interleaving that hypothesis finds, of runs that sleep, fail and come back."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count, product
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sensmerge.pipeline.store import lock
from sensmerge.pipeline.store.lock import LEASE, RENEWAL, Claim, Clock, take
from sensmerge.tasks.errors import InputError

OWNERS = range(3)


@dataclass
class Server:
    """A file system with a clock of its own, in whole seconds."""

    time: float = 0.0
    files: dict[str, tuple[bytes, datetime]] = field(default_factory=dict)

    def now(self) -> datetime:
        return datetime.fromtimestamp(int(1e9 + self.time), UTC)


class Stop(BaseException):
    """Ends the thread of a run."""


class Run:
    """A run that takes the lock again and again; it goes on by one request to the server at a time."""

    def __init__(self, server: Server, offset: float) -> None:
        self._server, self._offset = server, offset
        self._turn, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._fault: str | None = None
        self.is_stopped = False
        self.is_asked_to_leave = False
        self.claim: Claim | None = None
        self.held = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._waits.acquire()

    @property
    def holds(self) -> bool:
        """Whether it believes that the store is its own."""
        return self.claim is not None and not self.claim.has_lapsed

    def step(self, fault: str | None = None) -> None:
        """Let the request that it is at through, and wait until it is at the next one."""
        self._fault = fault
        self._turn.release()
        self._waits.acquire()

    def stop(self) -> None:
        self.is_stopped = True
        self._turn.release()
        self._thread.join()

    def _request(self, effect: Callable[[], Any]) -> Any:
        if self.is_stopped:
            raise Stop
        self._waits.release()
        self._turn.acquire()
        if self.is_stopped:
            raise Stop
        fault, self._fault = self._fault, None
        if fault == "lost":
            raise InputError("the request did not come through")
        answer = effect()
        if fault == "unanswered":
            raise InputError("the answer did not come back")
        return answer

    # The claims of the server, as this run reaches them

    def write(self, token: str, content: bytes) -> None:
        self._request(lambda: self._server.files.update({token: (content, self._server.now())}))

    def tokens(self) -> list[str]:
        found: list[str] = self._request(lambda: list(self._server.files))
        return found

    def read(self, token: str) -> tuple[bytes, datetime] | None:
        found: tuple[bytes, datetime] | None = self._request(lambda: self._server.files.get(token))
        return found

    def remove(self, token: str) -> None:
        self._request(lambda: self._server.files.pop(token, None))

    def _work(self) -> None:
        clock = Clock(lambda: self._server.time + self._offset, lambda seconds: self._request(lambda: None))
        try:
            while True:
                try:
                    claim = take(self, "store", 1e9, clock)
                except InputError:
                    continue
                self.claim, self.held = claim, self.held + 1
                while not claim.has_lapsed and not self.is_asked_to_leave:
                    try:
                        claim.renew()
                    except InputError:
                        continue
                self.claim, self.is_asked_to_leave = None, False
                try:
                    claim.leave()
                except InputError:
                    continue
        except Stop:
            pass
        finally:
            self._waits.release()


class Runs(RuleBasedStateMachine):
    """Three runs on one store."""

    @initialize(offsets=st.tuples(*[st.floats(-1e6, 1e6) for _ in OWNERS]))
    def begin(self, offsets: tuple[float, ...]) -> None:
        self.server, numbers = Server(), count()
        # Equal for equal examples, and in another order than the runs come.
        lock.uuid4 = lambda: UUID(int=(next(numbers) * 7919) % 1009)
        self.runs = [Run(self.server, offset) for offset in offsets]

    @rule(number=st.sampled_from(OWNERS), steps=st.integers(1, 12))
    def go_on(self, number: int, steps: int) -> None:
        for _ in range(steps):
            self.runs[number].step()
            self.never_two()

    @rule(number=st.sampled_from(OWNERS), fault=st.sampled_from(["lost", "unanswered"]))
    def fail(self, number: int, fault: str) -> None:
        self.runs[number].step(fault)

    @rule(seconds=st.sampled_from([0.4, 1.0, 30.0, 100.0, 299.0, 300.0, 305.0, 309.5, 310.0, 311.0, 1000.0]))
    def time_goes_on(self, seconds: float) -> None:
        """While nobody gets an answer: all sleep, or wait for the server."""
        self.server.time += seconds

    @precondition(lambda self: any(run.holds for run in self.runs))
    @rule()
    def end(self) -> None:
        for run in self.runs:
            run.is_asked_to_leave = run.holds

    @rule(content=st.sampled_from([b"", b"{", b"[]", b'{"number": "1"}', b"\xff"]))
    def damage(self, content: bytes) -> None:
        """A file that is just being written, or that nobody can read."""
        for token, (_, modified) in list(self.server.files.items())[:1]:
            self.server.files[token] = content, modified

    @invariant()
    def never_two(self) -> None:
        if hasattr(self, "runs"):
            assert sum(run.holds for run in self.runs) <= 1

    def teardown(self) -> None:
        for run in getattr(self, "runs", ()):
            run.stop()
        lock.uuid4 = uuid4


TestRuns = Runs.TestCase
TestRuns.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def slept(seconds: float) -> Callable[[Server], None]:
    return lambda server: setattr(server, "time", server.time + seconds)


def damaged(server: Server) -> None:
    server.files.update({token: (b"{", modified) for token, (_, modified) in server.files.items()})


@pytest.mark.parametrize("event", [slept(0), slept(299), slept(309), slept(311), damaged])
@pytest.mark.parametrize("tokens", [(1, 2, 3, 4), (4, 3, 2, 1)])
def test_two_runs_that_stop_for_each_other_anywhere(
    event: Callable[[Server], None], tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stops anywhere, something happens, the other goes on anywhere, then the first again, then the other."""
    for first, second in product(range(1, 14), range(1, 20)):
        server, numbers = Server(), iter(tokens)
        monkeypatch.setattr(lock, "uuid4", lambda numbers=numbers: UUID(int=next(numbers)))
        runs = [Run(server, 0), Run(server, 1e5)]
        try:
            for number, steps in ((0, first), (1, second), (0, 24), (1, 24)):
                for _ in range(steps):
                    runs[number].step()
                    assert not all(run.holds for run in runs), (first, second)
                if (number, steps) == (0, first):
                    event(server)
        finally:
            for run in runs:
                run.stop()


def test_every_run_has_its_turn_whatever_died_before() -> None:
    server = Server()
    runs = [Run(server, offset) for offset in (0.0, 5e5, -5e5)]
    for round_ in range(600):
        run = runs[round_ % 3]
        run.step()
        server.time += 0.5
        if run.holds and run.held % 2:
            run.is_asked_to_leave = True
        elif run.holds:
            server.time += 400  # it died in its sleep
    for run in runs:
        run.stop()
    assert all(run.held > 3 for run in runs)


def test_a_held_store_is_waited_for_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    claims, time = Plain(), [0.0]
    clock = Clock(lambda: time[0], lambda seconds: time.__setitem__(0, time[0] + seconds))
    first = take(claims, "s3://models", 0, clock)
    with pytest.raises(InputError, match=r"s3://models: locked by another run \(process \d+ on .*\); wait longer"):
        take(claims, "s3://models", 30, clock)
    assert 30 <= time[0] <= 32
    assert "waiting for it, 30 s at most" in capsys.readouterr().err
    first.leave()
    assert list(claims.files) == []
    take(claims, "s3://models", 0, clock).leave()


def test_what_cannot_be_read_blocks_no_longer_than_a_lease() -> None:
    claims = Plain()
    claims.write("damaged", b"{")
    with pytest.raises(InputError, match=r"locked by another run \(an unknown process, since"):
        take(claims, "s3://models", 0, Clock(pause=lambda seconds: None, now=counting(5)))
    claims.files["damaged"] = b"{", claims.files["damaged"][1] - 2 * LEASE
    take(claims, "s3://models", 0)
    assert "damaged" not in claims.files


@dataclass
class Plain:
    """Claims in memory, by this machine's clock."""

    files: dict[str, tuple[bytes, datetime]] = field(default_factory=dict)

    def write(self, token: str, content: bytes) -> None:
        self.files[token] = content, datetime.now(UTC)

    def tokens(self) -> list[str]:
        return list(self.files)

    def read(self, token: str) -> tuple[bytes, datetime] | None:
        return self.files.get(token)

    def remove(self, token: str) -> None:
        self.files.pop(token, None)


def counting(step: float) -> Callable[[], float]:
    time = [0.0]

    def now() -> float:
        time[0] += step
        return time[0]

    return now


def test_a_renewal_that_comes_through_too_late_is_none() -> None:
    """It began in time; but when it was written, others may have deleted the claim and gone on."""
    claims, time = Plain(), [0.0]
    claim = take(claims, "s3://models", 0, Clock(lambda: time[0]))
    write = claims.write

    def slow(token: str, content: bytes) -> None:
        time[0] += 12
        write(token, content)

    time[0] = LEASE.total_seconds() - 1
    claims.write = slow  # type: ignore[method-assign]
    claim.renew()
    assert claim.has_lapsed


def test_whether_a_hidden_process_lives_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    about = lock._this_process()
    assert not lock._has_died(about)
    monkeypatch.setattr(lock, "_started", lambda process: None)  # as where /proc hides those of other users
    assert not lock._has_died(about)
    assert lock._has_died(about | {"process": 2**22 + 1})


def test_a_claim_that_lapsed_is_not_renewed() -> None:
    claims, time = Plain(), [0.0]
    claim = take(claims, "s3://models", 0, Clock(lambda: time[0]))
    time[0] = LEASE.total_seconds()
    assert claim.has_lapsed
    del claims.files[claim.token]
    claim.renew()
    assert claims.files == {}
    assert timedelta(0) < RENEWAL < LEASE / 3
