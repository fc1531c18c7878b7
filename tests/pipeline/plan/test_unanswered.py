"""Calibration rows that do not say what is right, for variants that take no losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.errors import InputError
from tests.conftest import bert_config, do_steps, make_bert_trunk, perturbed, plan_of, write_rows

Save = Callable[..., Path]
Recipe = dict[str, Any]
LABELLED = [{"text": f"{i} {i % 7} {i % 3}", "label": i % 3} for i in range(24)]
OPEN = [{"text": row["text"]} for row in LABELLED]


@pytest.fixture
def recipe(save: Save, tmp_path: Path) -> Recipe:
    """Variants made of calibration rows, of two classifiers; nothing is scored."""
    experts, tasks = {}, {}
    for seed, name in enumerate(("mood", "topic")):
        torch.manual_seed(seed)
        network = BertForSequenceClassification(bert_config(3))
        network.bert.load_state_dict(perturbed(make_bert_trunk(), seed + 1, 0.05).state_dict())
        experts[name] = {"model": str(save(network, name))}
        calibration = {"path": "json", "data_files": f"{name}.jsonl"}
        tasks[name] = {"kind": "classification", "calibration": calibration}
    write_rows(tmp_path / "topic.jsonl", LABELLED)
    return {
        "name": "open",
        "base": str(save(make_bert_trunk(), "base")),
        "experts": experts,
        "tasks": tasks,
        "merges": {
            "regmean": {"method": "regmean"},
            "fitted": {"method": "task_arithmetic", "calibrate": {}},
            "se": {"method": "regmean", "application": {"kind": "se"}},
        },
    }


def test_what_is_made_is_what_labels_give(recipe: Recipe, tmp_path: Path) -> None:
    made = []
    for rows in (LABELLED, OPEN):
        write_rows(tmp_path / "mood.jsonl", rows)
        plan = plan_of(tmp_path, recipe)
        do_steps(plan)
        regmean, fitted = plan.artifact("merge", "regmean"), plan.artifact("calibrate", "fitted")
        weights = [load_file(folder / "model.safetensors") for folder in (regmean, fitted)]
        made.append((weights, read_json(plan.artifact("route", "se") / "route.json")))
    said = "tasks.mood.calibration: its rows have no label; no variant needs one there"
    assert [note for note in plan.inputs.notes if "label" in note] == [said]
    for labelled, unlabelled in zip(made[0][0], made[1][0], strict=True):
        assert all(torch.equal(tensor, unlabelled[name]) for name, tensor in labelled.items())
    assert made[0][1] == made[1][1]


def test_variants_may_be_tuned_on_them_by_the_answers_of_the_experts(recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "mood.jsonl", OPEN)
    for merge in ({"method": "task_arithmetic", "weight": "auto"}, {"method": "regmean", "weight": "auto"}):
        plan = plan_of(tmp_path, {**recipe, "merges": {"tuned": merge}})
        answered = "tasks.mood.calibration: its rows have no label, so what experts.mood answers counts as right"
        assert answered in plan.inputs.notes
        assert plan.inputs.data["mood"].unanswered
        assert not plan.inputs.data["topic"].unanswered


def test_no_row_is_scored_that_calibrates_whatever_its_label(recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "mood.jsonl", OPEN)
    write_rows(tmp_path / "test.jsonl", [*LABELLED[:4], {"text": "new", "label": 1}])
    recipe["tasks"]["mood"]["evaluation"] = {"path": "json", "data_files": "test.jsonl"}
    assert [row["text"] for row in plan_of(tmp_path, recipe).inputs.data["mood"].evaluation] == ["new"]


@pytest.mark.parametrize(
    ("merge", "needs"),
    [
        ({"method": "fisher"}, r"merges\.x \(statistic fisher\)"),
        ({"method": "task_arithmetic", "coefficients": {"kind": "sens"}}, r"merges\.x \(statistic sensitivity\)"),
    ],
)
def test_losses_need_them(merge: Recipe, needs: str, recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "mood.jsonl", OPEN)
    recipe["merges"]["x"] = merge
    expected = rf"tasks\.mood\.calibration: line 1 of .* has no label, and {needs} needs the loss on it; add it"
    with pytest.raises(InputError, match=expected):
        plan_of(tmp_path, recipe)


def test_rows_of_which_some_have_none(recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "mood.jsonl", [LABELLED[0], OPEN[1]])
    with pytest.raises(InputError, match=r"tasks\.mood\.calibration: line 2 of .* has no label, line 1 of .* has one"):
        plan_of(tmp_path, recipe)


def test_choices_are_read_with_their_answer(llama_recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "math.jsonl", [{"prompt": "1+1=", "choices": ["2", "3"]}])
    llama_recipe["tasks"]["math"] = {
        "kind": "multiple_choice",
        "calibration": {"path": "json", "data_files": "math.jsonl"},
    }
    llama_recipe["merges"] = {"x": {"method": "regmean"}}
    with pytest.raises(InputError, match=r"tasks\.math\.answer names field 'answer'"):
        plan_of(tmp_path, llama_recipe)
