"""How busy this machine is while a run is at work, as MLflow's system metrics."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERVAL = 10.0
"""Seconds between two samples, as MLflow has it."""


@dataclass(frozen=True)
class Load:
    """What was found at one time."""

    time: int
    """milliseconds since 1970"""
    values: dict[str, float]
    """by MLflow's name of the metric"""


@contextmanager
def sampled(interval: float = INTERVAL) -> Iterator[list[Load]]:
    """Load processor, memory, disk, network, and NVIDIA GPUs where there are any, until the block is left.

    Args:
        interval: seconds between two samples. One more is taken at the end.

    Yields:
        The samples, complete once the block is left.
    """
    from sensmerge.pipeline.tracking.monitors import load_monitors

    monitors = load_monitors()
    samples: list[Load] = []
    ended = threading.Event()

    def sample() -> None:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        samples.append(Load(time.time_ns() // 1_000_000, values))

    def sample_on() -> None:
        while not ended.wait(interval):
            sample()

    thread = threading.Thread(target=sample_on, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        sample()
