"""What a step reads comes to the machine that works on it, from the URL of the store."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.execute.reads import Reads, paths_in
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.bring import bring
from sensmerge.pipeline.store.remote import Remote
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.listing import UrlModel
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.identity import Local
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.tasks.stages.job import Job

ROWS: list[Row] = [{"prompt": "1+2=", "completion": "3"}]


@dataclass(frozen=True)
class Measuring(Job):
    """Names all that a step may read."""

    stage = "statistics"
    version = 1
    made: dict[str, Artifact]
    rows: StoredRows
    tokenizer: Local[Path]
    earlier: Local[tuple[Path | None, ...]]

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        raise AssertionError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(name)` gives the store as a machine of that name has it, at the same path on each."""
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "disk"))

    def change(name: str) -> Store:
        (tmp_path / "disk").unlink(missing_ok=True)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "disk").symlink_to(name)
        store = Store.open(f"file://{tmp_path}/shared")
        store.make()
        return store

    return change


def published(store: Store, name: str, **files: bytes) -> Path:
    key = Key("merge", name, {"name": name})
    store.partial(key).mkdir(parents=True)
    for file, content in files.items():
        (store.partial(key) / file).write_bytes(content)
    store.publish(key, {"result": {}})
    return store.folder(key)


def test_all_that_a_step_reads_comes_and_no_more(
    machine: Any, llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensmerge.pipeline.execute.reads.SMALL", 1000)
    store = machine("driver")
    needed = published(store, "needed", small=b"s", large=b"l" * 2000)
    before = published(store, "before", small=b"s", large=b"l" * 2000)
    published(store, "other", small=b"s")
    rows = StoredRows.of(ROWS, store.rows)
    rows.write(ROWS)
    store.upload_rows()
    listings = {name: resolve(UrlModel(llamas[name].as_uri()), store.hub_cache) for name in ("base", "math")}
    jobs = {name: DownloadJob(listing, store.hub_cache) for name, listing in listings.items()}
    plan = [Step(name, Key.of(name, job), (), job) for name, job in jobs.items()]
    plan.append(Step("needed", Key("merge", "needed", {"name": "needed"}), (), jobs["base"]))
    job = Measuring({"a": Artifact("a", needed)}, rows, listings["math"].folder, (before, None, needed / "large"))
    models = PlannedModels((listings["base"],), store.hub_cache)
    step = Step("math", Key.of("math", job), ("merge needed",), job, models=models)
    reads = Reads.of("run", step, job, store, plan)

    there = machine("worker")
    assert not needed.exists()
    reads.bring()
    assert (needed / "large").read_bytes() == b"l" * 2000
    assert there.local_manifest(plan[-1].key) is not None
    assert (before / "small").exists()
    assert not (before / "large").exists()
    assert [path.name[:6] for path in sorted(there.root.glob("merge/*"))] == ["before", "needed"]
    assert rows.read() == ROWS
    assert {file.name for file in listings["math"].missing()} == {"model.safetensors"}
    assert listings["base"].missing() == listings["base"].files  # it comes to each piece, see `PlannedModels.bring`


def test_what_a_run_has_is_not_asked_for_again(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(machine("driver"), "needed", small=b"s")
    store = machine("worker")
    bring(store, folder, "first")
    monkeypatch.setattr(Remote, "files", None)
    bring(store, folder, "first")
    monkeypatch.undo()
    shutil.rmtree(folder)
    bring(store, folder, "second")
    assert (folder / "small").read_bytes() == b"s"


def test_paths_in_a_job() -> None:
    job = Measuring({"a": Artifact("a", Path("a"))}, StoredRows("0", Path("b")), Path("c"), (None, Path("d")))
    assert list(paths_in(job)) == [Path("a"), Path("b"), Path("c"), Path("d")]
