"""Variants as configurations of mergekit: what mergekit makes of them, what they are imported as, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sensmerge.pipeline.export import export
from sensmerge.pipeline.plan.models import hash_models, list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.errors import InputError
from tests.conftest import (
    command_line,
    do_steps,
    make_adapter,
    make_llama,
    perturbed,
    tiny_recipe,
    write_recipe,
    write_rows,
)
from tests.hub_server import HubServer
from tests.mergekit import assert_equal_weights, merge

BLOCKS = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "ta": {
        "method": "task_arithmetic",
        "weight": 0.5,
        "coefficients": {
            "kind": "explicit",
            "weights": {
                "math": {"*": 0.4, "model.layers.1": 1.2},
                "code": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}],
            },
        },
        "lines": {"first": 0.5, "last": 1.5},
    },
    "ties-sens": {
        "method": "ties",
        "density": {"math": [0.9, 0.2], "code": 0.5},
        "coefficients": {"kind": "sens", "temperature": 0.05},
    },
    "tuned": {"method": "ties", "normalize": False, "tune": {"weight": [0.3, 0.9], "density": [0.2, 0.7]}},
    "linear": {"method": "linear", "coefficients": {"kind": "sens", "temperature": 0.05}},
    "nuslerp": {
        "method": "nuslerp",
        "task_vectors": False,
        "coefficients": {"kind": "explicit", "weights": {"math": 0.3, "code": 0.9}},
    },
    "karcher": {"method": "karcher", "max_iter": 20},
    "stock": {"method": "model_stock", "filter_wise": True},
}
ADAPTED = {"method": "task_arithmetic", "weight": 0.7, "lines": {"first": 0.0, "last": 1.0}}


def planned(path: Path, store: Path) -> Plan:
    recipe, opened = load_recipe(path), Store(store)
    opened.make()
    listings = hash_models(list_models(recipe, path.parent, opened.hub_cache), opened.hub_cache)
    return make_plan(recipe, path.parent, opened, listings)


@pytest.fixture(scope="module")
def ran(save: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe of two fine-tunes that has run, one of two adapters, and the folder of both."""
    folder = tmp_path_factory.mktemp("export")
    models = {"base": save(make_llama(num_hidden_layers=BLOCKS), "base", folder)}
    for seed, name in enumerate(("math", "code"), 1):
        models[name] = save(perturbed(make_llama(num_hidden_layers=BLOCKS), seed), name, folder)
    data = tiny_recipe(models, folder) | {"merges": VARIANTS}
    for task, one in data["tasks"].items():  # a tiny random network likes to repeat a token
        rows = [{"prompt": str(digit) * 5, "completion": str(digit) * 3} for digit in range(10)]
        write_rows(folder / f"{task}.jsonl", rows)
        one["calibration"]["samples"] = len(rows)
    recipe = write_recipe(folder, data)
    do_steps(planned(recipe, folder / "store"))
    adapters = {}
    for seed, name in enumerate(("math", "code"), 1):
        target, network = folder / f"{name}-lora", make_llama(num_hidden_layers=BLOCKS)
        adapters[name] = {"model": str(make_adapter(network, target, seed, target_modules=["q_proj", "up_proj"]))}
    changes = {"experts": adapters, "merges": {"adapted": ADAPTED}, "tasks": {}}
    adapted = write_recipe(folder, data | changes, "adapters.yaml")
    do_steps(planned(adapted, folder / "store"))
    return {"folder": folder, "adapted": adapted} | dict.fromkeys(VARIANTS, recipe)


@pytest.fixture(scope="module")
def theirs(ran: dict[str, Path], mergekit: Path) -> Path:
    """The folder, with every variant as `NAME.yml` and what mergekit makes of it in `NAME-out`."""
    folder, names = ran["folder"], [*VARIANTS, "adapted"]
    for name in names:
        write_configuration(ran, name)
    merge(mergekit, folder, names)
    return folder


def write_configuration(ran: dict[str, Path], name: str) -> Path:
    path = ran["folder"] / f"{name}.yml"
    path.write_text(export(ran[name], (), name, Store(ran["folder"] / "store"), Console()))
    return path


