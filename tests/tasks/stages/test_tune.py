"""What stage tune chooses, against merges that are written and scored, and where the right choice is known."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertForSequenceClassification

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.checkpoint import WEIGHTS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.scores import Record, Score
from sensmerge.tasks.methods.settings import Values
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import load_network, open_expert
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.stages.candidates import Candidates
from sensmerge.tasks.stages.evaluate import evaluate_network
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.tune import TuneJob, best_of, choose, difference, scored
from tests.conftest import (
    bert_config,
    do_job,
    do_steps,
    make_bert_trunk,
    perturbed,
    plan_of,
    write_rows,
)

Recipe = dict[str, Any]
METRIC = ClassificationTask.metrics["accuracy"]


def texts(count: int, first: int = 0) -> list[str]:
    return [f"{i} {'abcdefghij'[i % 10] * (1 + i % 7)} {i * i}" for i in range(first, first + count)]


def classify(folder: Path, experts: Mapping[str, Path], base: Path, **merge: Any) -> Recipe:
    """A recipe of classifiers whose rows have the classes that their own experts see in them, so that these are right.

    `tuned` is its only variant.
    """
    tasks = {}
    opened = open_base(base)
    for number, (name, model) in enumerate(experts.items()):
        expert = open_expert(model, opened, name)
        network = load_network(expert, "classification", torch.float32, "cpu", expert)
        task = ClassificationTask(kind="classification")
        unlabelled = [{"text": text, "label": 0} for text in texts(60, 60 * number)]
        found = evaluate_network(network, load_tokenizer(base), task, unlabelled, name)
        rows = [row | {"label": one["prediction"]} for row, one in zip(unlabelled, found, strict=True)]
        write_rows(folder / f"{name}.jsonl", rows)
        source = {"path": "json", "data_files": f"{name}.jsonl"}
        tasks[name] = {
            "kind": "classification",
            "calibration": source | {"samples": 40},
            "evaluation": source | {"samples": 20},
        }
    return {
        "name": "tiny",
        "base": str(base),
        "experts": {name: {"model": str(folder)} for name, folder in experts.items()},
        "tasks": tasks,
        "merges": {"tuned": {"method": "task_arithmetic", **merge}},
    }


@pytest.fixture(scope="session")
def twins(save: Callable[..., Path]) -> dict[str, Path]:
    """A trunk and two classifiers with the same task vector, and heads of their own: at weight 1/2 they are the merge.

    The task vector is large, so that any other weight is seen in the answers.
    """
    trunk = make_bert_trunk()
    folders = {"base": save(trunk, "base")}
    moved = perturbed(make_bert_trunk(), 3, 0.3)
    for seed, name in enumerate(("mood", "topic")):
        torch.manual_seed(seed)
        network = BertForSequenceClassification(bert_config(3))
        network.bert.load_state_dict(moved.state_dict())
        torch.nn.init.normal_(network.classifier.weight, std=0.5)
        folders[name] = save(network, name)
    return folders


def twin_recipe(folder: Path, twins: Mapping[str, Path], **merge: Any) -> Recipe:
    return classify(folder, {name: twins[name] for name in ("mood", "topic")}, twins["base"], **merge)


def tuned(plan: Plan) -> dict[str, Any]:
    do_steps(plan)
    found: dict[str, Any] = read_json(plan.artifact("tune", "tuned") / "tune.json")
    return found


def test_the_right_weight_is_found(twins: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, twin_recipe(tmp_path, twins, tune={"weight": [0.1, 0.25, 0.5, 0.75]}))
    found = tuned(plan)
    assert found["chosen"] == found["best"] == {"weight": 0.5}
    assert found["default"] is None
    means = {one["values"]["weight"]: one["mean"] for one in found["tried"]}
    assert list(means) == [0.1, 0.25, 0.5, 0.75]
    assert (means[0.5]["value"], means[0.5]["n"]) == (1.0, 80)
    assert all(mean["value"] < 0.95 for weight, mean in means.items() if weight != 0.5)
    for one in found["tried"]:
        assert one["behind"]["value"] == pytest.approx(1 - one["mean"]["value"])
        assert (one["behind"]["low"] > 0) is (one["values"] != {"weight": 0.5})
    assert found["notes"] == []
    # What is merged, scored and reported has the weight that was chosen.
    table = read_json(plan.artifact("merge", "tuned") / "coefficients.json")
    assert {weight for row in table["weights"].values() for weight in row.values()} == {0.5}


def test_a_grid_whose_end_is_best_is_widened_once(twins: dict[str, Path], tmp_path: Path) -> None:
    recipe = twin_recipe(tmp_path, twins, weight=0.1, tune={"weight": [0.15, 0.2, 0.3]})
    found = tuned(plan_of(tmp_path, recipe))
    assert [one["values"]["weight"] for one in found["tried"]] == [0.1, 0.15, 0.2, 0.3, 0.45, 0.675]
    assert found["chosen"] == {"weight": 0.45}
    assert found["notes"] == ["weight 0.3 was the best and at the end of the grid, so 0.45 and 0.675 came into it too"]


def test_what_is_still_at_the_end_is_said(twins: dict[str, Path], tmp_path: Path) -> None:
    recipe = twin_recipe(tmp_path, twins, tune={"weight": [0.28, 0.3]})
    found = tuned(plan_of(tmp_path, recipe))
    assert [one["values"]["weight"] for one in found["tried"]] == [0.28, 0.3, 0.321, 0.344]
    assert found["notes"][1:] == [
        "weight 0.344 is the best and still at the end of the grid; add candidates beyond it: 0.369, 0.395"
    ]


def test_what_the_recipe_says_stays_where_nothing_is_clearly_better(twins: dict[str, Path], tmp_path: Path) -> None:
    recipe = twin_recipe(tmp_path, twins, weight=0.5, tune={"weight": [0.45, 0.55]})
    found = tuned(plan_of(tmp_path, recipe))
    assert found["chosen"] == found["default"] == {"weight": 0.5}


def answers(right: int) -> dict[str, list[Record]]:
    return {"math": [{"label": 1, "prediction": int(number < right)} for number in range(40)]}


@pytest.mark.parametrize(
    ("right", "default", "chosen"),
    [(22, {"weight": 1.0}, 1.0), (36, {"weight": 1.0}, 0.3), (22, None, 0.3)],
)
def test_better_by_chance_is_not_better(right: int, default: Values | None, chosen: float) -> None:
    own, metrics = answers(40), {"math": METRIC}
    candidates: list[Values] = [{"weight": 0.3}, {"weight": 1.0}]
    tried = scored([answers(right), answers(20)], candidates, metrics, own)
    behind = [difference(best_of(tried), one, metrics, own) for one in tried]
    assert behind[1].value == pytest.approx((right - 20) / 40)
    assert choose(tried, best_of(tried), default, metrics, own).values == {"weight": chosen}
    # The same holds for one from beyond the grid, of which the other is then the best.
    assert choose(tried, tried[1], None, metrics, own).values == {"weight": 0.3 if right == 36 else 1.0}


def test_an_expert_that_gets_nothing_right(twins: dict[str, Path], tmp_path: Path) -> None:
    recipe = twin_recipe(tmp_path, twins, tune={"weight": [0.5]})
    wrong = [{"text": text, "label": "LABEL_0"} for text in texts(60, 60)]
    write_rows(tmp_path / "topic.jsonl", wrong)
    recipe["tasks"]["topic"]["metric"] = "matthews"
    with pytest.raises(InputError, match=r"tasks\.topic: its own expert has matthews .* on the 40 rows to tune on"):
        tuned(plan_of(tmp_path, recipe))


# Candidates against merges that are written ---------------------------------------------------------------------------


def records_of_merge(plan: Plan, values: Values, out: Path) -> dict[str, list[Record]]:
    """What a written merge with other settings answers, loaded and scored as stage evaluate does."""
    tune, merge = plan.step("tune", "tuned").job, plan.step("merge", "tuned").job
    assert isinstance(tune, TuneJob)
    assert isinstance(merge, MergeJob)
    do_job(replace(merge.having(merge.settings.having(values)), shard_size=10**9), out)
    found = {}
    for name, one in tune.tuning.items():
        expert = plan.inputs.experts[name] if plan.inputs.experts[name].head else None
        network = load_network(open_base(out), one.task.head, torch.float32, "cpu", expert)
        if one.label2id is not None:
            network.config.label2id = dict(one.label2id)
        found[name] = evaluate_network(network, load_tokenizer(out), one.task, one.rows.read(), name)
    return found


def assert_as_merged(plan: Plan, candidates: list[Values], folder: Path, merges: int) -> None:
    job = plan.step("tune", "tuned").job
    assert isinstance(job, TuneJob)
    (folder / "heads-of-all").mkdir()
    job.write_heads(folder / "heads-of-all")
    trial = Candidates(job, job.tuning, "float32", "cpu", folder / "heads-of-all")
    assert len(list(trial._merges(candidates))) == merges
    for number, (values, found) in enumerate(zip(candidates, trial.records(candidates), strict=True)):
        expected = records_of_merge(plan, values, folder / f"merge-{number}")
        assert found.keys() == expected.keys() == plan.recipe.experts.keys()
        for name, records in found.items():
            assert records == [pytest.approx(one, rel=1e-4, abs=1e-5) for one in expected[name]]


def needed(plan: Plan) -> Plan:
    """The plan, with all done that its variant reads."""
    do_steps(replace(plan, steps=tuple(step for step in plan.steps if step.title in plan.step("tune", "tuned").needs)))
    return plan


@pytest.mark.parametrize(
    ("settings", "candidates", "merges"),
    [
        ({"method": "task_arithmetic"}, [{"weight": 0.3}, {"weight": 0.9}, {"weight": 0.0}], 1),
        ({"method": "linear", "normalize": False}, [{"weight": 0.3}, {"weight": 0.5}], 2),
        ({"method": "ties", "density": 0.3}, [{"density": 0.2}, {"density": 0.9}, {"lambda": 0.5}], 3),
        (
            {"method": "dare_ties", "density": 0.3, "seed": 3},
            [{"weight": w, "density": d} for w in (0.3, 0.9) for d in (0.2, 0.7)],
            2,
        ),
        (
            {"method": "task_arithmetic", "coefficients": {"kind": "sens"}, "weight": 0.4},
            [{"temperature": 0.01}, {"temperature": 1.0}],
            2,
        ),
    ],
)
def test_candidates_answer_as_their_merges_do(
    settings: dict[str, Any], candidates: list[Values], merges: int, llama_recipe: Recipe, tmp_path: Path
) -> None:
    tune = {key: [0.5] for values in candidates for key in values}
    llama_recipe["merges"] = {"tuned": {**settings, "tune": tune}}
    assert_as_merged(needed(plan_of(tmp_path, llama_recipe)), candidates, tmp_path, merges)


def test_candidates_end_in_the_heads_of_the_tasks(berts: dict[str, Path], tmp_path: Path) -> None:
    experts = {name: berts[name] for name in ("mood", "topic")}
    plan = plan_of(tmp_path, classify(tmp_path, experts, berts["base"], weight="auto"))
    assert_as_merged(needed(plan), [{"weight": 0.2}, {"weight": 0.7}], tmp_path, 1)


def test_candidates_of_a_base_without_a_pooler_end_in_those_of_the_tasks(
    berts: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    """A base of masked language modelling has none, and each classifier its own."""
    network = BertForMaskedLM(bert_config())
    network.bert.load_state_dict(load_file(berts["base"] / WEIGHTS), strict=False)
    base, experts = save(network, "base", tmp_path), {name: berts[name] for name in ("mood", "topic")}
    plan = plan_of(tmp_path, classify(tmp_path, experts, base, weight="auto"))
    assert {name for name in plan.inputs.experts["mood"].head if "pooler" in name}
    assert_as_merged(needed(plan), [{"weight": 0.2}, {"weight": 0.7}], tmp_path, 1)


def test_nothing_is_generated_for_a_metric_that_needs_none(llama_recipe: Recipe, tmp_path: Path) -> None:
    llama_recipe["merges"] = {"tuned": {"method": "task_arithmetic", "weight": "auto"}}
    task = {"generate": 2, "answer": "."}
    for name, metric in (("math", "perplexity"), ("code", "exact_match")):
        llama_recipe["tasks"][name] |= {**task, "metric": metric}
    job = plan_of(tmp_path, llama_recipe).step("tune", "tuned").job
    assert isinstance(job, TuneJob)
    assert {name: (one.task.metric, one.task.answer_tokens) for name, one in job.tuning.items()} == {
        "math": ("token_accuracy", 0),  # a mean loss chooses badly
        "code": ("exact_match", 2),
    }
    assert job.metrics == {"math": "token_accuracy", "code": "exact_match"}


def test_rows_without_labels_are_scored_by_the_answers_of_their_own_experts(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    recipe = twin_recipe(tmp_path, twins, tune={"weight": [0.1, 0.25, 0.5, 0.75]})
    for name in ("mood", "topic"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        write_rows(tmp_path / f"{name}-open.jsonl", [{"text": row["text"]} for row in rows])
        source = {"path": "json", "data_files": f"{name}-open.jsonl", "samples": 40, "seed": 0}
        recipe["tasks"][name] |= {"tuning": source, "calibration": None}
    # The rows have the labels that the experts give: scores are the same with and without them.
    plan = plan_of(tmp_path, recipe)
    assert (
        "tasks.mood.tuning: its rows have no label, so what experts.mood answers counts as right" in plan.inputs.notes
    )
    found = tuned(plan)
    for name in ("mood", "topic"):
        recipe["tasks"][name]["tuning"]["data_files"] = f"{name}.jsonl"
    labelled = tuned(plan_of(tmp_path, recipe))
    assert found["chosen"] == {"weight": 0.5}
    assert found["tried"] == labelled["tried"]
    # No row is scored that was tuned on, whatever its label.
    texts = [{row["text"] for row in getattr(plan.inputs.data["mood"], split)} for split in ("tuning", "evaluation")]
    assert [len(one) for one in texts] == [40, 20]
    assert not texts[0] & texts[1]


def test_rows_of_which_some_have_no_label(twins: dict[str, Path], tmp_path: Path) -> None:
    recipe = twin_recipe(tmp_path, twins, weight="auto")
    write_rows(tmp_path / "open.jsonl", [{"text": "x", "label": 0}, {"text": "y", "label": None}])
    recipe["tasks"]["mood"]["tuning"] = {"path": "json", "data_files": "open.jsonl"}
    with pytest.raises(
        InputError, match=r"tasks\.mood\.tuning: line 2 of .* has no label, line 1 of .* has one; give it"
    ):
        plan_of(tmp_path, recipe)


def test_threads_change_nothing(twins: dict[str, Path], tmp_path: Path) -> None:
    plan = needed(plan_of(tmp_path, twin_recipe(tmp_path, twins, tune={"weight": [0.25, 0.5]})))
    job, found = plan.step("tune", "tuned").job, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = tmp_path / f"threads-{threads}"
        out.mkdir()
        job.finish(out)
        found.append(read_json(out / "tune.json"))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert found[0] == found[1]


def test_scores_have_intervals(twins: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, twin_recipe(tmp_path, twins, tune={"weight": [0.25, 0.5]}))
    for one in tuned(plan)["tried"]:
        assert set(one["tasks"]) == {"mood", "topic"}
        mean = sum(Score(**score).value for score in one["tasks"].values()) / 2
        assert one["mean"]["value"] == pytest.approx(mean)
        assert one["mean"]["low"] <= one["mean"]["value"] <= one["mean"]["high"]
