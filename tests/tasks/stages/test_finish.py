"""A step that dies before any file operation of its last piece, and is begun again, makes the same files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from sensmerge.tasks.artifacts import is_partial
from sensmerge.tasks.stages.job import Job
from tests.conftest import cross_task_job, make_bert_expert, make_bert_trunk
from tests.faults.operations import Operations
from tests.tasks.stages.test_calibrate import Made
from tests.tasks.stages.test_calibrate import made as made
from tests.tasks.stages.test_cross_task import classes, completions
from tests.tasks.stages.test_merge import make_job
from tests.tasks.stages.test_merge_vectors import of_vectors
from tests.tasks.stages.test_task_vectors import make_job as task_vectors_job
from tests.tasks.stages.test_vectors import toward

Save = Callable[..., Path]
Llamas = dict[str, Path]


class Died(BaseException):
    """Stands for a SIGKILL, after which nothing more of the process touches a file."""


def die(name: str) -> NoReturn:
    raise Died(name)


def held(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not is_partial(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def do(job: Job, out: Path) -> dict[str, bytes]:
    for part in job.parts():
        job.run(part, out)
    job.finish(out)
    return held(out)


def assert_goes_on(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt `finish` before each of its file operations in turn."""
    pieces, out = folder / "pieces", folder / "out"
    pieces.mkdir()
    for part in job.parts():
        job.run(part, pieces)
    shutil.copytree(pieces, out)
    expected = do(job, out)
    for name in ("fsync", "pwrite"):
        monkeypatch.setattr(os, name, getattr(os, name))  # put back when the test ends
    operations = Operations(out, die)
    operations.watch()
    for number in range(1000):
        shutil.rmtree(out)
        shutil.copytree(pieces, out)
        operations.done.clear()
        operations.first = number
        try:
            job.finish(out)
        except Died:
            operations.first = None
            assert do(job, out) == expected, operations.done[number]
        else:
            operations.first = None
            assert number > 2, "some operations were seen"
            return
    raise AssertionError("it never ends")


def test_cross_task_of_language_models(llamas: Llamas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {name: llamas[name] for name in ("math", "code")}
    assert_goes_on(cross_task_job(llamas["base"], experts, completions(list(experts))), tmp_path, monkeypatch)


def test_cross_task_of_classifiers(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What their heads read is kept."""
    trunk, labels = make_bert_trunk(), {"mood": 2, "topic": 5}
    base = save(trunk, "base", tmp_path)
    experts = {n: save(make_bert_expert(trunk, seed, k), n, tmp_path) for seed, (n, k) in enumerate(labels.items(), 1)}
    job = cross_task_job(base, experts, classes(list(labels)))
    assert_goes_on(job, tmp_path, monkeypatch)


def test_task_vectors(llamas: Llamas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = make_job(tmp_path, llamas["base"], {"math": llamas["math"]})
    assert_goes_on(task_vectors_job(merge.experts["math"], "math", 16 * 2**10), tmp_path, monkeypatch)


def test_merge(llamas: Llamas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {name: llamas[name] for name in ("math", "code")}
    assert_goes_on(make_job(tmp_path, llamas["base"], experts), tmp_path, monkeypatch)


def test_merges_of_dynamic_models(llamas: Llamas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, llamas["base"], {name: llamas[name] for name in ("math", "code")})
    do(job, tmp_path / "static")
    for name, one in (("base", of_vectors(job)), ("static-merge", toward(tmp_path / "static", job))):
        (tmp_path / name).mkdir()
        assert_goes_on(one, tmp_path / name, monkeypatch)


def test_calibrate(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    (made.folder / "trial").mkdir()
    assert_goes_on(made.job, made.folder / "trial", monkeypatch)
