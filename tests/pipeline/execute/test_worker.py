"""What a worker has to import before it can begin; a fresh one starts for every run, and often for every stage."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.execute.pieces import prepared
from sensmerge.pipeline.execute.worker import Done, Spent, run_finish, run_part
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.listing import LocalModel
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
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


@dataclass(frozen=True)
class Reading(Job):
    """Reads a model that changes meanwhile."""

    stage = "merge"
    version = 1
    uses_torch = False

    folder: Local[Path]
    changes_at: Local[str] = "never"
    """a piece, or `finish`"""

    def parts(self) -> list[str]:
        """See `Job`."""
        return ["a", "b"]

    def run(self, part: int | str, out: Path) -> bool:
        """See `Job`."""
        (out / str(part)).write_text(self._read(str(part)))
        return True

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        return {"read": self._read("finish") + "".join(path.read_text() for path in sorted(out.glob("?")))}

    def _read(self, at: str) -> str:
        if self.changes_at == at:
            config = self.folder / "config.json"
            config.write_text(config.read_text().replace("llama", "LLAMA"))
        return (self.folder / "config.json").read_text()


@pytest.fixture
def models(llamas: dict[str, Path], tmp_path: Path) -> PlannedModels:
    folder = shutil.copytree(llamas["math"], tmp_path / "math")
    listing = resolve(LocalModel(folder), tmp_path / "cache")
    for file in listing.unhashed():
        listing = listing.hashed(file.name, tmp_path / "cache")
    return PlannedModels((listing,), tmp_path / "cache")


@pytest.mark.parametrize("at", ["a", "b", "finish"])
def test_a_model_that_changes_while_it_is_read_is_not_published(at: str, models: PlannedModels, tmp_path: Path) -> None:
    folder, store = models.listings[0].folder, Store(tmp_path / "store")
    key = Key.of("ta", Reading(folder))
    before = (folder / "config.json").read_text()

    def work(changes_at: str) -> Done:
        job = prepared(Step("ta", key, (), Reading(folder, changes_at), models=models), store)
        for part in job.parts():
            run_part(job, part, store.partial(key), 1, models)
        return run_finish(job, store, key, Spent(), 1, models)

    for changes_at in (at, "never"):  # it is another one then, and stays so
        with pytest.raises(InputError, match=rf"{folder}: config\.json changed after it was planned; run again"):
            work(changes_at)
        assert store.manifest(key) is None
    # It is put back: what was read meanwhile lies there still, with the same fingerprint.
    (folder / "config.json").write_text(before)
    assert work("never").result == {"read": 3 * before}


def test_a_step_goes_on_from_pieces_of_the_same_files_only(models: PlannedModels, tmp_path: Path) -> None:
    folder, store = models.listings[0].folder, Store(tmp_path / "store")
    job = Reading(folder)
    step = Step("ta", Key.of("ta", job), (), job, models=models)
    done = store.partial(step.key) / "a"
    prepared(step, store)
    run_part(job, "a", store.partial(step.key), 1, models)
    prepared(step, store)
    assert done.exists()
    shutil.copyfile(folder / "config.json", folder / "copy")
    (folder / "copy").rename(folder / "config.json")
    prepared(step, store)
    assert not done.exists()
    run_part(job, "a", store.partial(step.key), 1, models)
    run_finish(job, store, step.key, Spent(), 1, models)
    assert [path.name for path in sorted(store.folder(step.key).iterdir())] == [
        "a",
        "fingerprint.json",
        "manifest.json",
    ]
