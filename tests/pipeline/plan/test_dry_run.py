"""What plan refuses since a tiny network shows that it would fail, and that the way out which it names works."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages.evaluate import EvaluateJob
from tests.census.cases import make_case
from tests.census.sens import SENS
from tests.conftest import plan_of

STATIC = {"method": "task_arithmetic", "weight": 0.5}


def test_a_network_that_cannot_be_run_in_parts(tmp_path: Path) -> None:
    case = make_case("ZayaForCausalLM", tmp_path, lora=False)
    message = r"^placement: ZayaForCausalLM: it cannot be run in parts \(.*\); set placement: whole, or use other coeff"
    with pytest.raises(InputError, match=message):
        case.plan(case.recipe("full", SENS, placement="streamed"), "streamed")
    assert case.plan(case.recipe("full", SENS, placement="whole"), "whole").placements["statistics"].name == "whole"


def test_a_network_without_a_loss_on_text(tmp_path: Path) -> None:
    case = make_case("GitForCausalLM", tmp_path, lora=False)
    message = r"^merges\.merged\.coefficients: GitForCausalLM: it has no loss on text .*; use other coefficients than"
    with pytest.raises(InputError, match=message):
        case.plan(case.recipe("full", SENS), "sens")
    assert case.plan(case.recipe("full", STATIC), "static").steps


def test_nothing_is_tried_that_is_not_asked(
    llama_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr("sensmerge.pipeline.plan.dry_run.stand_in", lambda config, *_: tried.append(config.model_type))
    plan = plan_of(tmp_path, llama_recipe)
    assert tried == ["llama"]  # once for both experts
    assert [note for note in plan.inputs.notes if "no small network" in note]
    del llama_recipe["merges"]["ties-sens"]
    plan_of(tmp_path, llama_recipe)
    assert tried == ["llama"]
    llama_recipe["tasks"]["math"]["generate"] = 4
    plan_of(tmp_path, llama_recipe)
    assert tried == ["llama", "llama"]


@pytest.mark.parametrize(
    ("name", "inseparable"),
    [
        ("BertForSequenceClassification", set()),
        ("LongformerForSequenceClassification", {"first", "second"}),  # tells its trunk where to look at all tokens
        ("T5ForSequenceClassification", {"first", "second"}),  # reads the inputs of its trunk
    ],
)
def test_heads_that_cannot_be_run_apart_from_a_trunk(name: str, inseparable: set[str], tmp_path: Path) -> None:
    case = make_case(name, tmp_path, lora=False)
    recipe = case.recipe("full", STATIC) | {"tasks": case.tasks("evaluation")}
    plan = case.plan(recipe, "evaluation")
    assert plan.inseparable == inseparable
    step = plan.step("evaluate", "base/first")
    assert isinstance(step.job, EvaluateJob)
    assert (step.job.head_config is None) == bool(inseparable)
