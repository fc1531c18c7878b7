"""Artifacts that are damaged at the same size and time: found before a step reads them, and made again."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.plan.damage import with_damaged
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store import manifest
from tests.conftest import do_steps, plan_of


@pytest.fixture
def recipe(llama_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Files that are small by any measure are as large as others here."""
    monkeypatch.setattr(manifest, "SMALL", 0)
    llama_recipe["merges"] |= {
        "regmean": {"method": "regmean"},
        "ta-se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}},
        "other": {"method": "ties", "density": 0.5},
    }
    return llama_recipe


def flip(path: Path) -> None:
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def contents(plan: Plan) -> dict[str, bytes]:
    folders = [plan.artifact(step.stage, step.name) for step in plan.steps if step.stage != "evaluate"]
    return {str(one): one.read_bytes() for folder in folders for one in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("lost", "damaged", "file"),
    [
        (("evaluate", "ta/math"), ("merge", "ta"), "model.safetensors"),
        (("merge", "regmean"), ("statistics", "math"), "gram/*.safetensors"),
        (("merge", "other"), ("task_vectors", "code"), "histograms.safetensors"),
        (("merge", "ties-sens"), ("cross_task", "all"), "distances.json"),
        (("route", "ta-se"), ("merge", "ta-se"), "vectors/group-00000.safetensors"),
        (("evaluate", "ta-se"), ("route", "ta-se"), "base/model.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_is_read_is_read_through_first(
    lost: tuple[Stage, str], damaged: tuple[Stage, str], file: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    before = contents(plan)
    shutil.rmtree(plan.artifact(*lost))
    plan = plan_of(tmp_path, recipe)
    assert plan.todo.keys() == {" ".join(lost)}
    assert with_damaged(plan) == (plan, [])

    path = min(plan.artifact(*damaged).glob(file))
    flip(path)
    title, name = " ".join(damaged), path.relative_to(plan.artifact(*damaged))
    mended, (said, *_) = with_damaged(plan)
    what = f"{name}: other weights than were written" if damaged == ("merge", "ta") else f"{name} has other content"
    assert said == f"{title}: {what} in {plan.artifact(*damaged)}; it is made again"
    assert {title, " ".join(lost)} <= mended.todo.keys()
    do_steps(mended)
    assert contents(plan) == before
    assert plan_of(tmp_path, recipe).todo == {}


def test_what_nobody_reads_is_not_read_through(recipe: dict[str, Any], tmp_path: Path) -> None:
    do_steps(plan_of(tmp_path, recipe))
    plan = plan_of(tmp_path, recipe)
    flip(plan.artifact("merge", "ta") / "model.safetensors")
    assert with_damaged(plan) == (plan, [])
