"""Encoder-decoders from rows of sources and targets to scores, on a T5 that is trained here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.answers import answers
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.serving.static_model import StaticModel
from tests.conftest import do_steps, make_tokenizer, plan_of, write_rows

WORDS = {
    "english": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "french": ["zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"],
}
STEPS = 100


def rows(language: str, numbers: range) -> list[dict[str, object]]:
    """What the last digit of a number is called."""
    return [{"number": f"{language[0]} {one}", "word": WORDS[language][one % 10]} for one in numbers]


def trained(language: str | None) -> T5ForConditionalGeneration:
    """A tiny T5 that has learned the words of a language; the base has learned none."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 2}
    network, tokenizer = T5ForConditionalGeneration(T5Config(vocab_size=259, **sizes, **tokens)), make_tokenizer()
    if language is None:
        return network
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    sources, targets = (
        [[*tokenizer(str(row[field])).input_ids, 1] for row in rows(language, range(10, 100))]
        for field in ("number", "word")
    )
    for _ in range(STEPS):
        picks = torch.randint(len(sources), (32,), generator=generator).tolist()
        labels = torch.full((len(picks), 8), -100)
        for place, pick in enumerate(picks):
            labels[place, : len(targets[pick])] = torch.tensor(targets[pick])
        network(input_ids=torch.tensor([sources[pick] for pick in picks]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A recipe whose steps are done."""
    folder = tmp_path_factory.mktemp("words")
    return done(folder)


def recipe(folder: Path) -> dict[str, Any]:
    tasks = {}
    for language in WORDS:
        for split, numbers in (("calibration", range(10, 40)), ("evaluation", range(40, 70))):
            write_rows(folder / f"{language}-{split}.jsonl", rows(language, numbers))
        sets = {
            split: {"path": "json", "data_files": f"{language}-{split}.jsonl"}
            for split in ("calibration", "evaluation")
        }
        said = {"source": "{number}</s>", "target": "{word}", "generate": 10, "metric": "exact_match"}
        tasks[language] = {"kind": "seq2seq", **said, **sets}
    arithmetic = {"method": "task_arithmetic", "weight": 0.5}
    return {
        "name": "words",
        "base": str(folder / "base"),
        "experts": {language: {"model": str(folder / language)} for language in WORDS},
        "tasks": tasks,
        "dtype": "float32",
        "merges": {
            "ta": arithmetic,
            "sens": {**arithmetic, "coefficients": {"kind": "sens", "temperature": 0.3}},
            "regmean": {"method": "regmean"},
            "fisher": {"method": "fisher"},
            "se": {**arithmetic, "application": {"kind": "se"}},
        },
    }


def done(folder: Path) -> Plan:
    tokenizer = make_tokenizer()
    for name in (None, *WORDS):
        target = folder / (name or "base")
        trained(name).save_pretrained(target)
        tokenizer.save_pretrained(target)
    found = plan_of(folder, recipe(folder))
    do_steps(found)
    return found


def test_experts_know_their_words_and_so_does_the_dynamic_merge(plan: Plan) -> None:
    routes = read_json(plan.artifact("evaluate", "se") / "routes.json")
    assert routes["identification"]["value"] >= 0.95
    dynamic = read_json(plan.artifact("evaluate", "se") / "scores.json")
    for language in WORDS:
        own = read_json(plan.artifact("evaluate", f"{language}/{language}") / "scores.json")
        assert own["exact_match"]["value"] >= 0.9
        assert own["exact_match"]["n"] == 30
        assert own["perplexity"]["value"] < 1.5
        assert dynamic[language]["exact_match"]["value"] >= 0.9 * own["exact_match"]["value"]
        base = read_json(plan.artifact("evaluate", f"base/{language}") / "scores.json")
        assert base["exact_match"]["value"] == 0
        assert {"bleu", "token_accuracy"} <= base.keys()


def test_answers_are_what_transformers_generates(plan: Plan) -> None:
    folder = plan.models()["ta"]
    network, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), make_tokenizer()
    records = read_json(plan.artifact("evaluate", "ta/french") / "records.json")
    for row, record in zip(rows("french", range(40, 70)), records, strict=True):
        ids = torch.tensor([[*tokenizer(str(row["number"])).input_ids, 1]])
        said = network.generate(input_ids=ids, max_new_tokens=10, do_sample=False)
        assert record["answer"] == tokenizer.decode(said[0], skip_special_tokens=True)
    assert StaticModel.load(folder).predict(["f 41</s>", "f 4</s>"], 10)[0] == records[1]["answer"]


def test_people_read_source_target_and_answer(plan: Plan) -> None:
    row = answers(plan)["ta"]["french"].rows[0]
    assert row["prompt"].endswith("</s>")
    assert {"expected", "answer", "right"} <= row.keys()


def test_a_dynamic_model_answers_texts(plan: Plan) -> None:
    model = DynamicModel.load(plan.models()["se"])
    found = model.predict(["e 77</s>", "f 73</s>", "f 99</s>"], 10)
    assert [one.prediction for one in found] == ["seven", "trois", "neuf"]
    assert [one.expert for one in found] == ["english", "french", "french"]


def test_features_are_not_calibrated(plan: Plan, tmp_path: Path) -> None:
    changed = recipe(tmp_path)
    changed |= {"base": plan.recipe.base.model, "merges": {"ta": {"method": "task_arithmetic", "calibrate": {}}}}
    changed["experts"] = {name: {"model": one.model} for name, one in plan.recipe.experts.items()}
    with pytest.raises(InputError, match=r"^merges\.ta\.calibrate: fits block after block"):
        plan_of(tmp_path, changed)
