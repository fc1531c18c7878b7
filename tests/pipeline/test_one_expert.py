"""A recipe with a base and one expert, from the command line to report and MLflow, on a real Ray cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from tests.conftest import command_line, write_recipe
from tests.here import run_here


def test_one_expert_is_interpolated_scored_and_recorded(
    llamas: dict[str, Path],
    llama_recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = llama_recipe | {
        "merges": {
            "arc": {"method": "slerp", "t": 0.5},
            "near": {"method": "nearswap", "t": 0.01},
            "fused": {"method": "arcee_fusion"},
            "same": {"method": "passthrough"},
            "half": {"method": "task_arithmetic", "weight": 0.5},
            "trimmed": {"method": "ties", "density": 0.4, "lambda": 0.5},
            "tuned": {"method": "slerp", "t": 0.5, "tune": {"t": [0.25, 1.0]}},
        }
    }
    for key in ("experts", "tasks"):
        del recipe[key]["code"]
    recipe["tasks"]["math"]["calibration"]["samples"] = 12  # of which the tiny network answers some
    store, path = tmp_path / "store", write_recipe(tmp_path, recipe)
    options: list[Any] = ["--store", store, "--report", tmp_path / "report.json"]
    assert command_line("plan", path, "--store", store) == 0
    assert run_here(path, *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["variants"]["arc"]["params"]["t"] == "0.5"
    digests = {name: one["digest"] for name, one in report["variants"].items()}
    assert len({digests[name] for name in ("arc", "near", "fused", "same", "half", "trimmed")}) == 6
    assert report["scores"]["same"]["math"] == report["scores"]["math"]["math"]

    (half,) = (store / "merge").glob("half-*/model.safetensors")
    base, expert = (load_file(folder / "model.safetensors") for folder in (llamas["base"], llamas["math"]))
    for tensor, merged in load_file(half).items():
        torch.testing.assert_close(merged, (base[tensor] + expert[tensor]) / 2)

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert (runs["arc"].data.params["method"], runs["arc"].data.params["t"]) == ("slerp", "0.5")
    capsys.readouterr()
    assert run_here(path, *options) == 0


def test_what_needs_more_experts_is_refused_before_any_work(
    llama_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("experts", "tasks"):
        del llama_recipe[key]["code"]
    llama_recipe["merges"]["tsv"] = {"method": "tsv_m"}
    path = write_recipe(tmp_path, llama_recipe)
    assert command_line("plan", path, "--store", tmp_path / "store") == 2
    said = capsys.readouterr().err
    assert "experts: found 1; expected at least two experts to merge by method tsv_m (merges.tsv)" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()
