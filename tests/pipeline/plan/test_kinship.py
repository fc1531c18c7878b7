"""Experts that look as if they were made from another base are named, and merged all the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensmerge.pipeline.plan.kinship import WAY_OUT, other_bases
from sensmerge.pipeline.report.results import collect
from sensmerge.tasks.checkpoints.listing import HubModel
from tests.conftest import do_steps, make_adapter, make_llama, plan_of
from tests.hub_server import HubServer


def test_a_full_expert_is_told_by_its_weights(
    llama_recipe: dict[str, Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    llama_recipe["experts"]["code"]["model"] = str(save(make_llama(seed=7), "other", tmp_path))
    (note,) = [note for note in plan_of(tmp_path, llama_recipe).inputs.notes if "another base" in note]
    assert note.startswith("experts.code looks like a fine-tune of another base: its weights have a cosine of ")
    assert note.endswith(WAY_OUT)


def test_weights_that_come_with_the_run_are_looked_at_then(
    llama_recipe: dict[str, Any], save: Callable[..., Path], hub: HubServer, tmp_path: Path
) -> None:
    other = save(make_llama(seed=7), "other", tmp_path)
    hub.add_repo("team/other", {path.name: path.read_bytes() for path in other.iterdir()})
    recipe = {"name": "r", "base": llama_recipe["base"], "merges": {"ta": {"method": "task_arithmetic"}}}
    plan = plan_of(tmp_path, recipe | {"experts": {"other": {"model": "hub:team/other"}}})
    do_steps(plan)
    found = collect(plan)
    assert list(found.other_bases) == ["other"]
    assert set(found.other_bases.values()) <= set(found.notes) - set(plan.inputs.notes)


def test_an_adapter_is_told_by_the_base_that_it_names(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    stated = {
        "first": "team/Net-1B",
        "mirror": "unsloth/net-1b-unsloth-bnb-4bit",
        "chat": "team/Net-1B-Instruct",
        "local": "../models/base",
        "silent": None,
    }
    for seed, (name, base) in enumerate(stated.items()):
        path = make_adapter(make_llama(), tmp_path / name, seed) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    recipe = {"name": "r", "base": llama_recipe["base"], "merges": {"ta": {"method": "task_arithmetic"}}}
    recipe["experts"] = {name: {"model": name} for name in stated}
    inputs = plan_of(tmp_path, recipe).inputs
    said = "experts.chat: its adapter_config.json says that it was made for team/Net-1B-Instruct, and "
    expected = {"chat": f"{said}experts.first for team/Net-1B; if these are different networks, {WAY_OUT}"}
    assert other_bases(inputs.experts, inputs.listings) == expected
    assert expected["chat"] in inputs.notes
    on_hub = replace(inputs.listings["base"], source=HubModel("org/Net-1B-Instruct", "main"))
    found = other_bases(inputs.experts, {**inputs.listings, "base": on_hub})
    assert list(found) == ["first", "mirror"]
    assert "team/Net-1B, and the base is org/Net-1B-Instruct; if" in found["first"]
