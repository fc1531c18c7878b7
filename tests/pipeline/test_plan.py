"""Plans: what they find from headers alone, and what makes a step run again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.plan import Plan, human_bytes, make_plan, plan_summary, plan_table
from pipeline.recipe import load_recipe
from pipeline.store import Store
from tasks.errors import InputError
from tests.conftest import make_llama, perturbed, write_recipe, write_rows
from tests.hub_server import HubServer

Recipe = dict[str, Any]


def plan_of(folder: Path, recipe: Recipe, *overrides: str, store: str = "store") -> Plan:
    path = write_recipe(folder, recipe)
    return make_plan(load_recipe(path, overrides), folder, Store(folder / store))


def fingerprints(plan: Plan) -> dict[str, str]:
    return {step.title: step.key.fingerprint for step in plan.steps}


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
    assert len(plan.steps) == len(seen) == 3 + 2 + 2 + 1 + 2 + 5 * 2


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


def test_right_choices_are_part_of_a_calibration(llama_recipe: Recipe, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "choices": ["b", "c"], "answer": 0, "other": 1}] * 3
    write_rows(tmp_path / "choices.jsonl", rows)
    data = {"path": "json", "data_files": "choices.jsonl"}
    llama_recipe["tasks"]["math"] = {"kind": "multiple_choice", "calibration": data, "evaluation": data}
    before = plan_of(tmp_path, llama_recipe)
    touched = changed(before, plan_of(tmp_path, llama_recipe, "tasks.math.answer=other"))
    assert {"sensitivity math", "cross_task all", "evaluate base/math"} <= touched


def test_weights_that_left_the_hub_cache_are_fetched_again(
    hub: HubServer, llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path
) -> None:
    on_hub(hub, "team/math", llamas["math"])
    llama_recipe["experts"]["math"]["model"] = "hub:team/math"
    plan = plan_of(tmp_path, llama_recipe)
    for step in plan.steps:
        plan.store.partial(step.key).mkdir(parents=True)
        plan.store.publish(step.key, {})
    assert set(plan_of(tmp_path, llama_recipe).todo) == {"download math"}


def test_without_sens_coefficients_nothing_is_estimated(llama_recipe: Recipe, tmp_path: Path) -> None:
    del llama_recipe["merges"]["ties-sens"]
    stages = {step.stage for step in plan_of(tmp_path, llama_recipe).steps}
    assert stages == {"download", "task_vectors", "merge", "evaluate"}


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
                *("sensitivity math", "cross_task all", "merge ties-sens"),
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
        shutil.copy(tmp_path / f"{name}.jsonl", elsewhere / f"{name}-rows.jsonl")
        llama_recipe["experts"][name]["model"] = f"model-{name}"
        for split in ("calibration", "evaluation"):
            llama_recipe["tasks"][name][split]["data_files"] = f"{name}-rows.jsonl"
    assert fingerprints(plan_of(elsewhere, llama_recipe)) == fingerprints(before)


def test_a_changed_expert_changes_only_what_reads_it(llama_recipe: Recipe, save: Any, tmp_path: Path) -> None:
    before = plan_of(tmp_path, llama_recipe)
    llama_recipe["experts"]["math"]["model"] = str(save(perturbed(make_llama(), 9), "math"))
    touched = changed(before, plan_of(tmp_path, llama_recipe))
    assert {"download math", "task_vectors math", "sensitivity math", "cross_task all", "merge ta"} <= touched
    assert not {"download code", "task_vectors code", "sensitivity code", "evaluate base/math"} & touched


def test_table_says_run_and_why(llama_recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, llama_recipe)
    assert plan_summary(plan).startswith("tiny: 20 of 20 steps to run, ")
    rows = list(zip(*(column.cells for column in plan_table(plan).columns), strict=True))
    assert rows[0][:4] == ("download", "base", "RUN", "new")
    assert len(rows) == 20


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7 * 10**12, "7.0 TB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


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
    assert (merges["b"].method, merges["a"].density, merges["b"].density) == ("ties", 0.5, 0.2)


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
    inputs = plan.step("evaluate", "ta/topic").key.inputs["reads"]
    assert inputs["head"] == plan.step("download", "topic").key.fingerprint
