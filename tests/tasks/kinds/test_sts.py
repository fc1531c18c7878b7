"""Pairs of texts as embeddings and cosines, from rows to scores, against transformers and scipy."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, BertForMaskedLM, BertModel

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.sts import StsTask
from tests.conftest import bert_config, do_steps, make_bert_trunk, make_tokenizer, perturbed, plan_of, write_rows

ROWS: list[dict[str, Any]] = [
    {"sentence1": "abc"[: 1 + number % 3] + "x" * number, "sentence2": "ab" + "z" * (number % 4), "label": number / 3}
    for number in range(10)
]


def write_all(folder: Path, **settings: Any) -> dict[str, Any]:
    """Write encoders and rows, and return a recipe of them."""
    for name, network in {
        "base": make_bert_trunk(),
        "one": perturbed(make_bert_trunk(), 1, 0.1),
        "two": perturbed(make_bert_trunk(), 2, 0.1),
    }.items():
        network.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", ROWS)
    task = {"kind": "sts", "evaluation": {"path": "json", "data_files": "rows.jsonl"}, **settings}
    return {
        "name": "alike",
        "base": "base",
        "experts": {name: {"model": name} for name in ("one", "two")},
        "tasks": dict.fromkeys(("one", "two"), task),
        "merges": {"ta": {"method": "task_arithmetic", "weight": 0.5}},
    }


def embedding(network: BertModel, text: str, pool: str) -> torch.Tensor:
    ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        hidden = network.eval()(ids).last_hidden_state[0].double()
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pool]


def cosine(network: BertModel, first: str, second: str, pool: str = "mean") -> float:
    return float(torch.cosine_similarity(embedding(network, first, pool), embedding(network, second, pool), dim=0))


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_scores_are_correlations_of_cosines(pool: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, write_all(tmp_path, pool=pool))
    do_steps(plan)
    for model in ("base", "one", "ta"):
        network = AutoModel.from_pretrained(plan.artifact("merge", "ta") if model == "ta" else tmp_path / model)
        expected = [cosine(network, row["sentence1"], row["sentence2"], pool) for row in ROWS]
        found = read_json(plan.artifact("evaluate", f"{model}/one") / "records.json")
        assert [record["prediction"] for record in found] == pytest.approx(expected, abs=1e-6)
        scores = read_json(plan.artifact("evaluate", f"{model}/one") / "scores.json")
        labels = [row["label"] for row in ROWS]
        assert scores["spearman"]["value"] == pytest.approx(spearmanr(expected, labels).statistic, abs=1e-6)
        assert scores["spearman"]["low"] <= scores["spearman"]["value"] <= scores["spearman"]["high"]


def test_the_sample_of_a_row_stands_for_both_texts() -> None:
    task, tokenizer = StsTask(kind="sts"), make_tokenizer()
    row = {"sentence1": "a", "sentence2": "bcd", "label": "2.5"}
    first, second = task.samples(row, tokenizer, "row 0")
    whole = task.sample(row, tokenizer, "row 0")
    assert (len(first.input_ids), len(second.input_ids)) == (1, 3)
    assert (whole.input_ids, whole.label) == (second.input_ids, 2.5)
    others = [row | change for change in ({"sentence1": "b"}, {"sentence2": "bce"}, {"label": 2})]
    assert whole.content not in [task.sample(one, tokenizer, "row 0").content for one in others]
    assert whole.content == task.sample(row | {"label": 2.5}, tokenizer, "row 9").content
    with pytest.raises(InputError, match="row 3: the text of pair has no token; leave the row out"):
        task.sample(row | {"sentence2": ""}, tokenizer, "row 3")


def test_padding_is_not_pooled() -> None:
    task, tokenizer = StsTask(kind="sts"), make_tokenizer()
    sample, _ = task.samples({"sentence1": "ab", "sentence2": "c", "label": 1}, tokenizer, "row 0")
    hidden = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    assert task.judge(sample, hidden).tolist() == [2.0, 4.0]
    assert StsTask(kind="sts", pool="last").judge(sample, hidden).tolist() == [3.0, 6.0]


def test_nothing_is_calibrated(tmp_path: Path) -> None:
    recipe = write_all(tmp_path, calibration={"path": "json", "data_files": "rows.jsonl"})
    with pytest.raises(InputError, match=r"tasks.one.*calibration: .*the kind has no loss to measure on it; leave it"):
        plan_of(tmp_path, recipe)
    recipe = write_all(tmp_path)
    recipe["merges"]["ta"]["coefficients"] = {"kind": "sens"}
    with pytest.raises(InputError, match=r"sens needs tasks.one.calibration"):
        plan_of(tmp_path, recipe)


def test_variants_are_tuned(tmp_path: Path) -> None:
    """By the mean over tasks of the correlation ÷ that of the task's own expert."""
    recipe = write_all(tmp_path, tuning={"path": "json", "data_files": "tuning.jsonl"})
    base, one, two = (AutoModel.from_pretrained(tmp_path / name) for name in ("base", "one", "two"))
    # As alike as the base finds them, so that all models are right to some extent.
    pairs = [(row["sentence1"], f"{row['label']}") for row in ROWS]
    labels = [cosine(base, *pair) for pair in pairs]
    rows = [{"sentence1": a, "sentence2": b, "label": label} for (a, b), label in zip(pairs, labels, strict=True)]
    write_rows(tmp_path / "tuning.jsonl", rows)
    recipe["merges"]["ta"] = {"method": "task_arithmetic", "tune": {"weight": [0.2, 0.6]}}
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    own = [spearmanr([cosine(network, *pair) for pair in pairs], labels).statistic for network in (one, two)]
    found = read_json(plan.artifact("tune", "ta") / "tune.json")["tried"]
    assert len(found) >= 2
    for candidate in found:
        weight, merged = candidate["values"]["weight"], copy.deepcopy(base)
        states = [network.state_dict() for network in (one, two)]
        merged.load_state_dict(
            {key: w + weight * sum(state[key] - w for state in states) for key, w in base.state_dict().items()}
        )
        value = spearmanr([cosine(merged, *pair) for pair in pairs], labels).statistic
        assert candidate["mean"]["value"] == pytest.approx(sum(value / each for each in own) / 2, abs=1e-6)


def test_what_makes_embeddings_otherwise(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (tmp_path / "one" / "modules.json").write_text(json.dumps(modules))
    plan_of(tmp_path, recipe)
    modules.append({"idx": 3, "type": "sentence_transformers.models.Dense"})
    (tmp_path / "one" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"tasks.one.kind: sts takes pooled .* also has sentence_transformers.models"):
        plan_of(tmp_path, recipe)
    for text, message in (("{}", r"modules.json: holds \{\}; expected a list"), ("[", "modules.json: not valid JSON")):
        (tmp_path / "one" / "modules.json").write_text(text)
        with pytest.raises(InputError, match=message):
            plan_of(tmp_path, recipe)


def test_encoders_without_a_pooler(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    for seed, name in enumerate(("base", "one", "two")):
        perturbed(BertForMaskedLM(bert_config()), seed, 0.1).save_pretrained(tmp_path / name)
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    network = BertForMaskedLM.from_pretrained(tmp_path / "one").bert
    found = read_json(plan.artifact("evaluate", "one/two") / "records.json")
    expected = [cosine(network, row["sentence1"], row["sentence2"]) for row in ROWS]
    assert [record["prediction"] for record in found] == pytest.approx(expected, abs=1e-6)
