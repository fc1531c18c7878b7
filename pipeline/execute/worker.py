"""What a worker runs of a plan: pieces of steps, measured. Imported by workers, so nothing here may import much."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sensmerge.pipeline.store.manifest import file_sizes
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import write_whole
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.stages.job import Job

READ_FROM = ".models.partial"
"""In a folder under construction, and never in an artifact: the states of the models that its pieces were read from."""
FORM = 2
"""Of what pieces leave for `finish`: counts up whenever that of earlier versions lacks something."""


@dataclass(frozen=True)
class Spent:
    """What pieces of a step took."""

    seconds: float = 0.0
    """of all pieces together, each on its worker"""
    peak_memory: int = 0
    """largest resident size of a worker process meanwhile, in bytes"""
    pieces: int = 0
    pieces_run: int = 0
    """the others had been done already, by a run that was interrupted"""

    def __add__(self, other: "Spent") -> "Spent":
        """Return what both took."""
        return Spent(
            self.seconds + other.seconds,
            max(self.peak_memory, other.peak_memory),
            self.pieces + other.pieces,
            self.pieces_run + other.pieces_run,
        )


@dataclass(frozen=True)
class Done:
    """A piece of work that has ended; of a step's last piece, what the whole step took."""

    result: dict[str, Any]
    spent: Spent
    bytes: int = 0
    """of the artifact"""
    node: str = ""
    """name of the machine"""
    node_id: str = ""
    """Ray's, of a step's first piece"""

    @classmethod
    def before(cls, manifest: Mapping[str, Any]) -> "Done":
        """Return what a manifest says of a step that has ended."""
        spent = Spent(**{each.name: manifest[each.name] for each in fields(Spent)})
        return cls(manifest["result"], spent, manifest["bytes"], manifest["node"])

    def manifest(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return asdict(self.spent) | {"bytes": self.bytes, "node": self.node, "result": self.result}


def measured(job: Job, work: Callable[[], Any], threads: int) -> tuple[Any, Spent]:
    """Run work of a job in this worker process and measure it; memory is its largest resident size meanwhile."""
    if job.uses_torch:
        import torch

        torch.set_num_threads(threads)
    _reset_peak_memory()
    start = time.monotonic()
    with noted(f"on {platform.node()}; its log: {_log()}"):
        result = work()
    return result, Spent(time.monotonic() - start, _peak_memory(), 1, 1)


def _log() -> str:
    """Return the file that this process's errors are written to."""
    return os.path.realpath("/proc/self/fd/2") if sys.platform == "linux" else "the worker's, among those of Ray"


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


def run_check(needs: Mapping[str, Path]) -> Done:
    """Read through what a step is about to read: files may have changed since the run made them or looked at them.

    Args:
        needs: the folders of artifacts, by the titles of the steps that made them.

    Raises:
        InputError: a file is not as it was written.
    """
    from sensmerge.pipeline.store.verify import damaged_files

    for title, folder in needs.items():
        wrong = next(damaged_files(folder), None)
        if wrong is not None:
            raise InputError(f"{title}: {wrong} in {folder}, changed during this run; run again, which makes it again")
    return Done({}, Spent())


def keep_if_read_from(models: PlannedModels, job: Job, partial: Path) -> None:
    """Empty the folder under construction of a step that begins, unless it may go on from what is in it.

    Pieces that an interrupted run has done are of use only if the models are still the files that they were read from:
    one that was exchanged while a piece read it, and then put back, would have its digest.
    """
    if not job.resumes and not job.parts():
        return
    record, states = partial / READ_FROM, states_of(models)
    if not record.is_file() or record.read_text() != states:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_whole(record, states)


def states_of(models: PlannedModels) -> str:
    """Return a text that tells whether what pieces left was made from the same files, and in the same form."""
    return json.dumps([FORM, models.states()])


def run_part(job: Job, part: int | str, partial: Path, threads: int, models: PlannedModels = NONE) -> Done:
    """Run one of a job's pieces in the folder under construction; it says whether there was something left to do.

    Raises:
        InputError: bad input that the job found, or a model that is not what it was when the step was planned.
    """
    models.bring(job.reads(part))
    models.check()
    partial.mkdir(parents=True, exist_ok=True)
    was_left, spent = measured(job, lambda: job.run(part, partial), threads)
    models.check()
    return Done({}, spent if was_left else replace(spent, pieces_run=0))


def run_finish(job: Job, store: Store, key: Key, before: Spent, threads: int, models: PlannedModels = NONE) -> Done:
    """Complete a job and publish its artifact, in one go on the worker; errors as of `run_part`."""
    models.bring(job.reads(None))
    models.check()
    goes_on = job.resumes or bool(job.parts())
    partial = store.partial(key)
    published = store.local_manifest(key)
    if goes_on and not partial.exists() and published is not None:
        # A worker published it and died before it could say so.
        store.upload(store.folder(key))
        return Done.before(published)
    if not goes_on and partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    result, spent = measured(job, lambda: job.finish(partial), threads)
    models.check()
    done = Done(result, before + spent, sum(file_sizes(partial).values()), platform.node())
    store.publish(key, done.manifest(), result.get("by_tensor", ()))
    return done
