"""Experts that tag words, from a recipe to scores, against transformers' own networks and written-out formulas."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForTokenClassification

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.answers import answers
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.entities import entities
from sensmerge.tasks.serving.static_model import StaticModel
from tests.conftest import (
    do_steps,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_tokenizer,
    perturbed,
    plan_of,
    write_rows,
)
from tests.taggers import make_tagger, spaced_tokenizer

CLASSES = {"people": ["O", "B-PER", "I-PER"], "places": ["I-LOC", "O", "B-LOC", "B-ORG", "I-ORG"]}
TEXTS = ["Ann Lee met Bo", "to Rome", "a b c d e f", "Paris or Oslo ?", "x", "Mr Fox and Ms Hen", "no one", "Bo"]


def rows(name: str, texts: list[str]) -> list[dict[str, object]]:
    names, found = CLASSES[name], []
    for number, text in enumerate(texts):
        words = text.split()
        found.append({"tokens": words, "tags": [names[(number + place) % len(names)] for place in range(len(words))]})
    return found


def write_all(folder: Path) -> dict[str, Any]:
    """Write models and rows, and return a recipe of them."""
    trunk, tokenizer = perturbed(make_bert_trunk(), 7, 0.2), spaced_tokenizer()
    models = {"base": trunk} | {name: make_tagger(trunk, seed, CLASSES[name]) for seed, name in enumerate(CLASSES, 1)}
    for name, network in models.items():
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tasks: dict[str, Any] = {}
    for shift, name in enumerate(CLASSES):
        files = {"calibration": TEXTS[shift : shift + 3], "evaluation": TEXTS[3 + shift :]}
        for split, texts in files.items():
            write_rows(folder / f"{name}-{split}.jsonl", rows(name, texts))
        sources = {split: {"path": "json", "data_files": f"{name}-{split}.jsonl"} for split in files}
        tasks[name] = {"kind": "token_classification", **sources}
    return {
        "name": "tags",
        "base": "base",
        "experts": {name: {"model": name} for name in CLASSES},
        "tasks": tasks,
        "merges": {
            "ta": {"method": "task_arithmetic", "weight": 0.5},
            "sens": {"method": "task_arithmetic", "weight": 0.5, "coefficients": {"kind": "sens"}},
            # So warm that every expert has the same share: the static merge.
            "se": {
                "method": "task_arithmetic",
                "weight": 0.5,
                "application": {"kind": "se", "score": "nearest", "temperature": 1e9, "fallback": 0.0},
            },
        },
    }


class Done(NamedTuple):
    folder: Path
    plan: Plan


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("tags")
    plan = plan_of(folder, write_all(folder))
    do_steps(plan)
    return Done(folder, plan)


def tagger(folder: Path, name: str, trunk: Path | None = None) -> BertForTokenClassification:
    """An expert's network as transformers loads it, on the trunk of another model."""
    network = BertForTokenClassification.from_pretrained(folder / name).eval()
    if trunk is not None:
        tensors = {key.removeprefix("bert."): one for key, one in load_file(trunk / "model.safetensors").items()}
        left = network.bert.load_state_dict(
            {key: one for key, one in tensors.items() if key in network.bert.state_dict()}, strict=True
        )
        assert not left.missing_keys
    return network


def logits_of(network: BertForTokenClassification, words: list[str]) -> tuple[Tensor, list[int]]:
    """Logits of a text's tokens, (T, classes), and the places of the words' first tokens."""
    encoded = spaced_tokenizer()(words, is_split_into_words=True, return_tensors="pt")
    ids = encoded.word_ids()
    with torch.no_grad():
        logits = network(**{key: encoded[key] for key in ("input_ids", "attention_mask")}).logits[0]
    return logits, [ids.index(word) for word in range(len(words))]


def expected_records(network: BertForTokenClassification, some: list[dict[str, Any]]) -> Iterator[dict[str, int]]:
    names = network.config.id2label
    for row in some:
        logits, places = logits_of(network, row["tokens"])
        tags = [names[int(one)] for one in logits[places].argmax(-1)]
        right = sum(one == other for one, other in zip(tags, row["tags"], strict=True))
        mine, own = entities(tags), entities(row["tags"])
        counts = {"found": len(mine & own), "predicted": len(mine), "expected": len(own)}
        yield {"right": right, "tags": len(tags), "exact_match": int(right == len(tags)), **counts}


@pytest.mark.parametrize("model", ["base", "people", "places", "ta", "sens"])
@pytest.mark.parametrize("task", CLASSES)
def test_scores_are_those_of_the_task_s_head_on_each_trunk(done: Done, model: str, task: str) -> None:
    folder, plan = done
    trunk = plan.artifact("merge", model) if model in ("ta", "sens") else folder / model
    shift = list(CLASSES).index(task)
    found = read_json(plan.artifact("evaluate", f"{model}/{task}") / "records.json")
    assert found == list(expected_records(tagger(folder, task, trunk), rows(task, TEXTS[3 + shift :])))
    assert sum(record["predicted"] for record in found) > 0
    total = {key: sum(record[key] for record in found) for key in found[0]}
    scores = read_json(plan.artifact("evaluate", f"{model}/{task}") / "scores.json")
    assert scores["f1"]["value"] == pytest.approx(2 * total["found"] / (total["predicted"] + total["expected"]))
    assert scores["accuracy"]["value"] == pytest.approx(total["right"] / total["tags"])