@pytest.mark.parametrize("name", [*VARIANTS, "adapted"])
def test_mergekit_makes_the_same_weights(name: str, ran: dict[str, Path], theirs: Path) -> None:
    ours = planned(ran[name], theirs / "store").models()[name]
    assert_equal_weights(ours, theirs / f"{name}-out")


@pytest.mark.parametrize("name", [*VARIANTS, "adapted"])
def test_what_is_imported_again_makes_the_same_weights(name: str, ran: dict[str, Path]) -> None:
    plan = planned(write_configuration(ran, name), ran["folder"] / f"{name}-store")
    do_steps(plan)
    ours = planned(ran[name], ran["folder"] / "store").models()[name]
    assert_equal_weights(plan.models()["merged"], ours, 1e-6)


def exported(folder: Path, recipe: dict[str, Any], variant: str = "ta") -> dict[str, Any]:
    text = export(write_recipe(folder, recipe), (), variant, Store(folder / "store"), Console())
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_uniform_coefficients_need_no_run(llamas: dict[str, Path], tmp_path: Path) -> None:
    merges = {"ta": {"method": "ties", "weight": 0.5, "out_dtype": "bfloat16"}}
    recipe = tiny_recipe(llamas, tmp_path) | {"tasks": {}, "merges": merges}
    assert exported(tmp_path, recipe) == {
        "merge_method": "ties",
        "base_model": str(llamas["base"]),
        "models": [
            {"model": str(llamas["math"]), "parameters": {"weight": 0.5}},
            {"model": str(llamas["code"]), "parameters": {"weight": 0.5}},
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_masks_are_said_to_be_others(llamas: dict[str, Path], tmp_path: Path) -> None:
    merges = {"ta": {"method": "dare_linear", "density": 0.5}}
    path = write_recipe(tmp_path, tiny_recipe(llamas, tmp_path) | {"tasks": {}, "merges": merges})
    text = export(path, (), "ta", Store(tmp_path / "store"), Console())
    assert text.startswith("# mergekit draws other random masks")
    assert yaml.safe_load(text)["parameters"] == {"density": 0.5}


def test_folders_with_signs_of_mergekits_are_written_out(save: Callable[..., Path], tmp_path: Path) -> None:
    models = {"base": save(make_llama(), "base+1@a", tmp_path)}
    models["math"] = make_adapter(make_llama(), tmp_path / "math", 1)
    models["code"] = save(perturbed(make_llama(), 2), "code", tmp_path)
    recipe = tiny_recipe(models, tmp_path) | {"tasks": {}, "merges": {"ta": {"method": "ties"}}}
    found = exported(tmp_path, recipe)
    base = {"path": str(models["base"])}
    assert found["base_model"] == {"model": base}
    assert found["models"][0]["model"] == {"model": base, "lora": {"path": str(models["math"])}}


def test_a_folder_in_a_repository_is_no_model_of_mergekits(
    llamas: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    hub.add_repo("org/all", {f"base/{path.name}": path.read_bytes() for path in llamas["base"].iterdir()})
    recipe = tiny_recipe(llamas, tmp_path) | {"tasks": {}, "merges": {"ta": {"method": "ties"}}}
    with pytest.raises(InputError, match=r"^base\.subfolder: mergekit reads repositories at their top; name a copy of"):
        exported(tmp_path, recipe | {"base": {"model": "hub:org/all", "subfolder": "base"}})
    math = {"model": str(llamas["math"].parent), "subfolder": llamas["math"].name}
    found = exported(tmp_path, recipe | {"experts": recipe["experts"] | {"math": math}})
    assert found["models"][0]["model"] == str(llamas["math"])


def templated(save: Callable[..., Path], folder: Path, vocabulary: int = 259) -> dict[str, Path]:
    """A base without a chat template, an expert with one, and another without."""
    models = {"base": save(make_llama(vocab_size=vocabulary), "base", folder)}
    for seed, name in enumerate(("math", "code"), 1):
        models[name] = save(perturbed(make_llama(vocab_size=vocabulary), seed), name, folder)
    (models["math"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return models


def test_the_tokenizer_of_an_expert_is_named_and_taken(
    save: Callable[..., Path], mergekit: Path, tmp_path: Path
) -> None:
    models = templated(save, tmp_path)
    merges = {"ta": {"method": "task_arithmetic", "weight": 0.4}}
    recipe = tiny_recipe(models, tmp_path) | {"tasks": {}, "tokenizer": {"source": "math"}, "merges": merges}
    found = exported(tmp_path, recipe)
    assert found["tokenizer_source"] == str(models["math"])
    (tmp_path / "ta.yml").write_text(yaml.safe_dump(found))
    merge(mergekit, tmp_path, ["ta"])
    plan = planned(tmp_path / "recipe.yaml", tmp_path / "store")
    do_steps(plan)
    assert_equal_weights(plan.models()["ta"], tmp_path / "ta-out")
    assert (tmp_path / "ta-out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    again = planned(tmp_path / "ta.yml", tmp_path / "store")
    assert (again.models()["base"], again.recipe.tokenizer.source) == (models["base"], "math")


def test_the_tokenizer_of_the_base_needs_no_name(save: Callable[..., Path], tmp_path: Path) -> None:
    merges = {"ta": {"method": "task_arithmetic"}}
    recipe = tiny_recipe(templated(save, tmp_path), tmp_path) | {"tasks": {}, "merges": merges}
    assert "tokenizer_source" not in exported(tmp_path, recipe | {"tokenizer": {"source": "base"}})


def test_without_a_base_any_model_may_give_the_tokenizer_so_it_is_named(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    models = templated(save, tmp_path)
    recipe = tiny_recipe(models, tmp_path) | {"tasks": {}, "merges": {"ta": {"method": "karcher"}}}
    for source in ("math", "code"):
        found = exported(tmp_path, recipe | {"tokenizer": {"source": source}})
        assert found["tokenizer_source"] == str(models[source])


def test_rows_that_mergekit_would_cut_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(templated(save, tmp_path, 264), tmp_path) | {"tasks": {}, "merges": {"ta": {"method": "ties"}}}
    with pytest.raises(InputError, match=r"tokenizer\.source: math: mergekit would move or cut the 264 rows"):
        exported(tmp_path, recipe | {"tokenizer": {"source": "math"}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "iso_c"}, r"merges\.ta\.method: mergekit has no iso_c"),
        ({"method": "dare_ties", "density": 0.5, "seed": 3}, r"merges\.ta\.seed: mergekit draws random masks"),
        ({"method": "ties", "calibrate": {}}, r"merges\.ta\.calibrate: mergekit has nothing like it"),
        ({"method": "ties", "application": {"kind": "se"}, "normalize": False}, r"merges\.ta\.application: mergekit"),
        ({"method": "ties", "coefficients": {"kind": "sens"}}, r"merges\.ta: its coefficients are not in --store"),
    ],
)
def test_what_mergekit_cannot_say_is_refused_by_name(
    settings: dict[str, Any], said: str, llama_recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        exported(tmp_path, llama_recipe | {"merges": {"ta": settings}})


def test_a_head_of_an_expert_is_refused(berts: dict[str, Path], tmp_path: Path) -> None:
    experts = {name: {"model": str(berts[name])} for name in ("mood", "topic")}
    recipe = {"name": "heads", "base": str(berts["base"]), "experts": experts, "merges": {"ta": {"method": "ties"}}}
    with pytest.raises(InputError, match=r"experts\.mood: has a head of its own, classifier\.bias"):
        exported(tmp_path, recipe)


def test_an_unknown_variant_is_refused(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--variant other: expected one of ta, ties-sens"):
        exported(tmp_path, llama_recipe, "other")


def test_the_command_prints_it(
    llama_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, llama_recipe)
    assert command_line("export", path, "--variant", "ta", "--store", tmp_path / "store") == 0
    assert yaml.safe_load(capsys.readouterr().out)["merge_method"] == "task_arithmetic"
