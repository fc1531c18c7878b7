"""Plans without a look at weights: what they leave open, and that all else is what a full plan says."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.plan.models import hash_models, list_models, unhashed_bytes
from sensmerge.pipeline.plan.plan import Plan, make_plan, plan_summary
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.checkpoints import digests
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, plan_of, write_recipe

LONG_AGO = (0, 10**9)


@pytest.fixture
def recipe(llama_recipe: dict[str, Any], llamas: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """The recipe of the tiny Llamas, whose files were written long ago and are the test's own."""
    for name, folder in llamas.items():
        copied = Path(shutil.copytree(folder, tmp_path / name))
        for path in copied.iterdir():
            os.utime(path, LONG_AGO)
    llama_recipe["base"] = "base"
    llama_recipe["experts"] = {name: {"model": name} for name in ("math", "code")}
    return llama_recipe


def quick_plan(folder: Path, recipe: dict[str, Any], *overrides: str) -> Plan:
    loaded, store = load_recipe(write_recipe(folder, recipe), overrides), Store(folder / "store")
    return make_plan(loaded, folder, store, list_models(loaded, folder, store.hub_cache))


def publish(plan: Plan) -> None:
    for step in plan.steps:
        if step.title in plan.todo:
            plan.store.partial(step.key).mkdir(parents=True)
            plan.store.publish(step.key, {"result": {}})


def test_nothing_is_undecided_where_the_store_has_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    quick = quick_plan(tmp_path, recipe)
    assert not digests.records(quick.store.hub_cache).exists()
    full = plan_of(tmp_path, recipe)
    assert quick.todo == full.todo == {step.title: "new" for step in full.steps}
    assert not quick.undecided
    assert [(step.reads, step.writes) for step in quick.steps] == [(step.reads, step.writes) for step in full.steps]


def test_known_digests_decide(recipe: dict[str, Any], tmp_path: Path) -> None:
    publish(plan_of(tmp_path, recipe))
    quick = quick_plan(tmp_path, recipe)
    assert quick.todo == {}
    assert not quick.undecided
    assert quick_plan(tmp_path, recipe, "merges.ta.weight=0.4").todo.keys() == {
        "merge ta",
        "evaluate ta/math",
        "evaluate ta/code",
    }


def test_what_depends_on_weights_that_nobody_read_is_undecided(recipe: dict[str, Any], tmp_path: Path) -> None:
    publish(plan_of(tmp_path, recipe))
    os.utime(tmp_path / "math" / "model.safetensors", (0, 2 * 10**9))
    recipe["merges"]["more"] = {"method": "linear"}
    quick = quick_plan(tmp_path, recipe)
    new = {"merge more", "evaluate more/math", "evaluate more/code"}
    assert quick.todo == dict.fromkeys(new, "new")
    # Code's own steps, and what the base scores on code, need none of math's weights.
    apart = {"download base", "download code", "task_vectors code", "statistics code"}
    apart |= {f"evaluate {model}/{task}" for model in ("base", "code") for task in ("math", "code")}
    assert set(quick.undecided) == {step.title for step in quick.steps} - new - apart
    assert f"3 of {len(quick.steps)} steps to run, {len(quick.undecided)} undecided, " in plan_summary(quick)

    full = plan_of(tmp_path, recipe)  # the content is what it was
    assert full.todo == quick.todo
    weights = tmp_path / "math" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert set(quick_plan(tmp_path, recipe).undecided) == set(quick.undecided)
    assert plan_of(tmp_path, recipe).todo.keys() == {*quick.todo, *quick.undecided}


def test_no_weight_is_read(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = digests.compute

    def compute_others(path: Path, kind: str) -> str:
        assert path.suffix != ".safetensors"
        return compute(path, kind)

    monkeypatch.setattr(digests, "compute", compute_others)
    assert quick_plan(tmp_path, recipe).todo


def test_experts_of_equal_size_count_as_two_until_they_are_read(recipe: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy2(tmp_path / "math" / "model.safetensors", tmp_path / "code")
    loaded = load_recipe(write_recipe(tmp_path, recipe), ())
    listings = list_models(loaded, tmp_path, tmp_path / "hub")
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "math", "code")}
    assert unhashed_bytes(listings) == sizes
    read: list[int] = []
    with pytest.raises(InputError, match=r"experts\.code: the same files as experts\.math"):
        hash_models(listings, tmp_path / "hub", read.append)
    assert read == list(sizes.values())
    with pytest.raises(InputError, match=r"experts\.code: the same files as experts\.math"):
        list_models(loaded, tmp_path, tmp_path / "hub")  # known by now


def test_a_quick_plan_says_what_it_leaves_open(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, store = write_recipe(tmp_path, recipe), tmp_path / "store"

    def said(*more: str) -> str:
        assert command_line("plan", path, "--store", store, *more) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "of base, math, code without a digest yet: not read; every step is decided" in said("--quick")
    publish(plan_of(tmp_path, recipe))
    assert "digest yet" not in said("--quick")
    os.utime(tmp_path / "math" / "model.safetensors", (0, 2 * 10**9))
    text = said("--quick")
    assert "of math without a digest yet: not read; plan without --quick decides the steps marked ?" in text
    assert "digest yet" not in said()
    assert "digest yet" not in said("--quick")
