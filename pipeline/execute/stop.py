"""Ends work in order when this process is told to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What tells a process to stop: `kill`, Kubernetes and schedulers; Ctrl-C."""


class Stopped(BaseException):
    """This process was told to stop. Not an Exception: nobody who handles failures of the work may handle it."""

    def __init__(self, signum: int) -> None:
        """Take the number of the signal that said so; the exit status is 128 more, as shells have it."""
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Leave the block by `Stopped` when a signal says so, that all it has opened is closed. For the main thread."""
    told: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        told.append(signum)
        raise KeyboardInterrupt  # what compiled code such as Ray's passes on; it loses others

    before = {each: signal.signal(each, stop) for each in SIGNALS}
    try:
        yield
    except BaseException as error:
        if told:
            raise Stopped(told[0]) from error
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
