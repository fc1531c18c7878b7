"""Plans: what they find from headers alone, and what makes a step run again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from transformers import (
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
)

from sensmerge.pipeline.plan.plan import Plan, plan_summary, plan_table
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.plan.steps import lay_out
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.earlier import EarlierArtifacts
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.arithmetic import Linear
from sensmerge.tasks.methods.contract import method_of
from sensmerge.tasks.stages.cross_task import CrossTaskJob
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.merge import MergeJob
from tests.census.networks import tiny_network
from tests.conftest import (
    bert_config,
    command_line,
    do_steps,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_llama,
    perturbed,
    plan_of,
    tiny_recipe,
    write_recipe,
    write_rows,
)
from tests.hub_server import HubServer
from tests.tasks.networks.test_causality import tiny

Recipe = dict[str, Any]


def fingerprints(plan: Plan) -> dict[str, str]:
    made = {step.title: step.key.fingerprint for step in plan.steps}
    return {title: made[maker] for title, maker in plan.makers.items() if maker in made}


def changed(before: Plan, after: Plan) -> set[str]:
    """Return the steps whose fingerprint differs."""
    old, new = fingerprints(before), fingerprints(after)
    return {title for title in old | new if old.get(title) != new.get(title)}


def test_steps_come_after_what_they_need(llama_recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, llama_recipe)
    seen: set[str] = set()
    for step in plan.steps:
        assert set(step.needs) <= seen
        seen.add(step.title)
    assert len(plan.steps) == len(seen) == 3 + 2 + 1 + 2 + 5 * 2


def test_steps_of_equal_content_are_steps_of_their_own(llama_recipe: Recipe, tmp_path: Path) -> None:
    llama_recipe["merges"]["again"] = {"method": "task_arithmetic", "weight": 0.5, "lambda": 1.0}
    llama_recipe["tasks"]["code"] = llama_recipe["tasks"]["math"]
    plan = plan_of(tmp_path, llama_recipe)
    assert set(plan.todo) == {step.title for step in plan.steps}
    assert len({plan.store.folder(step.key) for step in plan.steps}) == len(plan.steps) == len(plan.todo)


def test_order_of_layer_patterns_counts(llama_recipe: Recipe, tmp_path: Path) -> None:
    def plan_with(patterns: dict[str, float]) -> Plan:
        weights = {"math": patterns, "code": 1.0}
        llama_recipe["merges"] = {"e": {"method": "ties", "coefficients": {"kind": "explicit", "weights": weights}}}
        return plan_of(tmp_path, llama_recipe)

    one, other = plan_with({"*": 0.1, "model.norm": 0.9}), plan_with({"model.norm": 0.9, "*": 0.1})
    assert "merge e" in changed(one, other)


@pytest.mark.parametrize("coefficients", [{}, {"coefficients": {"kind": "sens"}}])
def test_tensors_that_no_filter_fits_are_found(
    coefficients: dict[str, Any], llama_recipe: Recipe, tmp_path: Path
) -> None:
    setting = {"method": "ties", "density": [{"filter": "mlp", "value": 0.5}]}
    llama_recipe["merges"]["f"] = setting | coefficients
    with pytest.raises(InputError, match=r"merges\.f: density: no filter fits tensor model\.embed_tokens\.weight"):
        plan_of(tmp_path, llama_recipe)


def test_weights_of_a_layer_that_a_method_refuses_are_found(llama_recipe: Recipe, tmp_path: Path) -> None:
    weights = {"math": 1.0, "code": {"*": 1.0, "model.norm": -1.0}}
    llama_recipe["merges"] = {"e": {"method": "linear", "coefficients": {"kind": "explicit", "weights": weights}}}
    with pytest.raises(InputError, match=r"merges\.e: layer model\.norm: the weights sum to 0, which linear"):
        plan_of(tmp_path, llama_recipe)


def test_a_weight_that_changes_nothing_is_said(llamas: dict[str, Path], tmp_path: Path) -> None:
    merges: dict[str, dict[str, Any]] = {
        "ties": {"method": "ties", "weight": 0.5},
        "sums": {"method": "ties", "weight": 0.5, "normalize": False},
        "one": {"method": "ties"},
        "none": {"method": "ties", "weight": 0.0},
        "arc": {"method": "nuslerp", "weight": 0.3},
        "sphere": {"method": "multislerp", "weight": 2.0},
        "scaled": {"method": "multislerp", "weight": 2.0, "normalize_weights": False},
    }
    recipe = tiny_recipe(llamas, tmp_path) | {"merges": merges, "tasks": {}}
    plan = plan_of(tmp_path, recipe)
    said = "as it is set divides weights by their sum; leave it out"
    assert [note for note in plan.inputs.notes if "changes nothing" in note] == [
        f"merges.ties.weight: 0.5 changes nothing, for ties {said}, or set normalize: false",
        f"merges.arc.weight: 0.3 changes nothing, for nuslerp {said}",
        f"merges.sphere.weight: 2 changes nothing, for multislerp {said}, or set normalize_weights: false",
    ]
    do_steps(plan)
    digests = {name: plan.store.manifest(plan.step("merge", name).key)["result"]["digest"] for name in merges}
    assert digests["ties"] == digests["one"]
    assert len({digests[name] for name in ("ties", "sums", "none")}) == 3


def test_right_choices_are_part_of_a_calibration(llama_recipe: Recipe, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "choices": ["b", "c"], "answer": 0, "other": 1}] * 3
    write_rows(tmp_path / "choices.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [row | {"prompt": "z"} for row in rows])
    data, test = ({"path": "json", "data_files": f"{name}.jsonl"} for name in ("choices", "test"))
    llama_recipe["tasks"]["math"] = {"kind": "multiple_choice", "calibration": data, "evaluation": test}
    before = plan_of(tmp_path, llama_recipe)
    touched = changed(before, plan_of(tmp_path, llama_recipe, "tasks.math.answer=other"))
    assert {"statistics math", "cross_task all", "evaluate base/math"} <= touched


def test_weights_that_left_the_hub_cache_are_fetched_again_when_they_are_read(
    hub: HubServer, llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path
) -> None:
    on_hub(hub, "team/math", llamas["math"])
    llama_recipe["experts"]["math"]["model"] = "hub:team/math"
    plan = plan_of(tmp_path, llama_recipe)
    for step in plan.steps:
        plan.store.partial(step.key).mkdir(parents=True)
        plan.store.publish(step.key, {"result": {}})
    assert plan_of(tmp_path, llama_recipe).todo == {}
    changed = plan_of(tmp_path, llama_recipe, "merges.ta.weight=0.4").todo
    assert changed["download math"] == "files are gone"
    assert set(changed) == {"download math", "merge ta", "evaluate ta/math", "evaluate ta/code"}


def test_without_sens_coefficients_nothing_is_estimated(llama_recipe: Recipe, tmp_path: Path) -> None:
    del llama_recipe["merges"]["ties-sens"]
    stages = {step.stage for step in plan_of(tmp_path, llama_recipe).steps}
    assert stages == {"download", "merge", "evaluate"}


def test_magnitudes_are_counted_once_for_several_merges_that_read_them(llama_recipe: Recipe, tmp_path: Path) -> None:
    ties = {"method": "ties", "density": 0.5}

    def counted(**merges: Any) -> list[tuple[str, ...]]:
        plan = plan_of(tmp_path, {**llama_recipe, "merges": merges})
        titles = {step.title for step in plan.steps}
        assert all(set(step.needs) <= titles for step in plan.steps)
        assert ("task_vectors math" in titles) == ("task_vectors code" in titles)
        return [step.needs for step in plan.steps if "task_vectors math" in step.needs]

    assert counted(a=ties) == counted(a=ties, b={"method": "ties"}) == counted(a={"method": "dare_ties"}) == []
    assert len(counted(a=ties, b={**ties, "density": {"math": 1.0, "code": 0.2}})) == 2
    assert len(counted(a={**ties, "normalize": False, "tune": {"weight": [0.1, 0.2]}})) == 2  # to try, and to merge
    assert len(counted(a={"method": "ties", "tune": {"density": [0.1, 1.0]}})) == 2


def test_one_more_variant_costs_its_own_merge_and_scores(llama_recipe: Recipe, tmp_path: Path) -> None:
    ties = {"method": "ties", "density": 0.5}
    merges = {"a": ties, "b": {**ties, "density": 0.4}}
    plan = plan_of(tmp_path, {**llama_recipe, "merges": merges})
    for step in plan.steps:
        plan.store.partial(step.key).mkdir(parents=True)
        plan.store.publish(step.key, {"result": {}})
    again = plan_of(tmp_path, {**llama_recipe, "merges": merges})
    assert again.todo == {}
    # What was counted is read as long as it is whole; it is not counted again for one merge.
    more = {**llama_recipe, "merges": {**merges, "c": {**ties, "density": 0.2}}}
    job = plan_of(tmp_path, more).step("merge", "c").job
    assert isinstance(job, MergeJob)
    assert job.task_vectors["math"].folder == again.artifact("task_vectors", "math")
    (again.artifact("task_vectors", "math") / "fingerprint.json").write_text("{}")
    damaged = plan_of(tmp_path, more)
    job = damaged.step("merge", "c").job
    assert isinstance(job, MergeJob)
    assert job.task_vectors == {}
    assert set(damaged.todo) == {"merge c", "evaluate c/math", "evaluate c/code"}
    for method in ({**ties, "density": 0.3}, {"method": "linear"}):
        more = plan_of(tmp_path, {**llama_recipe, "merges": {**merges, "c": method}})
        assert set(more.todo) == {"merge c", "evaluate c/math", "evaluate c/code"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("resources.merge.max_in_flight=1", set()),
        ("tasks.math.batch_size=2", set()),
        ("tasks.math.metric=perplexity", set()),
        ("merges.ta.weight=0.4", {"merge ta", "evaluate ta/math", "evaluate ta/code"}),
        (
            "merges.ties-sens.coefficients.temperature=1",
            {"merge ties-sens", "evaluate ties-sens/math", "evaluate ties-sens/code"},
        ),
        (
            "tasks.math.evaluation.samples=5",
            {f"evaluate {model}/math" for model in ("base", "math", "code", "ta", "ties-sens")},
        ),
        (
            "tasks.math.calibration.samples=2",
            {
                *("statistics math", "cross_task all", "merge ties-sens"),
                *("evaluate ties-sens/math", "evaluate ties-sens/code"),
            },
        ),
    ],
)
def test_what_a_setting_changes(llama_recipe: Recipe, tmp_path: Path, override: str, expected: set[str]) -> None:
    assert changed(plan_of(tmp_path, llama_recipe), plan_of(tmp_path, llama_recipe, override)) == expected


def test_fingerprints_depend_on_content_and_on_no_path(
    llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    before = plan_of(tmp_path, llama_recipe)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("math", "code"):
        shutil.copytree(llamas[name], elsewhere / f"model-{name}")
        llama_recipe["experts"][name]["model"] = f"model-{name}"
        for split, file in (("calibration", f"{name}.jsonl"), ("evaluation", f"{name}-test.jsonl")):
            shutil.copy(tmp_path / file, elsewhere / f"rows-{file}")
            llama_recipe["tasks"][name][split]["data_files"] = f"rows-{file}"
    assert fingerprints(plan_of(elsewhere, llama_recipe)) == fingerprints(before)


def test_a_changed_expert_changes_only_what_reads_it(llama_recipe: Recipe, save: Any, tmp_path: Path) -> None:
    before = plan_of(tmp_path, llama_recipe)
    llama_recipe["experts"]["math"]["model"] = str(save(perturbed(make_llama(), 9), "math"))
    touched = changed(before, plan_of(tmp_path, llama_recipe))
    assert {"download math", "statistics math", "cross_task all", "merge ta"} <= touched
    assert not {"download code", "statistics code", "evaluate base/math"} & touched


def test_whose_settings_an_expert_runs_with_changes_what_runs_it(llama_recipe: Recipe, tmp_path: Path) -> None:
    """The files are the same: a later version may tell apart more settings than the one that filled the store."""
    before = plan_of(tmp_path, llama_recipe)
    assert changed(before, plan_of(tmp_path, llama_recipe, "experts.code.config=base")) == set()
    experts = {name: replace(one, base_config=True) for name, one in before.inputs.experts.items()}
    after = {
        step.title: step.key for step in lay_out(replace(before, inputs=replace(before.inputs, experts=experts)))[0]
    }
    assert {step.title for step in before.steps if after[step.title] != step.key} == {
        "statistics math",
        "statistics code",
        "cross_task all",
        "merge ties-sens",
        *(f"evaluate {one}/{task}" for one in ("math", "code", "ties-sens") for task in ("math", "code")),
    }


def test_table_says_run_and_why(llama_recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, llama_recipe)
    assert plan_summary(plan).startswith("tiny: 18 of 18 steps to run, ")
    rows = list(zip(*(column.cells for column in plan_table(plan).columns), strict=True))
    assert rows[0][:4] == ("download", "base", "RUN", "new")
    assert len(rows) == 13  # a row for each of the five models' evaluations
    reads, writes = (
        sum(getattr(step, what) for step in plan.steps if step.title.startswith("evaluate ta/"))
        for what in ("reads", "writes")
    )
    assert rows[-2] == ("evaluate", "ta: math, code", "RUN", "new", decimal(reads), decimal(writes))


def test_what_two_variants_have_in_common_is_made_once(llama_recipe: Recipe, tmp_path: Path) -> None:
    other, with_other = {"method": "task_arithmetic", "weight": 0.3}, dict(llama_recipe)
    with_other["merges"] = llama_recipe["merges"] | {"ta": other, "again": other | {"application": {"kind": "static"}}}
    plan = plan_of(tmp_path, with_other)
    without = plan_of(tmp_path, llama_recipe | {"merges": llama_recipe["merges"] | {"ta": other}})
    assert fingerprints(plan)["merge again"] == fingerprints(plan)["merge ta"]
    assert [step.title for step in plan.steps] == [step.title for step in without.steps]
    assert plan.artifact("merge", "again") == plan.artifact("merge", "ta")
    assert plan.artifact("evaluate", "again/math") == plan.artifact("evaluate", "ta/math")
    rows = list(zip(*(column.cells for column in plan_table(plan).columns), strict=True))
    assert ("evaluate", "again: math, code", "SAME", "as evaluate ta", "", "") in rows


def test_a_variant_under_another_name_costs_nothing(llama_recipe: Recipe, tmp_path: Path) -> None:
    before = plan_of(tmp_path, llama_recipe)
    do_steps(before)
    renamed = {f"my-{name}": one for name, one in llama_recipe["merges"].items()}
    plan = plan_of(tmp_path, llama_recipe | {"merges": renamed})
    assert plan.artifact("merge", "my-ta") == before.artifact("merge", "ta")
    assert plan.step("merge", "my-ta").title == "merge my-ta"
    assert "merge my-ta" not in plan.todo
    (before.artifact("merge", "ta") / "manifest.json").write_text('{"files": {}, "name": "../ta", "fingerprint": ""}')
    plan = plan_of(tmp_path, llama_recipe | {"merges": renamed})
    assert plan.todo["merge my-ta"] == "new"


def on_hub(hub: HubServer, repo: str, folder: Path, **files: bytes) -> None:
    hub.add_repo(repo, {path.name: path.read_bytes() for path in folder.iterdir()} | files)


def test_hub_models_are_checked_before_their_weights_are_fetched(
    hub: HubServer, llama_recipe: Recipe, llamas: dict[str, Path], save: Any, tmp_path: Path
) -> None:
    for name in ("base", "math", "code"):
        on_hub(hub, f"team/{name}", llamas[name])
    recipe = {**llama_recipe, "base": "hub:team/base"}
    recipe["experts"] = {name: {"model": f"hub:team/{name}@main"} for name in ("math", "code")}
    plan = plan_of(tmp_path, recipe)
    assert len(plan.todo) == len(plan.steps)
    assert not list(plan.inputs.listings["math"].folder.glob("*.safetensors"))
    assert all(request.range is not None for request in hub.fetched("model.safetensors"))

    on_hub(hub, "team/code", save(make_llama(intermediate_size=64), "wide"))
    with pytest.raises(InputError, match=r"experts.code: .* has intermediate_size 64, the base has 48"):
        plan_of(tmp_path, recipe)


def test_hub_weights_that_must_be_compared_are_fetched_for_the_plan(
    hub: HubServer, llama_recipe: Recipe, llamas: dict[str, Path], save: Any, tmp_path: Path
) -> None:
    """Two tensors stand for what the config ties: only their values tell whether it is one parameter or two."""
    folder = save(make_llama(5), "apart", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    on_hub(hub, "team/apart", folder)
    llama_recipe["experts"]["math"]["model"] = "hub:team/apart"
    plan = plan_of(tmp_path, llama_recipe)
    assert plan.inputs.base.untied
    assert any("experts.math has its own values for both" in note for note in plan.inputs.notes)
    llama_recipe["merges"]["x"] = {"method": "regmean"}
    message = r"merges\.x\.method: regmean reads gram of each tensor, but not all experts tie their embedding and head"
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, llama_recipe)


def test_sharded_hub_model_is_checked_by_its_headers(
    hub: HubServer, llama_recipe: Recipe, llamas: dict[str, Path], save: Any, tmp_path: Path
) -> None:
    sharded = save(perturbed(make_llama(), 1), "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    on_hub(hub, "team/math", sharded)
    llama_recipe["experts"]["math"]["model"] = "hub:team/math"
    plan = plan_of(tmp_path, llama_recipe)
    assert set(plan.inputs.experts["math"].own) == set(plan.inputs.base.weights)


def test_yaml_anchors_are_allowed(llama_recipe: Recipe, tmp_path: Path) -> None:
    text = yaml.safe_dump({**llama_recipe, "tasks": {}, "merges": {}}, sort_keys=False)
    text = text.replace("tasks: {}\nmerges: {}\n", "")
    text += "merges:\n  a: &a {method: ties, density: 0.5}\n  b: {<<: *a, density: 0.2}\n"
    (tmp_path / "r.yaml").write_text(text)
    merges = load_recipe(tmp_path / "r.yaml").merges
    assert [merges[name].method for name in "ab"] == [
        method_of({"method": "ties", "density": density}) for density in (0.5, 0.2)
    ]


def test_classification_heads_are_part_of_what_is_scored(berts: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": "abc", "label": 0}, {"text": "xyz", "label": 1}]
    write_rows(tmp_path / "rows.jsonl", rows)
    task = {"kind": "classification", "evaluation": {"path": "json", "data_files": "rows.jsonl"}}
    recipe = {
        "name": "encoders",
        "base": str(berts["base"]),
        "experts": {name: {"model": str(berts[name])} for name in ("mood", "topic")},
        "tasks": {"mood": task, "topic": task},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }
    plan = plan_of(tmp_path, recipe)
    inputs = plan.step("evaluate", "ta/topic").key.inputs
    assert inputs["head"]["fingerprint"] == plan.step("download", "topic").key.fingerprint
    # A head's network is loaded in the dtype of the merged trunk, whatever its expert's config says.
    own = json.loads((berts["topic"] / "config.json").read_text())
    merge = plan.step("merge", "ta").job
    assert isinstance(merge, MergeJob)
    kept = json.loads(merge.head_configs["topic"])
    assert "dtype" in own
    assert "dtype" not in kept
    assert kept["id2label"] == own["id2label"]


@pytest.mark.parametrize("kind", ["completion", "multiple_choice", "lm_eval"])
def test_kinds_that_have_no_meaning_for_a_network(kind: str, save: Callable[..., Path], tmp_path: Path) -> None:
    networks = {
        r"\(bert\) lets every token see those after it .is_decoder is false.": BertForMaskedLM(bert_config()),
        r"\(bart\) is an encoder-decoder, of which the decoder alone": BartForConditionalGeneration(tiny("bart")),
        "transformers has no causal_lm network for model_type 'modernbert'": ModernBertForMaskedLM(
            ModernBertConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                pad_token_id=2,
            )
        ),
    }
    rows = {"evaluation": {"path": "json", "data_files": "rows.jsonl"}}
    task = {"kind": kind} | ({"names": ["arc_easy"]} if kind == "lm_eval" else rows)
    for number, (message, network) in enumerate(networks.items()):
        base, math, code = (str(save(perturbed(network, seed), f"{number}-{seed}", tmp_path)) for seed in range(3))
        recipe = {
            "name": "meaningless",
            "base": base,
            "experts": {"math": {"model": math}, "code": {"model": code}},
            "tasks": {"math": task},
            "merges": {"ta": {"method": "task_arithmetic"}},
        }
        with pytest.raises(InputError, match=message) as caught:
            plan_of(tmp_path, recipe)
        assert str(caught.value).startswith(f"tasks.math.kind: {kind} needs a language model")


# Application se -------------------------------------------------------------------------------------------------------


@pytest.fixture
def se_recipe(llama_recipe: Recipe) -> Recipe:
    """The static variants, and one that is applied by sample."""
    ta = llama_recipe["merges"]["ta"]
    return {**llama_recipe, "merges": {**llama_recipe["merges"], "se": {**ta, "application": {"kind": "se"}}}}


def test_a_merge_on_a_gpu_is_the_same_merge(llama_recipe: Recipe, se_recipe: Recipe, tmp_path: Path) -> None:
    override = "resources.merge.num_gpus=0.5"
    before, after = plan_of(tmp_path, llama_recipe), plan_of(tmp_path, llama_recipe, override)
    jobs = [plan.step("merge", "ta").job for plan in (before, after)]
    assert [job.device for job in jobs if isinstance(job, MergeJob)] == ["cpu", "cuda"]
    assert fingerprints(before) == fingerprints(after)
    with pytest.raises(InputError, match=r"merges\.se: application se from the base .* set application\.origin"):
        plan_of(tmp_path, se_recipe, override)
    plan_of(tmp_path, se_recipe, override, "merges.se.application.origin=static")


def test_a_dynamic_variant_has_a_route_and_one_evaluation(se_recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, se_recipe)
    titles = [step.title for step in plan.steps]
    assert [title for title in titles if title.split()[1].startswith("se")] == ["merge se", "route se", "evaluate se"]
    assert plan.step("route", "se").needs == ("merge se",)
    assert plan.step("evaluate", "se").needs == ("route se",)
    seen: set[str] = set()
    for step in plan.steps:
        assert set(step.needs) <= seen
        seen.add(step.title)
    assert plan.models()["se"] == plan.artifact("route", "se")
    assert plan.models()["ta"] == plan.artifact("merge", "ta")
    # Base and two full experts at most, and nothing that is written twice.
    whole = sum(file.size for file in plan.inputs.listings["base"].files if file.name.endswith(".safetensors"))
    assert 2.5 * whole < plan.step("merge", "se").writes < 3.1 * whole
    assert plan.step("route", "se").writes == 0


def test_a_static_variant_does_not_depend_on_dynamic_ones(
    llama_recipe: Recipe, se_recipe: Recipe, tmp_path: Path
) -> None:
    touched = changed(plan_of(tmp_path, llama_recipe), plan_of(tmp_path, se_recipe))
    assert touched == {"merge se", "route se", "evaluate se"}


def test_without_evaluation_rows_a_dynamic_variant_is_routed_only(se_recipe: Recipe, tmp_path: Path) -> None:
    for task in se_recipe["tasks"].values():
        del task["evaluation"]
    assert {step.stage for step in plan_of(tmp_path, se_recipe).steps if step.name == "se"} == {"merge", "route"}


ROUTED = {"route se", "evaluate se"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("merges.se.application.temperature=0.5", ROUTED),
        ("merges.se.application.mass=1.0", ROUTED),
        ("merges.se.application.layer=1", ROUTED),
        ("merges.se.application.fallback=0.5", ROUTED),
        ("merges.se.application.score=nearest", ROUTED),
        ("merges.se.weight=0.25", {"merge se"} | ROUTED),
        ("merges.se.method=dare_linear", {"merge se"} | ROUTED),
        ("tasks.math.batch_size=3", set()),
        ("resources.route.max_in_flight=2", set()),
        (
            "tasks.code.evaluation.samples=4",
            {"evaluate se", *(f"evaluate {model}/code" for model in ("base", "math", "code", "ta", "ties-sens"))},
        ),
        (
            "tasks.code.calibration.samples=2",
            {
                *("statistics code", "cross_task all", "merge ties-sens"),
                *("evaluate ties-sens/math", "evaluate ties-sens/code"),
            }
            | ROUTED,
        ),
        ("merges.se.application.kind=static", {"merge se", "evaluate se/math", "evaluate se/code"} | ROUTED),
    ],
)
def test_what_a_setting_changes_in_a_dynamic_variant(
    se_recipe: Recipe, tmp_path: Path, override: str, expected: set[str]
) -> None:
    assert changed(plan_of(tmp_path, se_recipe), plan_of(tmp_path, se_recipe, override)) == expected


def test_dtype_is_that_of_routes_and_not_of_task_vectors(se_recipe: Recipe, tmp_path: Path) -> None:
    touched = changed(plan_of(tmp_path, se_recipe), plan_of(tmp_path, se_recipe, "dtype=bfloat16"))
    assert touched >= ROUTED
    assert "merge se" not in touched


@pytest.mark.parametrize("layer", [0, -1, 3])
def test_a_layer_that_the_model_lacks(layer: int, se_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"^merges\.se\.application\.layer is {layer}; the model has 2 blocks, 1 to 2"
    ):
        plan_of(tmp_path, se_recipe, f"merges.se.application.layer={layer}")


def test_bad_layers_end_the_command_with_status_2(
    se_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, se_recipe)
    arguments = ("plan", path, "--store", tmp_path / "store", "--set", "merges.se.application.layer=9")
    assert command_line(*arguments) == 2
    assert "merges.se.application.layer is 9" in capsys.readouterr().err


SIZES: dict[str, Any] = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2}
WRITTEN: dict[str, tuple[Any, str]] = {
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4, expand=2)),
        "of MambaForCausalLM, backbone.layers.*.mixer.A_log, backbone.layers.*.mixer.D, "
        "backbone.layers.*.mixer.conv1d.bias and 5 more have no linear form",
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(
            MixtralConfig(
                **SIZES,
                intermediate_size=16,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
                max_position_embeddings=128,
            )
        ),
        "of MixtralForCausalLM, model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj, "
        "model.layers.*.mlp.gate.weight have no linear form",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_has_no_linear_form_is_said(name: str, se_recipe: Recipe, save: Any, tmp_path: Path) -> None:
    build, expected = WRITTEN[name]

    def network() -> PreTrainedModel:
        torch.manual_seed(0)
        made: PreTrainedModel = build()
        return made

    se_recipe["base"] = str(save(network(), "base", tmp_path))
    for seed, expert in enumerate(("math", "code"), 1):
        se_recipe["experts"][expert]["model"] = str(save(perturbed(network(), seed), expert, tmp_path))
    (note,) = [note for note in plan_of(tmp_path, se_recipe).inputs.notes if note.startswith("merges.se.application")]
    assert note.startswith(f"merges.se.application: {expected} and are written out for every distinct row")
    static = plan_of(tmp_path, se_recipe, "merges.se.application={kind: static}").inputs.notes
    assert not any("written out" in note for note in static)


def test_networks_that_se_cannot_run(se_recipe: Recipe, save: Any, tmp_path: Path) -> None:
    name = "ProphetNetForCausalLM"
    se_recipe["base"] = str(save(tiny_network(name), "base", tmp_path))
    for seed, expert in enumerate(("math", "code"), 1):
        se_recipe["experts"][expert]["model"] = str(save(perturbed(tiny_network(name), seed), expert, tmp_path))
    message = (
        rf"^merges\.se\.application: {name} cannot be run with coefficients per sample \(.*\); "
        r"use application: \{kind: static\}$"
    )
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, se_recipe)


def classifiers(folder: Path, base: Path, experts: dict[str, Path]) -> Recipe:
    """A recipe for classifiers of 2 and 3 classes."""
    tasks = {}
    for name, labels in (("mood", 2), ("topic", 3)):
        write_rows(folder / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i % labels} for i in range(6)])
        tasks[name] = {"kind": "classification", "calibration": {"path": "json", "data_files": f"{name}.jsonl"}}
    return {
        "name": "classes",
        "base": str(base),
        "experts": {name: {"model": str(path)} for name, path in experts.items()},
        "tasks": tasks,
        "merges": {"se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}},
    }


def test_trunk_that_the_experts_do_not_share(save: Any, berts: dict[str, Path], tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    masked = BertForMaskedLM(bert_config())  # saved without a pooler
    masked.bert.load_state_dict(trunk.state_dict(), strict=False)
    experts = {name: berts[name] for name in ("mood", "topic")}
    recipe = classifiers(tmp_path, save(masked, "base", tmp_path), experts)
    with pytest.raises(InputError, match=r"experts.mood has bert.pooler\S+, which the base lacks.*{kind: static}"):
        plan_of(tmp_path, recipe)


def test_heads_of_which_some_are_merged(save: Any, berts: dict[str, Path], tmp_path: Path) -> None:
    network = make_bert_expert(make_bert_trunk(), 5, 2)
    base = save(network, "base", tmp_path)
    recipe = classifiers(
        tmp_path, base, {"mood": save(perturbed(network, 1), "mood", tmp_path), "topic": berts["topic"]}
    )
    with pytest.raises(InputError, match=r"experts.topic has its own head, but the head of experts.mood is merged"):
        plan_of(tmp_path, recipe)


def test_prompt_that_cannot_be_routed_by(se_recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "math.jsonl", [{"prompt": "", "completion": "1"} for _ in range(12)])
    with pytest.raises(InputError, match=r"tasks.math.calibration: line 4 of .*/math.jsonl: the prompt has no token"):
        plan_of(tmp_path, se_recipe)
    assert plan_of(tmp_path, se_recipe, "merges.se.application={kind: static}").steps


def test_size_of_adapters_is_that_of_their_factors(se_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path) -> None:
    for seed, expert in enumerate(("math", "code"), 1):
        folder = make_adapter(make_llama(), tmp_path / expert, seed, target_modules=["q_proj"], task_type="CAUSAL_LM")
        se_recipe["experts"][expert]["model"] = str(folder)
    plan = plan_of(tmp_path, se_recipe)
    files = [llamas["base"] / "model.safetensors", *tmp_path.glob("*/adapter_model.safetensors")]
    assert plan.step("merge", "se").writes == sum(file.stat().st_size for file in files)


def two_texts(folder: Path, name: str, first: str, second: str) -> dict[str, str]:
    """Write a data set of two texts, a class each, and return what a recipe says of it."""
    write_rows(folder / f"{name}.jsonl", [{"text": first, "label": 0}, {"text": second, "label": 1}])
    return {"path": "json", "data_files": f"{name}.jsonl"}


def test_a_dynamic_variant_of_classifiers(berts: dict[str, Path], tmp_path: Path) -> None:
    data, test = two_texts(tmp_path, "rows", "abc", "xyz"), two_texts(tmp_path, "test", "abd", "xyw")
    task = {"kind": "classification", "calibration": data, "evaluation": test}
    recipe = {
        "name": "encoders",
        "base": str(berts["base"]),
        "experts": {name: {"model": str(berts[name])} for name in ("mood", "topic")},
        "tasks": {"mood": task, "topic": task},
        "merges": {"se": {"method": "ties", "density": 0.3, "application": {"kind": "se"}}},
    }
    plan = plan_of(tmp_path, recipe)
    assert plan.step("evaluate", "se").key.inputs["evaluation"]["topic"]["label2id"] == {
        f"LABEL_{i}": i for i in range(3)
    }
    assert "evaluate base/mood" in {step.title for step in plan.steps}


@pytest.mark.parametrize("damage", ["none", "gone", "other content"])
def test_what_heads_read_is_looked_for_in_the_last_evaluation(
    damage: str, berts: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    data, test = two_texts(tmp_path, "rows", "abc", "xyz"), two_texts(tmp_path, "test", "abd", "xyw")
    recipe: Recipe = {
        "name": "encoders",
        "base": str(berts["base"]),
        "experts": {name: {"model": str(berts[name])} for name in ("mood", "topic")},
        "tasks": {"mood": {"kind": "classification", "calibration": data, "evaluation": test}},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }

    def planned() -> tuple[Step, EvaluateJob]:
        step = plan_of(tmp_path, recipe).step("evaluate", "base/mood")
        assert isinstance(step.job, EvaluateJob)
        return step, step.job.resumed(EarlierArtifacts(store, step.key))

    store = Store(tmp_path / "store")
    step, job = planned()
    assert job.earlier is None
    store.partial(step.key).mkdir(parents=True)
    (store.partial(step.key) / "records.json").write_text("[]")
    store.publish(step.key, {"result": {}})
    # Another head for the task: the base's trunk gives what it gave before.
    network = BertForSequenceClassification.from_pretrained(berts["mood"])
    recipe["experts"]["mood"]["model"] = str(save(perturbed(network, 7), "other", tmp_path))
    file = store.folder(step.key) / "records.json"
    if damage == "gone":
        file.unlink()
    elif damage != "none":
        file.write_text("{}")
    again, changed = planned()
    assert again.key.fingerprint != step.key.fingerprint
    assert changed.earlier == (store.folder(step.key) if damage == "none" else None)
    assert changed.trunk() == job.trunk() is not None


@pytest.mark.parametrize("change", ["weights", "classes", "padding", "pooler"])
def test_what_a_head_reads_of_a_trunk_depends_on_its_config_and_its_pooler(
    change: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    """A changed head gets what was kept of a trunk only where it would read the same of it."""
    data, test = two_texts(tmp_path, "rows", "abc", "xyz"), two_texts(tmp_path, "test", "abd", "xyw")
    trunk = make_bert_trunk()
    # A masked language model has no pooler, so that each classifier brings its own.
    base = BertForMaskedLM(bert_config()) if change == "pooler" else trunk
    experts = {name: make_bert_expert(trunk, seed, 2) for seed, name in enumerate(("mood", "topic", "other"), 1)}
    if change == "padding":
        experts["other"].config.pad_token_id = 1
    elif change == "classes":
        experts["other"].config.id2label = {0: "bad", 1: "good"}
        experts["other"].config.label2id = {"bad": 0, "good": 1}
    folders = {name: save(network, name, tmp_path) for name, network in experts.items()}
    recipe: Recipe = {
        "name": "encoders",
        "base": str(save(base, "base", tmp_path)),
        "experts": {name: {"model": str(folders[name])} for name in ("mood", "topic")},
        "tasks": {
            name: {"kind": "classification", "calibration": data, "evaluation": test} for name in ("mood", "topic")
        },
        "merges": {"ta": {"method": "task_arithmetic", "coefficients": {"kind": "sens"}}},
    }

    def prints() -> tuple[str | None, str, str]:
        plan = plan_of(tmp_path, recipe)
        job = plan.step("cross_task", "all").job
        assert isinstance(job, CrossTaskJob)
        evaluations = {name: plan.step("evaluate", f"{name}/mood").job for name in ("base", "mood", "ta")}
        trunks = {name: one.trunk() for name, one in evaluations.items() if isinstance(one, EvaluateJob)}
        assert trunks["mood"] is trunks["ta"] is None  # which change with the expert
        return (
            trunks["base"],
            job.trunk("topic", "mood"),
            job.pair("topic", "mood"),
        )

    before = prints()
    assert (before[0] is None) == (change == "pooler")
    recipe["experts"]["mood"]["model"] = str(folders["other"])
    after = prints()
    assert [one == other for one, other in zip(before, after, strict=True)] == {
        "weights": [True, True, False],
        "classes": [False, True, False],  # rows may name classes
        "padding": [False, False, False],
        "pooler": [True, True, False],  # in cross_task every trunk has its own
    }[change]


@pytest.mark.parametrize("damage", ["gone", "other content"])
def test_only_distances_as_they_were_written_are_taken_over(damage: str, llama_recipe: Recipe, tmp_path: Path) -> None:
    store, step = Store(tmp_path / "store"), plan_of(tmp_path, llama_recipe).step("cross_task", "all")

    def resumed() -> CrossTaskJob:
        job = step.job.resumed(EarlierArtifacts(store, step.key))
        assert isinstance(job, CrossTaskJob)
        return job

    job = resumed()
    assert job.known == {}
    assert list(job.parts()) == list(job.experts)
    pairs = {i: {j: job.pair(i, j) for j in job.experts} for i in job.experts}
    earlier = replace(step.key, inputs={"of": "other experts too"})
    store.partial(earlier).mkdir(parents=True)
    write_json(store.partial(earlier) / "pairs.json", pairs)
    distances = {i: dict.fromkeys(row, 1.25) for i, row in pairs.items()}
    write_json(store.partial(earlier) / "distances.json", distances)
    store.publish(earlier, {"result": {}})
    every = {fingerprint for i, row in pairs.items() for j, fingerprint in row.items() if i != j}
    job = resumed()
    assert job.known == dict.fromkeys(every, 1.25)
    assert not job.parts()
    file = store.folder(earlier) / "distances.json"
    if damage == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text().replace("1.25", "1.75"))
    assert resumed().known == {}


def test_a_method_has_the_statistics_measured_that_it_reads(
    llama_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "statistics", ("sensitivity",))
    variants = {"reads": {"method": "linear"}, "plain": {"method": "task_arithmetic"}}
    plan = plan_of(tmp_path, {**llama_recipe, "merges": variants})
    measured = {name: plan.step("statistics", name) for name in plan.recipe.experts}
    assert {step.title for step in measured.values()} <= set(plan.step("merge", "reads").needs)
    job = plan.step("merge", "reads").job
    assert isinstance(job, MergeJob)
    assert {name: one.fingerprint for name, one in job.statistics.items()} == {
        name: step.key.fingerprint for name, step in measured.items()
    }
    assert not any("statistics" in title for title in plan.step("merge", "plain").needs)
    assert not any(step.stage == "cross_task" for step in plan.steps)
