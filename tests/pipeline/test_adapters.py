"""Adapters merged into adapters: against the merged weights, in peft, scored, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.card import card_text
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.report.results import collect
from sensmerge.pipeline.tracking.load import Merged, description
from sensmerge.pipeline.tracking.metrics import metrics_of
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.kernels.delta import CHUNK
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from tests.conftest import (
    do_job,
    do_steps,
    make_adapter,
    make_gpt2,
    make_llama,
    perturbed,
    plan_of,
    tiny_recipe,
    write_recipe,
)
from tests.here import run_here
from tests.hub_server import HubServer

SENS = {"kind": "sens", "temperature": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "coefficients": {"kind": "explicit", "weights": {"math": 0.3, "code": 0.9}}},
    "sens": {"method": "task_arithmetic", "weight": 0.6, "coefficients": SENS, "lines": {"first": 0.5, "last": 1}},
    "ties": {"method": "ties", "density": 0.5, "coefficients": SENS},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **SETTINGS,
    "linear-adapter": SETTINGS["linear"] | {"adapter": {}},
    "sens-adapter": SETTINGS["sens"] | {"adapter": {}},
    "sens-rank": SETTINGS["sens"] | {"adapter": {"rank": 3}},
    "ties-full": SETTINGS["ties"] | {"adapter": {"rank": 48}},
    "ties-rank": SETTINGS["ties"] | {"adapter": {"rank": 3}},
}
LORAS: dict[str, dict[str, Any]] = {
    "math": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    "code": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "v_proj"]},
}


def logits(network: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = network.eval()(input_ids=torch.arange(3, 43).view(2, 20)).logits
    return found


@pytest.fixture(scope="module")
def plan(save: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A recipe of two adapters that differ in all settings, which has run."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {"base": save(make_llama(), "base", folder)}
    for seed, (name, settings) in enumerate(LORAS.items(), 1):
        models[name] = make_adapter(make_llama(), folder / name, seed, task_type="CAUSAL_LM", **settings)
    recipe = tiny_recipe(models, folder) | {"merges": VARIANTS}
    path = write_recipe(folder, recipe)
    assert run_here(path, "--store", folder / "store") == 0
    return plan_of(folder, recipe)


@pytest.fixture(scope="module")
def report(plan: Plan) -> Report:
    return collect(plan)


def base_of(plan: Plan) -> PreTrainedModel:
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plan.models()["base"])
    return network


def deltas(plan: Plan, name: str) -> Mapping[str, Tensor]:
    """What a variant adds to the base, by tensor: of an adapter as our own reader has it."""
    base = open_base(plan.models()["base"])
    made = open_expert(plan.models()[name], base, name)
    return {tensor: made.delta(tensor) for tensor in base.weights}


@pytest.mark.parametrize("name", ["linear-adapter", "sens-adapter", "ties-full"])
def test_an_exact_one_is_the_merge(name: str, plan: Plan, report: Report) -> None:
    whole, adapter = name.partition("-")[0], plan.models()[name]
    expected, found = deltas(plan, whole), deltas(plan, name)
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=0, atol=1e-6)
    in_peft = PeftModel.from_pretrained(base_of(plan), adapter)
    torch.testing.assert_close(
        logits(in_peft), logits(AutoModelForCausalLM.from_pretrained(plan.models()[whole])), rtol=0, atol=1e-5
    )
    info = report.variants[name].adapter
    assert info is not None
    assert 0 <= info.error <= info.worst_error < 1e-5
    assert report.scores[name].keys() == report.scores[whole].keys()
    for task, metrics in report.scores[whole].items():
        for metric, score in metrics.items():
            assert report.scores[name][task][metric].value == pytest.approx(score.value, rel=1e-6, abs=1e-6)


def test_exact_factors_are_those_of_the_experts_side_by_side(plan: Plan) -> None:
    config = json.loads((plan.models()["linear-adapter"] / "adapter_config.json").read_text())
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in config["target_modules"] if ".0." in name}
    assert {name.rpartition(".")[2]: rank for name, rank in ranks.items()} == {
        "q_proj": 7,
        "up_proj": 4,
        "down_proj": 3,
        "v_proj": 3,
    }
    assert config["base_model_name_or_path"] == str(plan.models()["base"])


@pytest.mark.parametrize("name", ["sens-rank", "ties-rank"])
def test_of_a_rank_it_is_the_nearest_and_says_what_it_lacks(name: str, plan: Plan, report: Report) -> None:
    expected, found = deltas(plan, name.partition("-")[0]), deltas(plan, name)
    errors, squares = {}, 0.0
    for tensor, value in expected.items():
        values = torch.linalg.svdvals(value.double()) if value.dim() == 2 and bool(value.any()) else torch.zeros(4)
        lacking = float((value.double() - found[tensor].double()).norm())
        assert lacking == pytest.approx(float(values[3:].norm()), abs=1e-6)
        if bool(value.any()):
            errors[tensor], squares = lacking / float(value.double().norm()), squares + lacking**2
    info = report.variants[name].adapter
    assert info is not None
    assert info.rank == 3
    assert info.error == pytest.approx(
        squares**0.5 / sum(float(value.double().norm()) ** 2 for value in expected.values()) ** 0.5, rel=1e-4
    )
    assert info.worst == max(errors, key=lambda tensor: errors[tensor])
    assert info.worst_error == pytest.approx(errors[info.worst], rel=1e-4)
    config = json.loads((plan.models()[name] / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {})
    line = f"merges.{name}: {info}"
    assert line in report.notes
    assert f"of rank 3, lacks {info.error:.2g} of what the merge adds" in line


def test_peft_runs_it_with_its_own_tokenizer(plan: Plan) -> None:
    folder = plan.models()["ties-rank"]
    network = PeftModel.from_pretrained(base_of(plan), folder)
    merged = network.merge_and_unload().state_dict()
    for tensor, value in deltas(plan, "ties-rank").items():
        torch.testing.assert_close(
            merged[tensor], open_base(plan.models()["base"]).read(tensor) + value, rtol=0, atol=1e-6
        )
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(plan.models()["base"]).get_vocab()
    )


def test_mlflow_knows_what_it_lacks_and_how_it_is_loaded(plan: Plan, report: Report) -> None:
    info = report.variants["ties-rank"].adapter
    assert info is not None
    metrics = metrics_of(report, "ties-rank")
    assert (metrics["lacks/error"], metrics["lacks/worst_error"]) == (info.error, info.worst_error)
    assert metrics.keys() - metrics_of(report, "base").keys() == {"lacks/error", "lacks/worst_error"}
    merged = Merged.of(report, "ties-rank")
    assert (merged.loaders, merged.answers) == (["peft"], False)
    assert "PeftModel.from_pretrained(base" in description(merged, "1")
    card = card_text(plan, report, "ties-rank", "")
    assert "library_name: peft" in card
    assert str(info) in card


def test_it_is_the_same_for_any_number_of_groups(plan: Plan, tmp_path: Path) -> None:
    for name in ("sens-adapter", "ties-rank"):
        job: Any = plan.step("merge", name).job
        assert len(job.groups) == 1
        one_by_one = tuple(
            (tensor,) for group in layer_groups(job.base, 1) for tensor in group if tensor in job.adapted
        )
        again = do_job(type(job)(**{**vars(job), "groups": one_by_one}), made(tmp_path / name))
        manifest = json.loads((plan.models()[name] / "manifest.json").read_text())
        assert again["digest"] == manifest["result"]["digest"]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_weights_that_are_stored_transposed(save: Callable[..., Path], tmp_path: Path) -> None:
    models = {"base": save(make_gpt2(), "base", tmp_path)}
    for seed, name in enumerate(("math", "code"), 1):
        targets = ["c_attn", "c_fc"]
        models[name] = make_adapter(make_gpt2(), tmp_path / name, seed, target_modules=targets, fan_in_fan_out=True)
    ta = {"method": "task_arithmetic", "weight": 0.7}
    merges = {"ta": ta, "exact": ta | {"adapter": {}}, "svd": ta | {"adapter": {"rank": 8}}}
    plan = plan_of(tmp_path, tiny_recipe(models, tmp_path) | {"tasks": {}, "merges": merges})
    do_steps(plan)
    expected = logits(AutoModelForCausalLM.from_pretrained(plan.models()["ta"]))
    for name in ("exact", "svd"):
        found = logits(PeftModel.from_pretrained(base_of(plan), plan.models()[name]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tie", "saved"),
    [
        (False, {"math": ["norm"], "code": ["lm_head", "embed_tokens"]}),
        (True, {"math": ["embed_tokens"], "code": ["embed_tokens"]}),
    ],
)
def test_modules_that_experts_store_whole_are_merged_and_stored_whole(
    tie: bool, saved: dict[str, list[str]], save: Callable[..., Path], tmp_path: Path
) -> None:
    models = {"base": save(make_llama(tie_word_embeddings=tie), "base", tmp_path)}
    for seed, (name, modules) in enumerate(saved.items(), 1):
        network, settings = (
            make_llama(tie_word_embeddings=tie),
            {"modules_to_save": modules, "ensure_weight_tying": tie},
        )
        models[name] = make_adapter(network, tmp_path / name, seed, **settings, target_modules=["q_proj"])
    ties = {"method": "ties", "density": 0.6}
    merges = {"ties": ties, "adapter": ties | {"adapter": {"rank": 32}}}
    plan = plan_of(tmp_path, tiny_recipe(models, tmp_path) | {"tasks": {}, "merges": merges})
    do_steps(plan)
    expected = logits(AutoModelForCausalLM.from_pretrained(plan.models()["ties"]))
    found = PeftModel.from_pretrained(base_of(plan), plan.models()["adapter"])
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(base_of(plan)), expected, atol=1e-2)
    whole = deltas(plan, "ties")
    for tensor, value in deltas(plan, "adapter").items():
        torch.testing.assert_close(value, whole[tensor], rtol=0, atol=1e-6)


def test_tensors_of_several_pieces(save: Callable[..., Path], tmp_path: Path) -> None:
    large = {"intermediate_size": CHUNK // 16}  # times 32
    models = {"base": save(make_llama(**large), "base", tmp_path)}
    for seed, name in enumerate(("math", "code"), 1):
        models[name] = make_adapter(make_llama(**large), tmp_path / name, seed, target_modules=["q_proj", "up_proj"])
    ties = {"method": "ties", "density": 0.6}
    merges = {"ties": ties, "adapter": ties | {"adapter": {"rank": 32}}}
    plan = plan_of(tmp_path, tiny_recipe(models, tmp_path) | {"tasks": {}, "merges": merges})
    do_steps(plan)
    whole = deltas(plan, "ties")
    for tensor, value in deltas(plan, "adapter").items():
        torch.testing.assert_close(value, whole[tensor], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ties", "density": 0.5}, r"merges\.ta\.adapter\.rank is missing: method ties"),
        ({"method": "dare_linear", "density": [0.5, 1]}, r"merges\.ta\.adapter\.rank is missing: method dare_linear"),
        ({"method": "linear", "normalize": False}, r"merges\.ta: .*linear as it is set changes the base itself"),
        ({"method": "ties", "adapter": None}, "adapter: found null; expected {} for the defaults"),
        ({"method": "task_arithmetic", "shard_size": 5}, "no such shard_size: an adapter is one file"),
        ({"method": "ties", "normalize": False, "tune": {"density": [0.2, 1]}}, r"tune\.density may need one"),
        ({"method": "task_arithmetic", "calibrate": {}}, "no such calibrate"),
        ({"method": "task_arithmetic", "application": {"kind": "se"}}, "no such application: se needs whole weights"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(
    settings: dict[str, Any], said: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    models = {"base": llamas["base"]} | {
        name: make_adapter(make_llama(), tmp_path / name, seed) for seed, name in enumerate(("math", "code"), 1)
    }
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, tiny_recipe(models, tmp_path) | {"merges": {"ta": {"adapter": {}} | settings}})


def test_an_adapter_in_another_vocabulary_is_refused(llamas: dict[str, Path], tmp_path: Path) -> None:
    models = {"base": llamas["base"]} | {
        name: make_adapter(make_llama(), tmp_path / name, seed) for seed, name in enumerate(("math", "code"), 1)
    }
    recipe = tiny_recipe(models, tmp_path) | {"tasks": {}, "tokenizer": {"pad_to_multiple_of": 64}}
    with pytest.raises(InputError, match=r"merges\.ta\.adapter: merged models have another vocabulary than the base"):
        plan_of(tmp_path, recipe | {"merges": {"ta": {"method": "task_arithmetic", "adapter": {}}}})
    plan_of(tmp_path, recipe | {"merges": {"ta": {"method": "task_arithmetic"}}})


def test_an_adapter_of_a_folder_in_a_repository_is_refused(
    llamas: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    hub.add_repo("org/all", {f"base/{path.name}": path.read_bytes() for path in llamas["base"].iterdir()})
    models = {"base": llamas["base"]} | {
        name: make_adapter(make_llama(), tmp_path / name, seed) for seed, name in enumerate(("math", "code"), 1)
    }
    recipe = tiny_recipe(models, tmp_path) | {"tasks": {}, "base": {"model": "hub:org/all", "subfolder": "base"}}
    with pytest.raises(InputError, match=r"merges\.ta\.adapter: .* can say that its base is in base of org/all"):
        plan_of(tmp_path, recipe | {"merges": {"ta": {"method": "task_arithmetic", "adapter": {}}}})


@pytest.mark.parametrize(
    ("expert", "said"),
    [
        ("whole", r"experts\.code is a whole model; expected LoRA adapters"),
        (
            "saved",
            r"experts\.code stores model\.layers\.0\.self_attn\.q_proj\.weight whole \(modules_",
        ),
        ("embedding", r"experts\.code adapts model\.embed_tokens\.weight, .*: it is not the weight of a linear layer"),
        ("head", r"an expert unties what the base ties"),
        ("dora", r"experts\.code: .*use_dora = True cannot be handled"),
    ],
)
def test_an_expert_that_factors_cannot_hold_is_refused(
    expert: str, said: str, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    models = {"base": llamas["base"], "math": make_adapter(make_llama(), tmp_path / "math", 1)}
    changes: dict[str, dict[str, Any]] = {
        "saved": {"modules_to_save": ["q_proj"], "target_modules": ["up_proj"]},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "dora": {"use_dora": True},
    }
    if expert == "whole":
        models["code"] = save(perturbed(make_llama(), 2), "code", tmp_path)
    else:
        models["code"] = make_adapter(make_llama(), tmp_path / "code", 2, **changes[expert])
    merges = {"ta": {"method": "task_arithmetic", "adapter": {}}}
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, tiny_recipe(models, tmp_path) | {"merges": merges})
