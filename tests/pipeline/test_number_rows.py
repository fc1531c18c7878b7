"""An expert that gives pairs of texts numbers beside a classifier, from a recipe to a report."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from transformers import BertForSequenceClassification, BertModel, BertTokenizer

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.serving.static_model import StaticModel
from tests.conftest import (
    bert_config,
    make_bert_expert,
    make_bert_trunk,
    perturbed,
    plan_of,
    write_recipe,
    write_rows,
)
from tests.here import run_here

WORDS = [f"w{number}" for number in range(40)]
PAIRS: list[dict[str, Any]] = [
    {"a": f"w{number} w{3 * number % 40}", "b": f"w{number + 7} w1 w2", "score": str(number % 6 / 2)}
    for number in range(16)
]
TEXTS: list[dict[str, Any]] = [{"text": f"w{30 - number} w{number}", "label": number % 2} for number in range(12)]


def make_regressor(trunk: BertModel, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    network = BertForSequenceClassification(bert_config(1))
    network.bert.load_state_dict(trunk.state_dict())
    network.config.problem_type = "regression"
    network.classifier.weight.data *= 20
    return perturbed(network, seed, 0.05)


def write_all(folder: Path) -> dict[str, Any]:
    """Write models and rows, and return a recipe of them."""
    trunk = perturbed(make_bert_trunk(), 7, 0.2)
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[PAD]", "[SEP]", "[MASK]", *WORDS])}
    models = {"base": trunk, "alike": make_regressor(trunk, 1), "mood": make_bert_expert(trunk, 2, 2)}
    for name, network in models.items():
        network.save_pretrained(folder / name)
        BertTokenizer(vocab=vocabulary).save_pretrained(folder / name)
    for name, some in (("alike", PAIRS), ("mood", TEXTS)):
        write_rows(folder / f"{name}.jsonl", some[:4])
        write_rows(folder / f"{name}-test.jsonl", some[4:])
    data = {
        name: {
            "calibration": {"path": "json", "data_files": f"{name}.jsonl"},
            "evaluation": {"path": "json", "data_files": f"{name}-test.jsonl"},
        }
        for name in ("alike", "mood")
    }
    route = {"kind": "se", "score": "nearest", "temperature": 1e9, "fallback": 0.0}
    arithmetic = {"method": "task_arithmetic", "weight": 0.5}
    return {
        "name": "numbers",
        "base": "base",
        "experts": {name: {"model": name} for name in ("alike", "mood")},
        "tasks": {
            "alike": {"kind": "regression", "prompt": "{a}", "pair": "{b}", "label": "score", **data["alike"]},
            "mood": {"kind": "classification", **data["mood"]},
        },
        "merges": {
            "ta": arithmetic,
            "sens": arithmetic | {"coefficients": {"kind": "sens"}},
            "se": arithmetic | {"application": route},
        },
    }


class Finished(NamedTuple):
    folder: Path
    report: dict[str, Any]

    def artifact(self, model: str, name: str) -> Any:
        """What stage evaluate wrote of a model."""
        (stage,) = (one for one in self.report["stages"] if (one["stage"], one["name"]) == ("evaluate", model))
        (folder,) = (self.folder / "store" / "evaluate").rglob(f"*-{stage['fingerprint'][:8]}")
        return read_json(folder / name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("numbers")
    path, report = write_recipe(folder, write_all(folder)), folder / "report.json"
    assert run_here(path, "--store", folder / "store", "--report", report) == 0
    return Finished(folder, json.loads(report.read_text()))


def numbers_of(folder: Path, trunk: Path) -> list[float]:
    """What transformers gives for the evaluation pairs by the expert's head on the trunk of another model."""
    network = BertForSequenceClassification.from_pretrained(folder / "alike").eval()
    tensors = {key.removeprefix("bert."): one for key, one in load_file(trunk / "model.safetensors").items()}
    own = network.bert.state_dict()
    network.bert.load_state_dict({key: one for key, one in tensors.items() if key in own}, strict=True)
    tokenizer = BertTokenizer.from_pretrained(folder / "alike")
    with torch.no_grad():
        return [float(network(**tokenizer(row["a"], row["b"], return_tensors="pt")).logits) for row in PAIRS[4:]]


@pytest.mark.parametrize("model", ["base", "alike", "mood", "ta", "sens"])
def test_scores_are_those_of_the_expert_s_head_on_each_trunk(finished: Finished, model: str) -> None:
    expected = numbers_of(finished.folder, Path(finished.report["models"][model]))
    found = finished.artifact(f"{model}/alike", "records.json")
    assert [record["prediction"] for record in found] == pytest.approx(expected, abs=1e-5)
    labels = [float(row["score"]) for row in PAIRS[4:]]
    assert [record["label"] for record in found] == labels
    scores = finished.report["scores"][model]["alike"]
    assert scores["pearson"]["value"] == pytest.approx(pearsonr(expected, labels).statistic, abs=1e-4)
    assert scores["spearman"]["value"] == pytest.approx(spearmanr(expected, labels).statistic, abs=1e-6)
    assert scores["spearman"]["low"] < scores["spearman"]["value"] < scores["spearman"]["high"]


def test_a_dynamic_model_answers_with_a_number_or_a_class(finished: Finished) -> None:
    """Of equal shares, it is the static merge; whether a number is right is no question, so it is not routed."""
    static = finished.artifact("ta/alike", "records.json")
    dynamic = finished.artifact("se", "records.json")
    assert [record.keys() for record in dynamic["alike"]] == [{"prediction", "label"}] * 12
    numbers = [[record["prediction"] for record in some] for some in (static, dynamic["alike"])]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert all("routed" in record for record in dynamic["mood"])
    routed = finished.report["routes"]["se"]["routed"]
    assert routed is None or routed["n"] == len(dynamic["mood"])
    assert finished.report["routes"]["se"]["evaluation"]["n"] == 20


def test_merged_models_answer_texts_with_numbers(finished: Finished) -> None:
    models, texts = finished.report["models"], ["w1 w2", "w3", "w4 w5 w6"]
    static = StaticModel.load(Path(models["ta"]))
    found = static.predict(texts, task="alike")
    network, tokenizer = static.network("alike"), static.tokenizer
    with torch.no_grad():
        expected = [float(network(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert [float(one) for one in found] == pytest.approx(expected, abs=1e-5)
    assert set(static.predict(texts, task="mood")) <= {"LABEL_0", "LABEL_1"}
    for one in DynamicModel.load(Path(models["se"])).predict(texts):
        assert one.prediction.startswith("LABEL_") == (one.expert == "mood")


def test_the_card_loads_a_head(finished: Finished) -> None:
    folder = Path(finished.report["models"]["ta"])
    code = (folder / "README.md").read_text().split("## Heads")[1].split("```python\n")[1].split("```")[0]
    assert "# This warns that the head is newly initialised; the next line loads it.\n" in code
    found: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), found)
    tokenizer = BertTokenizer.from_pretrained(folder)
    row = PAIRS[4]
    with torch.no_grad():
        number = float(found["model"].eval()(**tokenizer(row["a"], row["b"], return_tensors="pt")).logits)
    assert number == pytest.approx(finished.artifact("ta/alike", "records.json")[0]["prediction"], abs=1e-5)


def test_an_expert_with_classes_gives_no_number(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    make_bert_expert(make_bert_trunk(), 1, 3).save_pretrained(tmp_path / "alike")
    with pytest.raises(InputError, match=r"tasks.alike.kind: regression, but the expert's config has num_labels 3"):
        plan_of(tmp_path, recipe)