def test_people_read_words_tags_and_how_many_are_right(done: Done) -> None:
    """Tags are numbers in some rows; people read their names."""
    table = answers(done.plan)["ta"]["people"]
    rows = done.plan.inputs.data["people"].evaluation
    records = read_json(done.plan.artifact("evaluate", "ta/people") / "records.json")
    assert table.scored == len(rows) == len(table.rows)
    names = tagger(done.folder, "people").config.id2label
    for found, row, record in zip(table.rows, rows, records, strict=True):
        tags = [tag if isinstance(tag, str) else names[tag] for tag in row["tags"]]
        assert (found["prompt"], found["expected"]) == (" ".join(row["tokens"]), " ".join(tags))
        assert (found["answer"], found["right"]) == (f"{record['right']} of {len(tags)} tags", record["exact_match"])


def test_a_dynamic_model_with_the_heads_given(done: Done) -> None:
    """Of equal shares, it is the static merge."""
    for task in CLASSES:
        static = read_json(done.plan.artifact("evaluate", f"ta/{task}") / "records.json")
        dynamic = read_json(done.plan.artifact("evaluate", "se") / "records.json")[task]
        assert [{key: record[key] for key in static[0]} for record in dynamic] == static
        assert all(record["routed"] in (0, record["exact_match"]) for record in dynamic)


def test_distances_are_means_over_tokens(done: Done) -> None:
    found = read_json(done.plan.artifact("cross_task", "all") / "distances.json")
    for shift, j in enumerate(CLASSES):
        (i,) = set(CLASSES) - {j}
        own, other = tagger(done.folder, j), tagger(done.folder, j, done.folder / i)
        apart = [
            float((logits_of(other, text.split())[0] - logits_of(own, text.split())[0]).norm(dim=-1).mean())
            for text in TEXTS[shift : shift + 3]
        ]
        assert found[i][j] == pytest.approx(sum(apart) / 3, rel=1e-4)


def test_sensitivity_is_that_of_the_loss_on_first_tokens(done: Done) -> None:
    found = read_json(done.plan.artifact("statistics", "people") / "sensitivity.json")["sensitivity"]
    network, sums = tagger(done.folder, "people"), dict.fromkeys(found, 0.0)
    for row in rows("people", TEXTS[:3]):
        network.zero_grad()
        encoded = spaced_tokenizer()(row["tokens"], is_split_into_words=True, return_tensors="pt")
        ids, tags = encoded.word_ids(), row["tags"]
        assert isinstance(tags, list)
        numbers = [network.config.label2id[tag] for tag in tags]
        labels = [
            numbers[word] if word is not None and word not in ids[:place] else -100 for place, word in enumerate(ids)
        ]
        network(encoded["input_ids"], labels=torch.tensor([labels])).loss.backward()
        for layer in sums:
            prefix = f"bert.{layer}."
            for name, one in network.named_parameters():
                if name.startswith(prefix):
                    assert one.grad is not None
                    sums[layer] += float((one * one.grad).abs().sum(dtype=torch.float64)) / 3
    assert any(layer.startswith("encoder.layer.1") for layer in found)
    assert found == pytest.approx(sums, rel=1e-5)


def test_merged_models_tag_the_words_of_texts(done: Done) -> None:
    folder, plan = done
    static = StaticModel.load(plan.artifact("merge", "ta"))
    expected = {}
    for task, names in CLASSES.items():
        network = tagger(folder, task, plan.artifact("merge", "ta"))
        expected[task] = []
        for text in TEXTS:
            logits, places = logits_of(network, text.split())
            expected[task].append(" ".join(names[int(one)] for one in logits[places].argmax(-1)))
        assert static.predict(TEXTS, task=task) == expected[task]
    dynamic = DynamicModel.load(plan.artifact("route", "se"))
    for number, answer in enumerate(dynamic.predict(TEXTS)):
        assert answer.prediction == expected[answer.expert][number]


# What does not go -----------------------------------------------------------------------------------------------------


def test_a_classifier_of_texts_is_no_tagger(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    make_bert_expert(make_bert_trunk(), 1, 3).save_pretrained(tmp_path / "people")
    with pytest.raises(InputError, match=r"tasks.people.kind: token_classification, but .* is a BertForSequenceClassi"):
        plan_of(tmp_path, recipe)


def test_words_without_spaces(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    for name in ("base", *CLASSES):
        make_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=r"tasks.people: the tokenizer of .* reads words without the spaces"):
        plan_of(tmp_path, recipe)


def test_taggers_and_classifiers_share_no_routes(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    recipe["tasks"]["people"]["kind"] = "classification"
    with pytest.raises(InputError, match=r"merges.sens: coefficients sens cannot compare classifiers with other kinds"):
        plan_of(tmp_path, recipe)


def test_an_adapter(tmp_path: Path) -> None:
    """An adapter names no classes, so its entities cannot be told; its tags can."""
    recipe = write_all(tmp_path)
    recipe["merges"] = {"ta": recipe["merges"]["ta"]}
    network = make_tagger(make_bert_trunk(), 1, CLASSES["people"])
    settings = {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}
    make_adapter(network, tmp_path / "lora", 1, **settings)
    recipe["experts"]["people"]["model"] = "lora"
    numbered = [
        {"tokens": row["tokens"], "tags": [CLASSES["people"].index(tag) for tag in row["tags"]]}  # type: ignore[attr-defined]
        for row in rows("people", TEXTS)
    ]
    write_rows(tmp_path / "people-evaluation.jsonl", numbered[3:])
    write_rows(tmp_path / "people-calibration.jsonl", numbered[:3])
    with pytest.raises(InputError, match=r"tasks.people.metric is f1.* the expert's classes are LABEL_0, LABEL_1, LAB"):
        plan_of(tmp_path, recipe)
    recipe["tasks"]["people"]["metric"] = "accuracy"
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    scores = read_json(plan.artifact("evaluate", "people/people") / "scores.json")
    assert scores.keys() == {"accuracy", "exact_match"}
    assert StaticModel.load(plan.artifact("merge", "ta")).predict(["a b"], task="people")[0].split()[0][:6] == "LABEL_"
