"""Calibrated variants from a recipe to what is registered."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.tracking.load import Merged
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks import walk as walk_module
from sensmerge.tasks.stages.calibrate import CalibrateJob
from sensmerge.tasks.stages.route import RouteJob
from tests.conftest import command_line, do_steps, plan_of, write_recipe
from tests.pipeline.plan.test_plan import fingerprints

Recipe = dict[str, Any]


@pytest.fixture
def recipe(llama_recipe: Recipe) -> Recipe:
    """A static variant, and the same calibrated; it may become champion."""
    ta = llama_recipe["merges"]["ta"]
    return {
        **llama_recipe,
        "merges": {"ta": ta, "fitted": {**ta, "calibrate": {}}},
        "gate": {"metric": "math/perplexity", "variants": ["fitted"]},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate": True}, r"merges\.x\.calibrate: found true; expected \{\} for the defaults"),
        ({"calibrate": None}, r"merges\.x\.calibrate: found null; expected \{\} for the defaults"),
        ({"calibrate": {"ridge": 0}}, r"merges\.x\.calibrate\.ridge: .*greater than or equal"),
        ({"calibrate": {"alpha": 1.5}}, r"merges\.x\.calibrate\.alpha: .*less than or equal to 1"),
        ({"calibrate": {"lambda": 1}}, r"merges\.x\.calibrate\.lambda"),
        (
            {"calibrate": {}, "application": {"kind": "se", "origin": "base"}},
            r"merges\.x: calibrate changes the static merge, so application se needs origin: static",
        ),
    ],
)
def test_what_the_schema_refuses(changes: Recipe, message: str, recipe: Recipe, tmp_path: Path) -> None:
    recipe["merges"]["x"] = {"method": "task_arithmetic", **changes}
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(write_recipe(tmp_path, recipe))
    assert "\n" not in str(caught.value)


def test_every_expert_needs_a_calibration_set(recipe: Recipe, tmp_path: Path) -> None:
    del recipe["tasks"]["code"]["calibration"]
    with pytest.raises(InputError, match=r"merges\.fitted: calibrate needs tasks\.code\.calibration; add it"):
        load_recipe(write_recipe(tmp_path, recipe))


def test_the_calibrated_model_is_the_variant(recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, recipe)
    assert [title for title in plan.makers if "fitted" in title] == [
        *("merge fitted", "calibrate fitted", "evaluate fitted/math", "evaluate fitted/code")
    ]
    assert plan.step("calibrate", "fitted").needs == (*("merge ta", "download base", "download math", "download code"),)
    assert plan.step("evaluate", "fitted/math").needs[0] == "calibrate fitted"
    assert plan.models()["fitted"] == plan.artifact("calibrate", "fitted")
    # The merge is that of the variant that is not calibrated.
    assert plan.makers["merge fitted"] == "merge ta"


def test_samples_can_be_answered_from_the_calibrated_model(recipe: Recipe, tmp_path: Path) -> None:
    recipe["merges"]["fitted-se"] = {**recipe["merges"]["fitted"], "application": {"kind": "se"}}
    plan = plan_of(tmp_path, recipe)
    made = {title: maker for title, maker in plan.makers.items() if "fitted-se" in title}
    assert made == {
        "merge fitted-se": "merge ta",
        "calibrate fitted-se": "calibrate fitted",
        **{title: title for title in ("vectors fitted-se", "route fitted-se", "evaluate fitted-se")},
    }
    downloads = ("download base", "download math", "download code")
    assert plan.step("vectors", "fitted-se").needs == ("calibrate fitted", *downloads)
    assert plan.step("route", "fitted-se").needs == ("vectors fitted-se",)
    route = plan.step("route", "fitted-se").job
    assert isinstance(route, RouteJob)
    assert (route.origin, route.static) == ("static", 0.0)
    # Which weights it is answered from does not depend on how samples are routed.
    other = plan_of(tmp_path, recipe, "merges.fitted-se.application.temperature=0.5")
    assert other.step("vectors", "fitted-se").key == plan.step("vectors", "fitted-se").key
    assert other.step("route", "fitted-se").key != plan.step("route", "fitted-se").key


CALIBRATED = {"calibrate fitted", "evaluate fitted/math", "evaluate fitted/code"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("merges.fitted.calibrate.ridge=0.1", CALIBRATED),
        ("merges.fitted.calibrate.alpha=0.5", CALIBRATED),
        ("merges.fitted.weight=0.4", {"merge fitted"} | CALIBRATED),
        ("merges.fitted.out_dtype=bfloat16", {"merge fitted"} | CALIBRATED),
        ("tasks.code.calibration.samples=2", CALIBRATED),
        ("resources.calibrate.num_cpus=2", set()),
    ],
)
def test_what_a_change_touches(override: str, expected: set[str], recipe: Recipe, tmp_path: Path) -> None:
    before, after = (fingerprints(plan_of(tmp_path, recipe, *more)) for more in ((), (override,)))
    assert before.keys() == after.keys()
    assert {title for title in after if before[title] != after[title]} == expected


def test_gpus_and_steps(recipe: Recipe, tmp_path: Path) -> None:
    def job(plan: Plan) -> CalibrateJob:
        found = plan.step("calibrate", "fitted").job
        assert isinstance(found, CalibrateJob)
        return found

    plan = plan_of(tmp_path, recipe)
    assert job(plan).device == "cpu"
    assert list(job(plan).experts) == list(job(plan).calibration) == ["math", "code"]
    merge = plan.step("merge", "fitted")
    assert merge.writes < plan.step("calibrate", "fitted").writes < 1.5 * merge.writes
    plan = plan_of(tmp_path, recipe, "resources.calibrate.num_gpus=1")
    assert job(plan).device == "cuda"


def test_a_network_that_cannot_be_calibrated(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise InputError("folder: Llama does more than hand on hidden states; set placement: whole")

    monkeypatch.setattr(walk_module, "blocks_of", refuse)
    with pytest.raises(InputError, match=r"merges\.fitted\.calibrate: .*\(.*hidden states\); leave it out$"):
        plan_of(tmp_path, recipe)


@pytest.mark.ray
def test_run_registers_the_calibrated_model(
    recipe: Recipe, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["resources"] = {"calibrate": {"num_cpus": 2}}
    recipe["merges"]["fitted-se"] = {**recipe["merges"]["fitted"], "application": {"kind": "se"}}
    path, store, report = write_recipe(tmp_path, recipe), tmp_path / "store", tmp_path / "report.json"
    arguments = (path, "--store", store, "--address", ray_address, "--report", report)
    assert command_line("refresh", *arguments) == 0
    found = Report.model_validate_json(report.read_text())
    (step,) = (stage for stage in found.stages if (stage.stage, stage.name) == ("calibrate", "fitted"))
    assert (step.pieces, step.pieces_run) == (2, 2)
    folder = Path(found.models["fitted"])
    assert folder.parent == store / "calibrate"
    assert found.uris["fitted"] == folder.as_uri()
    assert found.variants["fitted"].digest == read_json(folder / "manifest.json")["result"]["digest"]
    assert found.variants["fitted"].digest != found.variants["ta"].digest
    assert (found.variants["fitted"].is_calibrated, found.variants["ta"].is_calibrated) == (True, False)
    assert found.scores["fitted"]["math"]["perplexity"] != found.scores["ta"]["math"]["perplexity"]
    assert Merged.of(found, "fitted").folder == folder
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), LlamaForCausalLM)
    dynamic = Path(found.models["fitted-se"])
    assert DynamicModel.load(dynamic).router.settings.origin == "static"
    origin, static = (load_file(one / "model.safetensors") for one in (dynamic / "base", folder))
    assert all(torch.equal(origin[name], static[name]) for name in static)
    card = (folder / "README.md").read_text()
    assert "calibrate.alpha: 0.25" in card
    assert not (Path(str(folder).replace("calibrate/", "merge/")) / "README.md").exists()
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    assert client.get_model_version_by_alias("tiny", "champion").tags["folder"] == folder.as_uri()
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "attributes.run_name = 'fitted'")
    assert {one.dataset.name for one in run.inputs.dataset_inputs} > set()
    assert {tag.value for one in run.inputs.dataset_inputs for tag in one.tags} == {"calibration", "evaluation"}
    capsys.readouterr()
    assert command_line("verify", "--store", store) == 0
    assert command_line("gc", "--store", store) == 0
    assert "calibrate/" not in capsys.readouterr().out
    # One worker and no Ray: the same bits.
    alone = plan_of(tmp_path, recipe, store="alone")
    do_steps(alone)
    first, second = (load_file(one / "model.safetensors") for one in (folder, alone.artifact("calibrate", "fitted")))
    assert all(torch.equal(first[name], second[name]) for name in first)
