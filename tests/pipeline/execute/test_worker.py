"""What a worker has to import before it can begin; a fresh one starts for every run, and often for every stage."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.execute.worker import Spent, run_finish
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.stages.job import Job

STAGES = "sensmerge.tasks.stages"
NEVER = {"ray", "mlflow", "datasets", "pandas", "peft", "sklearn", "matplotlib", "typer"}
"""What no step needs before it knows its models: peft is imported for adapters only."""
NETWORKS = {"transformers", "accelerate", "tokenizers"}


def printed(program: str) -> str:
    """What a program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (["sensmerge.pipeline.execute.worker"], NEVER | NETWORKS | {"torch", "numpy", "numba"}),
        ([f"{STAGES}.download"], NEVER | NETWORKS | {"torch", "numba"}),
        ([f"{STAGES}.task_vectors", f"{STAGES}.merge"], NEVER | NETWORKS),
        ([f"{STAGES}.statistics", f"{STAGES}.cross_task", f"{STAGES}.route", f"{STAGES}.evaluate"], NEVER),
    ],
    ids=["worker", "download", "merge", "networks"],
)
def test_a_step_imports_what_it_needs(modules: list[str], unwanted: set[str]) -> None:
    program = f"import sys, {', '.join(modules)}\nprint(sorted({unwanted!r} & sys.modules.keys()))"
    assert printed(program) == "[]\n"


def test_a_download_runs_without_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from sensmerge.pipeline.execute.worker import Spent, run_finish
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.checkpoints.listing import LocalModel
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.stages.download import DownloadJob

here = Path({str(tmp_path)!r})
listing = resolve(LocalModel(Path({str(llamas["base"])!r})), here)
for file in listing.unhashed():
    listing = listing.hashed(file.name, here)
job = DownloadJob(listing, here)
done = run_finish(job, Store(here), Key.of("base", job), Spent(), 1)
print(done.result["bytes"] > 0, "torch" in sys.modules)
"""
    assert printed(program) == "True False\n"


@dataclass(frozen=True)
class Twice(Job):
    """Is interrupted after its first half."""

    stage = "statistics"
    version = 1
    uses_torch = False

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        if not (out / "half").exists():
            (out / "half").touch()
            raise KeyboardInterrupt
        return {"whole": True}


@dataclass(frozen=True)
class TwiceOn(Twice):
    """The same, and it goes on."""

    resumes = True


def test_a_job_that_goes_on_finds_what_it_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for job in (Twice(), TwiceOn()):
        key = Key.of(type(job).__name__, job)
        with pytest.raises(KeyboardInterrupt):
            run_finish(job, store, key, Spent(), 1)
    with pytest.raises(KeyboardInterrupt):
        run_finish(Twice(), store, Key.of("Twice", Twice()), Spent(), 1)
    done = run_finish(job, store, key, Spent(), 1)
    assert done.result == {"whole": True}
    # Its worker may have died before it could say so.
    assert run_finish(job, store, key, Spent(), 1) == done
    assert read_json(store.folder(key) / "manifest.json")["seconds"] == done.spent.seconds
