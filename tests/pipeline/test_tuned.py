"""A tuned variant from the recipe to MLflow, on a real Ray cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import command_line, write_recipe
from tests.here import run_here
from tests.tasks.stages import test_tune as tuned

twins = tuned.twins


def test_a_variant_is_tuned_merged_scored_and_recorded_with_what_was_chosen(
    twins: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tuned.twin_recipe(tmp_path, twins, weight=1.0, tune={"weight": [0.25, 0.5, 0.75]})
    recipe["merges"]["plain"] = {"method": "task_arithmetic", "weight": 0.25}
    store, path = tmp_path / "store", write_recipe(tmp_path, recipe)
    options: list[Any] = ["--store", store, "--report", tmp_path / "report.json"]
    assert run_here(path, *options) == 0
    said = capsys.readouterr().out
    assert "tasks.mood.calibration: variants are tuned on its 40 rows" in said
    assert "tuned: weight 0.5 is the best of 4 candidates, better than the recipe's weight 1 by " in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["variants"]["tuned"]["params"]["weight"] == "0.5"
    assert report["variants"]["plain"]["tuning"] is None
    assert report["mean_normalised"]["tuned"]["value"] == 1.0
    card = (Path(report["models"]["tuned"]) / "README.md").read_text()
    assert "- weight: 0.5\n" in card
    assert "| 0.5 | 1.000 [1.000, 1.000], n = 80 |" in card

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run = runs["tuned"]
    assert (run.data.params["weight"], run.data.params["tune.weight"]) == ("0.5", "[0.25, 0.5, 0.75]")
    assert run.data.metrics["tune/mean_normalised"] == 1.0
    only = run.data.metrics.keys() - runs["plain"].data.metrics.keys()
    of_the_best = {f"{kind}held_out" for kind in ("eval/", "low/", "high/", "n/")}
    assert only - of_the_best == {f"{kind}tune/mean_normalised" for kind in ("", "low/", "high/", "n/")}
    pictures = {
        name: {file.path for file in client.list_artifacts(runs[name].info.run_id)} for name in ("tuned", "plain")
    }
    assert "tuning.png" in pictures["tuned"] - pictures["plain"]
    assert {one.dataset.name for one in run.inputs.dataset_inputs} >= {"mood/tuning", "topic/tuning"}

    # Nothing is tuned again; a weight that is written there in its stead gives the same merge.
    assert command_line("verify", "--store", store) == 0
    assert run_here(path, *options, "--set", "merges.plain.weight=0.5") == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert {step["status"] for step in again["stages"] if step["stage"] == "tune"} == {"cached"}
    assert again["variants"]["plain"]["digest"] == again["variants"]["tuned"]["digest"]
