"""What a refresh does again after a change, on a real Ray cluster."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from tests.conftest import command_line, make_llama, perturbed, write_recipe, write_rows
from tests.here import run_here

pytestmark = pytest.mark.ray

EXPERTS = ("math", "code", "talk", "news")
VARIANTS = ("ta", "ties-sens", "regmean")


@pytest.fixture
def team(save: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe with four experts, in a folder of its own."""
    folders = {"base": save(make_llama(), "base", tmp_path)}
    folders |= {name: save(perturbed(make_llama(), seed), name, tmp_path) for seed, name in enumerate(EXPERTS, 1)}
    tasks = {}
    for number, name in enumerate(EXPERTS):
        write_rows(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": str(i + number)} for i in range(6)]
        )
        first, last = (
            {"path": "json", "data_files": f"{name}.jsonl", "split": f"train[{half}]"} for half in (":3", "3:")
        )
        tasks[name] = {"kind": "completion", "calibration": first} | ({"evaluation": last} if name == "math" else {})
    return write_recipe(
        tmp_path,
        {
            "name": "team",
            "base": "base",
            "experts": {name: {"model": name} for name in EXPERTS},
            "tasks": tasks,
            "merges": {
                "ta": {"method": "task_arithmetic", "weight": 0.3},
                "ties-sens": {"method": "ties", "density": 0.3, "coefficients": {"kind": "sens"}},
                "regmean": {"method": "regmean"},
            },
            "gate": {"metric": "math/perplexity"},  # these experts have no skill that others could be measured by
        },
    )


def work(command: str, recipe: Path, store: Path, address: str) -> dict[str, Any]:
    report = store.with_suffix(".json")
    assert command_line(command, recipe, "--store", store, "--address", address, "--report", report) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def change(folder: Path, layers: tuple[str, ...]) -> list[str]:
    """Change the weights of some layers of a saved model; return their names."""
    tensors = load_file(folder / "model.safetensors")
    changed = [name for name in tensors if name.startswith(layers)]
    for name in changed:
        tensors[name] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return changed


def weights(report: dict[str, Any]) -> dict[str, str]:
    folders = {name: Path(report["models"][name]) for name in VARIANTS}
    return {
        name: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for name, folder in folders.items()
    }


def test_one_changed_expert(team: Path, ray_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = team.parent / "store"
    first = work("refresh", team, store, ray_address)
    for half, samples in (("first_half", 1), ("second_half", 2)):  # what chooses the best variant, and what shows it
        assert {name: score["n"] for name, score in first[half].items()} == dict.fromkeys(VARIANTS, samples)
    capsys.readouterr()

    # Nothing changed: no step and no run, and Ray is not asked.
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("team").experiment_id
    runs = len(client.search_runs([experiment]))
    idle = work("refresh", team, store, "no such cluster")
    assert "team: nothing changed" in capsys.readouterr().out
    assert {stage["status"] for stage in idle["stages"]} == {"cached"}
    assert idle["scores"] == first["scores"]
    assert len(client.search_runs([experiment])) == runs

    changed = change(team.parent / "code", ("model.layers.1.", "model.norm."))
    assert command_line("plan", team, "--store", store) == 0
    assert "code: 1 of 5 files changed; 10 of 21 steps" in capsys.readouterr().out
    report = work("refresh", team, store, ray_address)
    said = capsys.readouterr().out
    steps = {f"{stage['stage']} {stage['name']}": stage for stage in report["stages"]}
    ran = {title for title, stage in steps.items() if stage["status"] == "run"}
    assert ran == {
        *("download code", "statistics code", "cross_task all"),
        *(f"merge {name}" for name in VARIANTS),
        *(f"evaluate {model}/math" for model in ("code", *VARIANTS)),
    }
    tensors = len(load_file(Path(report["models"]["ta"]) / "model.safetensors"))
    assert steps["merge ta"]["taken_over"] == tensors - len(changed) > 0
    assert steps["merge ties-sens"]["taken_over"] == 0  # another σ in every layer
    assert steps["merge regmean"]["taken_over"] == 0  # other Gram matrices
    assert f"{tensors - len(changed)} of {tensors} tensors taken over (" in said
    assert f"{2 * tensors + len(changed)} of {3 * tensors} tensors merged (" in said
    assert len(client.search_runs([experiment])) == 2 * runs

    distances = json.loads((Path(steps["cross_task all"]["artifact"]) / "manifest.json").read_text())["result"]
    assert distances["measured"] == 2 * (len(EXPERTS) - 1)
    # Without Ray: one process, with nothing to take over, makes the same.
    assert run_here(team, "--store", team.parent / "anew", "--report", team.parent / "anew.json") == 0
    anew = json.loads((team.parent / "anew.json").read_text())
    assert weights(report) == weights(anew)
    assert report["distances"] == anew["distances"]
    assert weights(report)["ta"] != weights(first)["ta"]

    # What was there before is still in the store.
    shutil.rmtree(team.parent / "anew")
    change(team.parent / "code", ())
    assert {stage["status"] for stage in work("refresh", team, store, "no such cluster")["stages"]} == {"cached"}
