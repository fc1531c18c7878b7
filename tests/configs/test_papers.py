"""The protocols of the papers as recipes: planned on a recorded hub, without a weight fetched."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sensmerge.pipeline.plan.models import list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.errors import InputError
from tests.conftest import write_recipe, write_rows
from tests.hub_server import HubServer
from tests.recorded import clip, hub_models, mammoth, rows

CONFIGS = Path(__file__).parents[2] / "configs"
SPLITS = ("calibration", "evaluation")


def record(hub: HubServer, recipe: dict[str, Any]) -> None:
    """Add the models that a recipe names to a hub, at the revisions that it names."""
    for model in (recipe["base"], *(one["model"] for one in recipe["experts"].values())):
        if model.startswith("hub:"):
            repo, _, revision = model.removeprefix("hub:").partition("@")
            hub.add_repo(repo, hub_models()[repo].files(repo), commit="" if revision == "main" else revision)


def with_rows(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe with files of a few rows in place of the hub's data sets, at most as many as it asks for."""
    tasks = {}
    for number, (name, task) in enumerate(recipe.get("tasks", {}).items()):
        for first, split in enumerate(SPLITS):
            source = task[split]
            start = 1000 * (len(SPLITS) * number + first)
            found = rows(source["path"], source.get("name"), range(start, start + 12))
            file = write_rows(folder / f"{name}-{split}.jsonl", found)
            task = {**task, split: {"path": "json", "data_files": file.name, "samples": 10}}
        tasks[name] = task | ({"isolation": "if_possible"} if task["kind"] == "code" else {})
    return {**recipe, "tasks": tasks}


@pytest.fixture
def plan_paper(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan a recipe of configs/ without a look at weights, as on a machine with room for them."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**15, used=0, free=10**15))

    def plan(name: str, **experts: str) -> Plan:
        recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        recipe["experts"] |= {expert: {"model": model} for expert, model in experts.items()}
        record(hub, recipe)
        loaded = load_recipe(write_recipe(tmp_path, with_rows(recipe, tmp_path)))
        store = Store(tmp_path / "store")
        found = make_plan(loaded, tmp_path, store, list_models(loaded, tmp_path, store.hub_cache))
        weights = [one for one in hub.requests if one.method == "GET" and one.path.endswith(".safetensors")]
        assert weights
        assert all(one.range is not None for one in weights)
        return found

    return plan


def sizes(plan: Plan) -> dict[str, float]:
    """The GB of each model's weights."""
    listings = plan.inputs.listings
    return {
        name: round(sum(file.size for file in one.files if file.name.endswith(".safetensors")) / 1e9, 2)
        for name, one in listings.items()
    }


def test_llama2_7b(plan_paper: Any, tmp_path: Path) -> None:
    mammoth().save(tmp_path / "mammoth-7b")
    plan = plan_paper("llama2-7b")
    assert sizes(plan) == {"base": 13.48, "chat": 13.48, "math": 26.95, "code": 13.48}
    assert len(plan.inputs.base.weights) == 291
    for name in plan.inputs.experts:
        assert plan.step("statistics", name)


def test_mistral_7b(plan_paper: Any) -> None:
    plan = plan_paper("mistral-7b")
    assert set(sizes(plan).values()) == {14.48}
    assert len(plan.inputs.base.weights) == 291


def test_a_chat_model_with_other_positions_is_refused(plan_paper: Any) -> None:
    with pytest.raises(
        InputError, match=r"^experts\.chat: .* has other settings than the base: rope_parameters\.rope_theta"
    ):
        plan_paper("mistral-7b", chat="hub:mistralai/Mistral-7B-Instruct-v0.2@main")


def test_gpt2_glue(plan_paper: Any) -> None:
    plan = plan_paper("gpt2-glue")
    assert sizes(plan) == {"base": 0.55, **dict.fromkeys(plan.inputs.experts, 0.5)}
    assert set(plan.inputs.heads) == {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"}


def test_clip_vit_b32(plan_paper: Any, tmp_path: Path) -> None:
    clip().save(tmp_path / "clip-vit-b32")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip-vit-b32")
    plan = plan_paper("clip-vit-b32")
    assert sizes(plan) == {"base": 0.61, **dict.fromkeys(plan.inputs.experts, 0.35)}
    classes = {"sun397": 397, "stanford-cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10}
    classes |= {"gtsrb": 43, "mnist": 10, "dtd": 47}
    heads = {name: plan.inputs.experts[name].source.tensors["classifier.weight"].shape for name in plan.inputs.heads}
    assert heads == {name: (count, 512) for name, count in classes.items()}
    assert plan.names("heads") == list(classes)
