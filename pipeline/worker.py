"""What a worker runs of a plan: pieces of steps, measured. Imported by workers, so nothing here may import much."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store import Key, Store, file_sizes


@dataclass(frozen=True)
class Done:
    """A piece of work that has ended."""

    result: dict[str, Any]
    seconds: float
    peak_memory: int
    """largest resident size of the process meanwhile, in bytes"""


def _measured(work: Callable[[], Any], threads: int) -> Done:
    """Run work in this worker process and measure it; memory is the process's largest resident size meanwhile."""
    import torch

    torch.set_num_threads(threads)
    _reset_peak_memory()
    start = time.monotonic()
    result = work()
    return Done(result or {}, time.monotonic() - start, _peak_memory())


def _reset_peak_memory() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Return the largest resident size of this process in bytes, since the last reset where the system has one."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_part(part: Callable[..., None], partial: Path, threads: int) -> Done:
    """Run one of a step's pieces, which writes to the folder under construction."""
    partial.mkdir(parents=True, exist_ok=True)
    return _measured(lambda: part(out=partial), threads)


def run_finish(
    finish: Callable[..., dict[str, Any]],
    store: Store,
    key: Key,
    has_parts: bool,
    before: tuple[float, int],
    threads: int,
) -> Done:
    """Run a step's last piece and publish its artifact, in one go on the worker."""
    partial = store.partial(key)
    published = store.manifest(key)
    if has_parts and not partial.exists() and published is not None:
        # A worker published it and died before it could say so.
        return Done(published["result"], published["seconds"], published["peak_memory"])
    if not has_parts and partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    done = _measured(lambda: finish(out=partial), threads)
    seconds, peak = before[0] + done.seconds, max(before[1], done.peak_memory)
    size = sum(file_sizes(partial).values())
    manifest = {"seconds": seconds, "peak_memory": peak, "bytes": size, "result": done.result}
    store.publish(key, manifest)
    return Done(done.result, seconds, peak)
