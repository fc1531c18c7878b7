"""Whole recipes whose experts are saved in another form than their base."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from sensmerge.pipeline.report.results import unchanged
from sensmerge.tasks.checkpoints.checkpoint import WEIGHTS
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.serving.lease import held
from sensmerge.tasks.serving.scorer import Scorer
from tests.conftest import bert_config, do_steps, make_llama, perturbed, plan_of, write_rows

Save = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_an_expert_that_unties_its_base(
    llama_recipe: dict[str, Any], llamas: dict[str, Path], save: Save, tmp_path: Path
) -> None:
    """Static, sens and se merges hold embedding and head apart; the tied expert's embedding counts for both."""
    untied = make_llama(tie_word_embeddings=False)
    untied.load_state_dict(make_llama().state_dict())
    code = perturbed(untied, 7)
    llama_recipe["experts"]["code"]["model"] = str(save(code, "code", tmp_path))
    llama_recipe["merges"]["se"] = {
        "method": "task_arithmetic",
        "weight": 0.5,
        "application": {"kind": "se", "temperature": 1e6, "score": "centroid", "layer": 1, "pool": "mean"},
    }
    plan = plan_of(tmp_path, llama_recipe)
    assert any("experts.code has its own values for both" in note for note in plan.inputs.notes)
    do_steps(plan)

    base, math = (load_file(llamas[name] / "model.safetensors") for name in ("base", "math"))
    wanted = (math[EMBEDDING] + code.state_dict()[HEAD]) / 2
    for name in ("ta", "ties-sens"):
        folder = plan.artifact("merge", name)
        network, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(found.values())
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert network.lm_head.weight is not network.get_input_embeddings().weight
        if name == "ta":
            torch.testing.assert_close(network.lm_head.weight.detach(), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(wanted, base[EMBEDDING], atol=1e-3)
    sigma = json.loads((plan.artifact("merge", "ties-sens") / "coefficients.json").read_text())["sigma"]
    assert {"lm_head", "model.embed_tokens"} <= sigma.keys()

    static = AutoModelForCausalLM.from_pretrained(plan.artifact("merge", "ta")).eval()
    dynamic = DynamicModel.load(plan.artifact("route", "se"))
    ids = list(range(3, 20))
    with torch.no_grad():
        (logits,) = dynamic.logits([{"input_ids": ids}], dynamic.route([{"input_ids": ids}]))
        torch.testing.assert_close(logits[: len(ids)], static(torch.tensor([ids])).logits[0], rtol=0, atol=1e-4)


def test_an_expert_that_runs_with_the_settings_of_its_base(
    llama_recipe: dict[str, Any], llamas: dict[str, Path], tmp_path: Path
) -> None:
    """All that is measured and merged is what it would be if the expert's config were the base's."""
    folder = tmp_path / "code"
    shutil.copytree(llamas["code"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"], config["rms_norm_eps"] = 77.0, 0.1
    (folder / "config.json").write_text(json.dumps(config))
    alike = plan_of(tmp_path, llama_recipe, store="alike")
    llama_recipe["experts"]["code"]["model"] = str(folder)
    named = r"experts.code: .* rms_norm_eps 0.1 \(the base has .*, rope_parameters.rope_theta 77.0 .*\.config: base"
    with pytest.raises(InputError, match=named):
        plan_of(tmp_path, llama_recipe)
    plan = plan_of(tmp_path, llama_recipe, "experts.code.config=base")
    assert any("runs with the base's settings, not with its own" in note for note in plan.inputs.notes)
    for one in (alike, plan):
        do_steps(one)
    for stage, name, file in (
        ("statistics", "code", "sensitivity.json"),
        ("cross_task", "all", "distances.json"),
        ("merge", "ties-sens", "model.safetensors"),
        ("evaluate", "code/math", "scores.json"),
        ("evaluate", "code/code", "scores.json"),
    ):
        files = [one.artifact(stage, name) / file for one in (alike, plan)]  # type: ignore[arg-type]
        assert files[0].read_bytes() == files[1].read_bytes(), (stage, name)


def classifier(seed: int, scale: float, names: list[str]) -> PreTrainedModel:
    """A classifier whose classes are told apart by their texts."""
    network = perturbed(BertForSequenceClassification(bert_config(len(names))), seed, scale)
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: number for number, name in enumerate(names)}
    return network.eval()


@pytest.mark.parametrize("labels", ["names", "numbers"])
def test_classes_in_another_order_than_the_base(labels: str, save: Save, tokenizer: Any, tmp_path: Path) -> None:
    """The merged model has the base's order; rows keep the classes that they name, or number as their expert does."""
    ours, theirs = ["joy", "anger", "fear"], ["fear", "joy", "anger"]
    torch.manual_seed(0)
    base = classifier(0, 0.0, ours)
    expert, still = classifier(1, 0.5, theirs), copy.deepcopy(base)
    still.load_state_dict(base.state_dict())
    perturbed(still, 2, 1e-6)
    folders = {name: save(one, name, tmp_path) for name, one in {"base": base, "a": expert, "b": still}.items()}
    texts = [f"{number} is {number * number}" for number in range(40)]
    with torch.no_grad():
        found = [int(expert(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    assert len(set(found)) > 1
    rows: list[dict[str, object]] = [
        {"text": text, "label": theirs[one] if labels == "names" else one}
        for text, one in zip(texts, found, strict=True)
    ]
    data = {}
    for split, part in {"calibration": rows[:3], "evaluation": rows[3:]}.items():
        data[split] = {"path": "json", "data_files": write_rows(tmp_path / f"{split}.jsonl", part).name}
    still_rows = [{"text": "a", "label": "joy"}, {"text": "b", "label": 1}]
    other = {"path": "json", "data_files": write_rows(tmp_path / "b.jsonl", still_rows).name}
    recipe = {
        "name": "classes",
        "base": str(folders["base"]),
        "experts": {name: {"model": str(folders[name])} for name in "ab"},
        "tasks": {"a": {"kind": "classification", **data}, "b": {"kind": "classification", "calibration": other}},
        "merges": {
            "ta": {"method": "task_arithmetic"},
            "sens": {"method": "task_arithmetic", "coefficients": {"kind": "sens", "temperature": 0.3}},
        },
    }
    plan = plan_of(tmp_path, recipe)
    assert any("classes in another order" in note for note in plan.inputs.notes)
    do_steps(plan)
    for model in ("a", "ta"):
        scores = json.loads((plan.artifact("evaluate", f"{model}/a") / "scores.json").read_text())
        assert scores["accuracy"]["value"] == 1.0, model
    folder = plan.artifact("merge", "ta")
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert [merged.config.id2label[number] for number in range(3)] == ours
    assert not (folder / "heads").exists()
    with torch.no_grad():
        told = [int(merged(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    assert [ours[one] for one in told] == [theirs[one] for one in found]


def test_other_classes_stay_beside_a_merged_classifier(save: Save, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, expert = classifier(0, 0.0, ["joy", "anger"]), classifier(1, 0.5, ["spam", "ham"])
    models = {"base": base, "a": expert, "b": classifier(2, 0.02, ["joy", "anger"])}
    folders = {name: save(one, name, tmp_path) for name, one in models.items()}
    texts = [f"{number} is {number * number}" for number in range(8)]
    with torch.no_grad():
        found = [int(expert(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    rows: list[dict[str, object]] = [
        {"text": text, "label": ["spam", "ham"][one]} for text, one in zip(texts, found, strict=True)
    ]
    data = {"path": "json", "data_files": write_rows(tmp_path / "rows.jsonl", rows).name}
    recipe = {
        "name": "classes",
        "base": str(folders["base"]),
        "experts": {name: {"model": str(folders[name])} for name in "ab"},
        "tasks": {"a": {"kind": "classification", "evaluation": data}},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }
    plan = plan_of(tmp_path, recipe)
    assert any("a has other classes than the base: its head is kept apart" in note for note in plan.inputs.notes)
    do_steps(plan)
    scores = json.loads((plan.artifact("evaluate", "a/a") / "scores.json").read_text())
    assert scores["accuracy"]["value"] == 1.0
    folder = plan.artifact("merge", "ta")
    merged, head, theirs = (
        load_file(one) for one in (folder / WEIGHTS, folder / "heads/a/head.safetensors", folders["b"] / WEIGHTS)
    )
    torch.testing.assert_close(merged["classifier.weight"], theirs["classifier.weight"], rtol=0, atol=1e-6)
    assert torch.equal(head["classifier.weight"], expert.state_dict()["classifier.weight"])
    assert json.loads((folder / "heads/a/config.json").read_text())["id2label"] == {"0": "spam", "1": "ham"}


def test_experts_that_disagree_on_classes_that_the_base_does_not_name(save: Save, tmp_path: Path) -> None:
    placeholders = ["LABEL_0", "LABEL_1"]
    models = {"base": placeholders, "a": ["joy", "anger"], "b": ["anger", "joy"]}
    folders = {name: save(classifier(0, 0.02, names), name, tmp_path) for name, names in models.items()}
    recipe = {
        "name": "classes",
        "base": str(folders["base"]),
        "experts": {name: {"model": str(folders[name])} for name in "ab"},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }
    with pytest.raises(InputError, match=r"experts.b: .* are anger, joy, those of experts.a are joy, anger, and "):
        plan_of(tmp_path, recipe)
    config = json.loads((folders["base"] / "config.json").read_text())
    config |= {"id2label": {"0": "joy", "1": "anger"}, "label2id": {"joy": 0, "anger": 1}}
    (folders["base"] / "config.json").write_text(json.dumps(config))
    assert plan_of(tmp_path, recipe).inputs.experts["b"].own_classes == {0: "anger", 1: "joy"}


def test_statistics_are_the_experts_mean_and_stay_valid(tmp_path: Path) -> None:
    """λ · Σ (expert − base) would leave a negative variance; a mean of variances is one."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    torch.manual_seed(0)
    base = ResNetForImageClassification(config)
    experts = {name: perturbed(ResNetForImageClassification(config), seed) for seed, name in enumerate("ab")}
    for scale, network in enumerate(experts.values(), start=1):
        network.load_state_dict(base.state_dict())
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(0.1 * scale)
    for name, network in {"base": base, **experts}.items():
        network.save_pretrained(tmp_path / name)
    merges = {"ta": {"method": "task_arithmetic", "weight": 1.0}, "ties": {"method": "ties", "density": 0.5}}
    recipe = {
        "name": "vision",
        "base": str(tmp_path / "base"),
        "experts": {name: {"model": str(tmp_path / name)} for name in experts},
        "merges": merges,
    }
    plan = plan_of(tmp_path, recipe)
    assert any("statistics" in note for note in plan.inputs.notes)
    do_steps(plan)
    for name in merges:
        network, found = ResNetForImageClassification.from_pretrained(
            plan.artifact("merge", name), output_loading_info=True
        )
        assert not any(found.values())
        variances = [buffer for key, buffer in network.named_buffers() if key.endswith("running_var")]
        assert variances
        assert all(torch.allclose(variance, torch.tensor(0.15)) for variance in variances)


def test_an_expert_that_changes_nothing_is_named(
    llama_recipe: dict[str, Any], llamas: dict[str, Path], save: Save, tmp_path: Path
) -> None:
    """A copy of the base, and an adapter that was never trained."""
    llama_recipe["tasks"], llama_recipe["merges"] = {}, {"ta": {"method": "task_arithmetic", "weight": 0.5}}
    save(make_llama(), "copy", tmp_path, max_shard_size="40KB")
    get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "untrained")
    models = {"copy": tmp_path / "copy", "untrained": tmp_path / "untrained", "math": llamas["math"]}
    llama_recipe["experts"] = {name: {"model": str(folder)} for name, folder in models.items()}
    plan = plan_of(tmp_path, llama_recipe)
    do_steps(plan)
    folder = plan.artifact("merge", "ta")
    server = Scorer(str(folder), "cpu", None)
    assert [one.artifact for one in held(str(plan.store.root))] == [f"merge/{folder.name}"]
    del server
    assert unchanged(plan) == [
        f"experts.{name} changes nothing: all its weights are the base's" for name in ("copy", "untrained")
    ]


@pytest.mark.parametrize("network", [BertForTokenClassification, BertForQuestionAnswering])
def test_a_task_that_the_experts_head_cannot_do(
    network: type[PreTrainedModel], berts: dict[str, Path], save: Save, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    folder = save(network(bert_config()), "a", tmp_path)
    recipe = {
        "name": "heads",
        "base": str(berts["base"]),
        "experts": {name: {"model": str(one)} for name, one in {"a": folder, "mood": berts["mood"]}.items()},
        "tasks": {"a": {"kind": "classification", "evaluation": {"path": "json", "data_files": rows.name}}},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }
    with pytest.raises(InputError, match=rf"tasks.a.kind: classification, but .* is a {network.__name__}"):
        plan_of(tmp_path, recipe)
    recipe["tasks"] = {}
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    assert (plan.artifact("merge", "ta") / "heads" / "a" / "head.safetensors").is_file()


@pytest.mark.parametrize("first", ["tied", "untied"])
def test_one_store_for_experts_that_tie_and_untie_the_base(
    first: str, llama_recipe: dict[str, Any], llamas: dict[str, Path], save: Save, tmp_path: Path
) -> None:
    """What an earlier run measured of an expert is of a base that was tied, or was not: the merge is the same."""
    untied = make_llama(tie_word_embeddings=False)
    untied.load_state_dict(make_llama().state_dict())
    code = {"tied": llamas["code"], "untied": save(perturbed(untied, 7), "code", tmp_path)}
    llama_recipe["tasks"], llama_recipe["merges"] = {}, {"ties": {"method": "ties", "density": 0.3}}
    digests = {}
    for store in ("one", "fresh"):
        for name in [first, "untied" if first == "tied" else "tied"]:
            llama_recipe["experts"]["code"] = {"model": str(code[name])}
            plan = plan_of(tmp_path, llama_recipe, store="one" if store == "one" else f"fresh-{name}")
            do_steps(plan)
            digests[store, name] = load_file(plan.artifact("merge", "ties") / "model.safetensors")
    for name in code:
        one, fresh = digests["one", name], digests["fresh", name]
        assert one.keys() == fresh.keys()
        assert all(torch.equal(one[key], fresh[key]) for key in one)


def test_names_of_classes_that_the_base_lacks_are_the_experts(save: Save, tmp_path: Path) -> None:
    config = bert_config()
    base = BertForSequenceClassification(config)
    config.id2label, config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    experts = {}
    for seed, name in enumerate("ab"):
        expert = perturbed(BertForSequenceClassification(config), seed)
        experts[name] = {"model": str(save(expert, name, tmp_path))}
    base.config.id2label, base.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    merges = {"ta": {"method": "task_arithmetic"}}
    recipe = {"name": "x", "base": str(save(base, "base", tmp_path)), "experts": experts, "merges": merges}
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    merged = BertForSequenceClassification.from_pretrained(plan.artifact("merge", "ta"))
    assert merged.config.id2label == {0: "neg", 1: "pos"}
