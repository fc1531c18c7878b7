"""Faults at chosen points of a command: it is killed, or what it writes is refused; and then done again."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import harm
from tests.faults.operations import Operations, disk_full, kill, read_only
from tests.faults.world import Ended, Scenario, command, restore

OPERATION, TIME = "killed at a file operation", "killed at a time"
FULL, READ_ONLY = "disk full from a file operation on", "read-only from a file operation on"
REFUSALS: Mapping[str, Callable[[str], None]] = {FULL: disk_full, READ_ONLY: read_only}
DONE = (0, 3)
"""Exit statuses of a command that nothing disturbs; a refresh whose challenger is no better has 3."""


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    fault: str
    command: str
    where: str
    """the operation or the time"""
    seconds: float
    harm: list[str] = field(default_factory=list)
    came: bool = True
    """whether the command was still at work when the fault was to come"""


@dataclass(frozen=True)
class Point:
    """Where a fault comes."""

    fault: str
    number: int = 0
    """of the file operation"""
    after: float = 0
    """seconds"""
    elsewhere: bool = False
    """whether the next command comes from another machine, which has nothing of a store at a URL"""


@dataclass(frozen=True)
class Trials:
    """A command that is disturbed again and again, in a folder of its own."""

    scenario: Scenario
    folder: Path
    template: Path
    """the world as the command finds it"""
    expected: Mapping[str, str]
    """what the world holds after the undisturbed command"""
    operations: Sequence[tuple[str, str]]
    """of the undisturbed command"""
    seconds: float
    """that it took"""

    @classmethod
    def prepared(cls, scenario: Scenario, folder: Path) -> "Trials":
        """Make the world, and do the command undisturbed."""
        template = folder.with_name(f"{folder.name}-{scenario.name}")
        for left in (folder, template):
            shutil.rmtree(left, ignore_errors=True)
        scenario.make(folder)
        shutil.copytree(folder, template, symlinks=True)
        begin = time.monotonic()
        ended = command(folder, scenario.words, Operations(folder))
        assert ended.status in DONE, ended.said
        seconds, wrong = time.monotonic() - begin, list(harm.leftovers(folder))
        assert not wrong, wrong
        return cls(scenario, folder, template, harm.held(folder, scenario.store), ended.operations, seconds)

    def points(self, kills: int, draw: random.Random) -> Iterator[Point]:
        """Yield so many kills, of which a quarter at times, and a fifth as many refusals.

        MLflow's own copies of pictures and code are hundreds of operations of one kind: few points are there.
        """
        own = [number for number, (_, path) in enumerate(self.operations) if "mlartifacts" not in path]
        for number in range(kills):
            elsewhere = self.scenario.store == "remote" and draw.random() < 0.5
            if number % 4 == 3:
                yield Point(TIME, after=draw.uniform(0.05, self.seconds), elsewhere=elsewhere)
            else:
                place = draw.choice(own) if number % 8 != 4 else draw.randrange(len(self.operations))
                yield Point(OPERATION, place, elsewhere=elsewhere)
        for number in range(-(-kills // 5)):
            yield Point((FULL, READ_ONLY)[number % 2], draw.choice(own))

    def outcome(self, point: Point) -> Outcome:
        """Disturb the command at a point, do it again, and say what is wrong then."""
        begin = time.monotonic()
        restore(self.template, self.folder)
        wrong: list[str] = []
        if point.fault == TIME:
            where = f"{point.after:.2f} s"
            ended = command(self.folder, self.scenario.words, after=point.after)
        else:
            where, fault = " ".join(self.operations[point.number]), REFUSALS.get(point.fault, kill)
            ended = command(self.folder, self.scenario.words, Operations(self.folder, fault, point.number))
        if point.fault in REFUSALS:
            wrong += not_one_line(ended)
        came = point.fault in REFUSALS or ended.status == -signal.SIGKILL
        if point.elsewhere:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
            where += ", then from another machine"
        wrong += self.after_fault()
        return Outcome(point.fault, self.scenario.name, where, time.monotonic() - begin, wrong, came)

    def after_fault(self) -> Iterator[str]:
        """Yield what is wrong in the store, and what the next command does not put right."""
        verify = ["verify", "--store", f"file://{self.folder}/remote" if self.scenario.store == "remote" else "store"]
        if (self.folder / self.scenario.store).is_dir():
            yield from _unclean("verify after the fault", command(self.folder, verify), (0,))
        yield from _unclean("the command again", command(self.folder, self.scenario.words), DONE)
        yield from harm.leftovers(self.folder)
        yield from harm.differences(self.expected, harm.held(self.folder, self.scenario.store))
        yield from _unclean("verify", command(self.folder, verify), (0,))


def not_one_line(ended: Ended) -> Iterator[str]:
    """Yield what a command has said that was refused something, if that is not one line."""
    if "Traceback" in ended.said or ended.status < 0:
        yield f"ends with status {ended.status}: {ended.said[-500:]}"


def _unclean(what: str, ended: Ended, statuses: Sequence[int]) -> Iterator[str]:
    if ended.status not in statuses or "Traceback" in ended.said:
        yield f"{what} ends with status {ended.status}: {ended.said[-500:]}"
