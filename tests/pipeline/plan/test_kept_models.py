"""Models that are kept as they were opened: the same steps, without transformers, until anything is different."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.plan import kept_models
from sensmerge.tasks.networks.base import Base
from tests.conftest import make_adapter, make_llama, perturbed, plan_of, write_recipe

Save = Callable[..., Path]
Recipe = dict[str, Any]

PLAN = """
import sys
from pathlib import Path
from rich.console import Console
from sensmerge.pipeline.start import print_plan
from sensmerge.pipeline.store.store import Store
print_plan(Path(sys.argv[1]), (), Store(Path(sys.argv[2])), Console(width=160))
print("transformers" in sys.modules, "torch" in sys.modules)
"""


@pytest.fixture
def recipe(save: Save, berts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A merge of weights alone, of a whole model and an adapter."""
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    experts = {
        "math": {"model": str(save(perturbed(make_llama(), 7), "math", tmp_path))},
        "code": {"model": str(make_adapter(make_llama(), tmp_path / "code", 8))},
    }
    base = str(save(make_llama(), "base", tmp_path))
    return {"name": "plain", "base": base, "experts": experts, "merges": {"ta": {"method": "task_arithmetic"}}}


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "models").glob("*.json"))


def test_the_steps_are_the_same(recipe: Recipe, tmp_path: Path) -> None:
    opened, again = (plan_of(tmp_path, recipe, store=store) for store in ("one", "other"))
    assert len(kept(tmp_path)) == 1
    assert isinstance(opened.inputs.base, Base)
    assert not isinstance(again.inputs.base, Base)
    assert [step.key for step in again.steps] == [step.key for step in opened.steps]
    assert again.step("merge", "ta").job == opened.step("merge", "ta").job
    assert again.inputs.notes == opened.inputs.notes


def test_heads_are_kept(berts: dict[str, Path], recipe: Recipe, tmp_path: Path) -> None:
    recipe |= {"base": str(berts["base"]), "experts": {name: {"model": str(berts[name])} for name in ("mood", "topic")}}
    opened, again = (plan_of(tmp_path, recipe, store=store) for store in ("one", "other"))
    assert not isinstance(again.inputs.base, Base)
    assert set(again.inputs.heads) == {"mood", "topic"}
    assert again.step("merge", "ta").job == opened.step("merge", "ta").job


def test_experts_stay_in_the_order_of_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    for _ in range(2):
        assert list(plan_of(tmp_path, recipe).inputs.experts) == ["math", "code"]
        recipe["experts"] = dict(reversed(recipe["experts"].items()))
        assert list(plan_of(tmp_path, recipe).inputs.experts) == ["code", "math"]
        recipe["experts"] = dict(reversed(recipe["experts"].items()))


def test_other_weights_are_opened_anew(save: Save, recipe: Recipe, tmp_path: Path) -> None:
    plan_of(tmp_path, recipe)
    save(perturbed(make_llama(), 9), "math", tmp_path)
    plan_of(tmp_path, recipe)
    assert len(kept(tmp_path)) == 2


def test_a_file_of_another_version_is_not_believed(recipe: Recipe, tmp_path: Path) -> None:
    plan_of(tmp_path, recipe)
    (path,) = kept(tmp_path)
    path.write_text('{"base": 1}')
    assert isinstance(plan_of(tmp_path, recipe).inputs.base, Base)
    assert not isinstance(plan_of(tmp_path, recipe).inputs.base, Base)


def test_what_nobody_uses_goes(recipe: Recipe, tmp_path: Path) -> None:
    plan_of(tmp_path, recipe)
    old = tmp_path / "cache" / "models" / "old.json"
    old.write_text("{}")
    os.utime(old, (10**9, 10**9))
    kept(tmp_path)[0].unlink()
    plan_of(tmp_path, recipe)
    assert not old.exists()


def test_a_plan_of_them_needs_no_transformers(recipe: Recipe, tmp_path: Path) -> None:
    plan_of(tmp_path, recipe)
    words = [sys.executable, "-c", PLAN, str(write_recipe(tmp_path, recipe)), str(tmp_path / "store")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "merge" in said
    assert said.splitlines()[-1] == "False True"


def test_with_tasks_networks_are_opened(llama_recipe: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    assert isinstance(plan_of(tmp_path, llama_recipe).inputs.base, Base)
    assert not kept(tmp_path)
    assert not kept_models.is_plain(plan_of(tmp_path, llama_recipe).recipe)
