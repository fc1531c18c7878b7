"""Scores of a dynamic model against those of weights that are written out for each sample."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.dynamic.model import DynamicModel, Routes
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.networks.tokens import Inputs
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.stages.evaluate import evaluate_network
from sensmerge.tasks.stages.evaluate_dynamic import EvaluateDynamicJob
from tests.conftest import make_gpt2, make_llama, perturbed, row_set
from tests.tasks.dynamic import test_model as models
from tests.tasks.dynamic.test_model import Merge, by_name, classes, completions, merge, set_weights
from tests.tasks.stages.test_merge_vectors import vectors_of

llama_experts, causal, encoders = models.llama_experts, models.causal, models.encoders

COMPLETION = CompletionTask(kind="completion", generate=4, answer=r".", batch_size=4)
ROWS: list[Row] = [{"prompt": f"{a}+{7 * a}=", "completion": str(8 * a)} for a in range(5)]
CHOICES: list[Row] = [
    {"prompt": f"def f{i}(x):", "choices": ["return x", "pass", "raise ValueError"][: 2 + i % 2], "answer": i % 2}
    for i in range(4)
]


def sets(batch_size: int = 4) -> dict[str, RowSet]:
    choices = MultipleChoiceTask(kind="multiple_choice", batch_size=9)
    return {
        "math": row_set(COMPLETION.model_copy(update={"batch_size": batch_size}), ROWS),
        "code": row_set(choices, CHOICES),
    }


def run(model: Path, evaluation: Mapping[str, RowSet], out: Path) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    out.mkdir(parents=True, exist_ok=True)
    report = EvaluateDynamicJob(Artifact("", model), evaluation, {}, "cpu").finish(out)
    assert read_json(out / "routes.json") == report
    return report, read_json(out / "records.json")


def assert_close(found: list[Record], expected: list[Record]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one.get("answer") == other.get("answer")
        numbers, others = ({key: value for key, value in some.items() if key != "answer"} for some in (one, other))
        assert numbers == pytest.approx(others, rel=1e-4, abs=1e-5)


def prompts(one: RowSet, model: DynamicModel) -> list[Inputs]:
    """What each row is routed by: the text before what is scored."""
    found = []
    for row in one.rows.read():
        found.append(one.task.samples(row, model.tokenizer, "", one.label2id)[0].prompt)
    return found


def routes_of(one: RowSet, model: DynamicModel) -> list[Routes]:
    return [model.route([prompt]) for prompt in prompts(one, model)]


def test_scores_are_those_of_materialised_weights(causal: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path / "model", temperature=0.1, mass=1.3)
    report, records = run(tmp_path / "model", sets(), tmp_path / "out")
    network, vectors = make_llama(), vectors_of(causal.folder)
    for name, one in sets().items():
        expected = []
        for row, routes in zip(one.rows.read(), routes_of(one, model), strict=True):
            set_weights(network, causal.job.base.folder, vectors, by_name(model, routes, 0))
            expected += evaluate_network(network, model.tokenizer, one.task, [row], name)
        assert_close(records[name], expected)
    assert records["math"][0].keys() == {"nll", "correct", "tokens", "exact", "answer"}
    scores = read_json(tmp_path / "out" / "scores.json")
    assert scores["math"].keys() == {"token_accuracy", "perplexity", "exact_match"}
    total = sum(record["correct"] for record in records["math"]) / sum(record["tokens"] for record in records["math"])
    assert scores["math"]["token_accuracy"]["value"] == pytest.approx(total)
    assert scores["code"]["accuracy"]["n"] == 4

    taken = {name: [routes.experts[0] for routes in routes_of(one, model)] for name, one in sets().items()}
    assert report["confusion"] == {
        name: {expert: taken[name].count(i) for i, expert in enumerate(model.experts)} for name in taken
    }
    right = sum(model.experts[i] == name for name, found in taken.items() for i in found)
    assert (report["identification"]["value"], report["identification"]["n"]) == (pytest.approx(right / 9), 9)
    own = [by_name(model, routes, 0)[name] for name, one in sets().items() for routes in routes_of(one, model)]
    assert report["right_coefficient"]["value"] == pytest.approx(sum(own) / 9, rel=1e-4)
    assert report["passes"] == pytest.approx(model.passes + 1)
    assert report["milliseconds"] > 0


def test_exact_match_finds_what_the_routed_weights_generate(causal: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path / "model", temperature=0.1)
    texts = [row["prompt"] for row in ROWS]
    answers = [one.prediction for one in model.predict(texts, max_new_tokens=4)]
    rows = [{"prompt": text, "completion": answer} for text, answer in zip(texts, answers, strict=True)]
    task = CompletionTask(kind="completion", generate=4)
    longer = CompletionTask(kind="completion", generate=9)
    evaluation = {"math": row_set(task, rows), "code": row_set(longer, [{"prompt": "def", "completion": " f"}])}
    _, records = run(tmp_path / "model", evaluation, tmp_path / "out")
    usable = [bool(answer.strip()) for answer in answers]
    assert any(usable)
    assert [record["exact"] for record, use in zip(records["math"], usable, strict=True) if use] == [1] * sum(usable)
    wrong = {"math": row_set(task, [{**row, "completion": row["completion"] + "x"} for row in rows])}
    _, records = run(tmp_path / "model", wrong, tmp_path / "wrong")
    assert [record["exact"] for record in records["math"]] == [0] * 5


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batch_size_changes_no_record(batch_size: int, causal: Merge, tmp_path: Path) -> None:
    causal.routed(tmp_path / "model", temperature=0.1)
    _, expected = run(tmp_path / "model", sets(), tmp_path / "plain")
    _, records = run(tmp_path / "model", sets(batch_size), tmp_path / "out")
    for name, found in records.items():
        assert_close(found, expected[name])


@pytest.fixture(scope="module")
def classified() -> dict[str, RowSet]:
    return {
        "mood": classes(2, "good", "very bad", "so so", "x", "great text"),
        "topic": classes(3, "12", "9999 and 1", "345", "7"),
    }


def materialised_class(
    network: PreTrainedModel, model: DynamicModel, one: RowSet, row: Row, routes: Routes, merged: Merge
) -> int:
    set_weights(network, merged.job.base.folder, vectors_of(merged.folder), by_name(model, routes, 0))
    network.config.label2id = one.label2id
    return int(evaluate_network(network, model.tokenizer, one.task, [row], "")[0]["prediction"])


def test_given_and_routed_heads(
    encoders: Merge, berts: dict[str, Path], classified: dict[str, RowSet], tmp_path: Path
) -> None:
    model = encoders.routed(tmp_path / "model", temperature=0.1, mass=1.0)
    report, records = run(tmp_path / "model", classified, tmp_path / "out")
    networks = {name: AutoModelForSequenceClassification.from_pretrained(berts[name]).eval() for name in classified}
    hits = 0
    for name, one in classified.items():
        for row, record, routes in zip(one.rows.read(), records[name], routes_of(one, model), strict=True):
            head = model.experts[routes.experts[0]]
            given = materialised_class(networks[name], model, one, row, routes, encoders)
            right = head == name and given == row["label"]
            assert record == {"prediction": given, "label": row["label"], "routed": int(right)}
            hits += head == name
    assert 0 < hits <= 9
    assert report["identification"]["value"] == pytest.approx(hits / 9)
    scores = read_json(tmp_path / "out" / "scores.json")
    for name, found in records.items():
        assert scores[name]["accuracy"]["value"] == pytest.approx(
            sum(record["prediction"] == record["label"] for record in found) / len(found)
        )
        assert scores[name]["routed_accuracy"]["value"] == pytest.approx(
            sum(record["routed"] for record in found) / len(found)
        )


def test_another_head_is_a_wrong_answer(encoders: Merge, classified: dict[str, RowSet], tmp_path: Path) -> None:
    """With the calibration sets swapped, the router takes each task for the other."""
    mood, topic = classified["mood"], classified["topic"]
    texts = {"mood": [row["text"] for row in topic.rows.read()], "topic": [row["text"] for row in mood.rows.read()]}
    swapped = {"mood": classes(2, *texts["mood"]), "topic": classes(3, *texts["topic"])}
    one = replace(encoders, calibration=swapped)
    model = one.routed(tmp_path / "model", score="centroid", temperature=0.1)
    report, records = run(tmp_path / "model", classified, tmp_path / "out")
    wrong = 0
    for name, rows in classified.items():
        for record, routes in zip(records[name], routes_of(rows, model), strict=True):
            if model.experts[routes.experts[0]] != name:
                assert record["routed"] == 0
                wrong += 1
    assert wrong >= 5
    assert report["identification"]["value"] == pytest.approx(1 - wrong / 9)


def test_tasks_without_evaluation_rows_are_left_out(causal: Merge, tmp_path: Path) -> None:
    causal.run(tmp_path / "model")
    report, records = run(tmp_path / "model", {"code": sets()["code"]}, tmp_path / "out")
    assert records.keys() == {"code"}
    assert list(report["confusion"]) == ["code"]
    assert list(report["confusion"]["code"]) == ["math", "code", "lora"]


def test_a_long_prompt_beside_a_long_generation(save: Any, tmp_path: Path) -> None:
    """Each fits the model's 128 positions, both together do not."""
    experts = {
        name: save(perturbed(make_gpt2(), seed), name, tmp_path) for seed, name in enumerate(("math", "code"), 1)
    }
    calibration = {"math": completions("1+1=", "2+2="), "code": completions("def f", "import")}
    one = merge(tmp_path, save(make_gpt2(), "base", tmp_path), experts, calibration)
    one.run(tmp_path / "model")
    evaluation = {
        "math": row_set(CompletionTask(kind="completion", generate=2), [{"prompt": "1" * 120, "completion": "3"}]),
        "code": row_set(CompletionTask(kind="completion", generate=40), [{"prompt": "def", "completion": "x"}]),
    }
    _, records = run(tmp_path / "model", evaluation, tmp_path / "out")
    assert {name: len(found) for name, found in records.items()} == {"math": 1, "code": 1}
