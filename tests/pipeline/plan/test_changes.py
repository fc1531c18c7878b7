"""What is said of models that changed since they were last used."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.execute.worker import Spent, run_finish
from sensmerge.pipeline.plan.changes import dependents, model_changes
from sensmerge.pipeline.plan.plan import Plan
from tests.conftest import plan_of
from tests.hub_server import HubServer


def download(plan: Plan) -> None:
    """Run the download steps, as workers do."""
    for step in plan.steps:
        if step.stage == "download":
            run_finish(step.job, plan.store, step.key, Spent(), 1)


def test_a_branch_that_moved(
    llama_recipe: dict[str, Any], llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_recipe["experts"]["math"]["model"] = "hub:team/math"
    files = {path.name: path.read_bytes() for path in llamas["math"].iterdir()}
    other = (llamas["code"] / "model.safetensors").read_bytes()
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        before = hub.add_repo("team/math", files)
        plan = plan_of(tmp_path, llama_recipe)
        assert model_changes(plan) == []  # what is new has not changed
        download(plan)
        assert model_changes(plan) == []  # and what is to be fetched again neither
        assert model_changes(plan_of(tmp_path, llama_recipe)) == []
        now = hub.add_repo("team/math", files | {"model.safetensors": other[:-4] + b"\0\0\0\0"})
        plan = plan_of(tmp_path, llama_recipe)
    (line,) = model_changes(plan)
    count = len(dependents(plan, plan.step("download", "math")))
    assert line.startswith(
        f"math: main moved {before[:7]} → {now[:7]}; {count} of {len(plan.steps)} steps depend on it, and read "
    )


def test_a_folder_whose_files_changed(llama_recipe: dict[str, Any], tmp_path: Path, llamas: dict[str, Path]) -> None:
    folder = tmp_path / "math"
    folder.mkdir()
    for path in llamas["math"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    llama_recipe["experts"]["math"]["model"] = "math"
    download(plan_of(tmp_path, llama_recipe))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    (line,) = model_changes(plan_of(tmp_path, llama_recipe))
    assert line.startswith("math: 1 of ")
    assert "files changed; " in line
