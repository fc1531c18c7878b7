"""Configurations of mergekit as recipes: what is carried over, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sensmerge.pipeline.recipe.load import load_recipe, read_recipe
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line

TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B@main
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
CONFIG: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "org/base",
    "models": [
        {"model": "org/math", "parameters": {"weight": 0.5}},
        {"model": "org/code", "parameters": {"weight": 0.5}},
    ],
}


def imported(config: Any, folder: Path, name: str = "config.yml") -> dict[str, Any]:
    path = folder / name
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    load_recipe(path)  # the schema takes it
    return read_recipe(path)


def test_gradients_and_filters_are_carried_over(tmp_path: Path) -> None:
    assert imported(TIES, tmp_path, "gradient ties.yml") == {
        "name": "gradient-ties",
        "base": "hub:TheBloke/Llama-2-13B-fp16",
        "experts": {
            "orca_mini_v3_13b": {"model": "hub:psmathur/orca_mini_v3_13b"},
            "Platypus2-13B": {"model": "hub:garage-bAInd/Platypus2-13B@main"},
            "WizardMath-13B-V1.0": {"model": "hub:WizardLM/WizardMath-13B-V1.0"},
        },
        "tokenizer": {"source": "base"},
        "merges": {
            "merged": {
                "method": "ties",
                "density": {"orca_mini_v3_13b": [1, 0.7, 0.1], "Platypus2-13B": 0.5, "WizardMath-13B-V1.0": 0.33},
                "normalize": True,
                "coefficients": {
                    "kind": "explicit",
                    "weights": {
                        "orca_mini_v3_13b": 1.0,
                        "Platypus2-13B": [0, 0.3, 0.7, 1],
                        "WizardMath-13B-V1.0": [{"filter": "mlp", "value": 0.5}, {"value": 0}],
                    },
                },
                "out_dtype": "float16",
            }
        },
    }


def test_what_all_models_share_is_said_once(tmp_path: Path) -> None:
    recipe = imported(CONFIG | {"out_dtype": "bfloat16", "dtype": "float32"}, tmp_path)
    assert recipe["merges"]["merged"] == {"method": "task_arithmetic", "weight": 0.5, "out_dtype": "bfloat16"}
    shared = {"weight": "3e-1", "lambda": 2}
    models = [{"model": "org/math", "parameters": {"weight": 0.1}}, {"model": "org/code"}]
    merge = imported(CONFIG | {"models": models, "parameters": shared}, tmp_path)["merges"]["merged"]
    assert merge["coefficients"]["weights"] == {"math": 0.1, "code": 0.3}
    assert merge["lambda"] == 2


def test_filters_go_on_in_what_holds_for_all(tmp_path: Path) -> None:
    models = [
        {"model": "org/math", "parameters": {"density": [{"filter": "mlp", "value": 0.2}]}},
        {"model": "org/code"},
    ]
    config = {"merge_method": "ties", "base_model": "org/base", "models": models, "parameters": {"weight": 1}}
    merge = imported(config, tmp_path)["merges"]["merged"]
    assert merge["density"] == {"math": [{"filter": "mlp", "value": 0.2}, {"value": 1.0}], "code": 1.0}
    config["parameters"] = {"weight": 1, "density": [0.4, 0.6]}
    assert imported(config, tmp_path)["merges"]["merged"]["density"] == {
        "math": [{"filter": "mlp", "value": 0.2}, {"value": [0.4, 0.6]}],
        "code": [0.4, 0.6],
    }


def test_the_base_among_the_models(tmp_path: Path) -> None:
    models = [{"model": "org/base"}, *CONFIG["models"]]
    assert set(imported(CONFIG | {"models": models}, tmp_path)["experts"]) == {"math", "code"}
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("org/base", "org/math")]
    soup = imported({"merge_method": "linear", "models": models}, tmp_path)
    assert (soup["base"], set(soup["experts"])) == ("hub:org/base", {"base-2", "math"})


def test_models_without_a_base(tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("org/math", "org/code")]
    found = imported({"merge_method": "nuslerp", "models": models}, tmp_path)
    assert found["base"] == "hub:org/math"
    assert found["merges"]["merged"]["task_vectors"] is False


def test_adapters_and_names(tmp_path: Path) -> None:
    models = [
        {"model": "org/base+team/lora", "parameters": {"weight": 1}},
        {"model": {"model": {"path": "org/base"}, "lora": {"path": "other/lora", "revision": "v2"}}},
        {"model": "org/merged", "parameters": {"weight": 2}},
    ]
    models[1]["parameters"] = {"weight": 3}
    recipe = imported(CONFIG | {"models": models, "tokenizer_source": "org/merged"}, tmp_path)
    assert recipe["experts"] == {
        "lora": {"model": "hub:team/lora"},
        "lora-2": {"model": "hub:other/lora@v2"},
        "merged-2": {"model": "hub:org/merged"},
    }
    assert recipe["tokenizer"] == {"source": "merged-2", "pad_to_multiple_of": 1}


def test_folders_are_looked_for_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside" / "math").mkdir(parents=True)
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path)
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("math", "code")]
    recipe = imported(CONFIG | {"models": models}, tmp_path / "beside")
    assert [one["model"] for one in recipe["experts"].values()] == ["math", str(tmp_path / "code")]


def slices(*ranges: list[int]) -> dict[str, Any]:
    sources = [{"model": name, "layer_range": one} for name, one in zip(("base", "math"), ranges, strict=True)]
    return {"merge_method": "slerp", "base_model": "base", "slices": [{"sources": sources}], "parameters": {"t": 0.5}}


def test_one_slice_of_all_layers(tmp_path: Path) -> None:
    for name in ("base", "math"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    recipe = imported(slices([0, 4], [0, 4]), tmp_path)
    assert recipe["experts"] == {"math": {"model": "math"}}
    assert recipe["merges"]["merged"] == {"method": "slerp", "t": 0.5}
    with pytest.raises(InputError, match=r"layer_range: found \[0, 3\]; expected all layers, \[0, 4\]"):
        imported(slices([0, 4], [0, 3]), tmp_path)
    two = slices([0, 4], [0, 4])
    two["slices"] *= 2
    with pytest.raises(InputError, match="slices: only one slice, of all layers"):
        imported(two, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "magic"}, "merge_method: found 'magic'; expected one of"),
        ({"merge_method": ["ties"]}, "merge_method: found 'ties'|merge_method: found a list|merge_method: found"),
        ({"models": [{"model": "org/base"}]}, "models: there is only base_model; merge_method task_arithmetic merges"),
        ({"parameters": {1: 2, "density": 0.5}}, "parameters.1: merge_method task_arithmetic has no such parameter"),
        ({"base_model": "m" * 300}, "cannot be read .File name too long.; expected a folder or a hub id"),
        ({"base_model": "./missing"}, "'./missing': no such folder; expected one, or a hub id"),
        ({"models": [{"model": "org/a", "parameters": {"weight": []}}, *CONFIG["models"][1:]]}, "weight"),
        ({"base_model": None}, "base_model is missing"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"chat_template": "chatml"}, "chat_template: found 'chatml'; expected auto or a Jinja template"),
        ({"modules": {}}, "modules: a recipe has nothing like it"),
        ({"dtype": "int8"}, "dtype: found 'int8'; expected one of float32, bfloat16, float16"),
        ({"models": 5}, "models: found 5; expected a list of models"),
        ({"models": [{"model": "a/b", "x": 1}]}, r"models\[0\].x: unknown key"),
        ({"models": [{"model": "a/b"}, {"model": "a/c"}]}, r"models\[0\].parameters.weight is missing"),
        ({"parameters": {"density": 0.5}}, "parameters.density: merge_method task_arithmetic has no such parameter"),
        ({"parameters": {"lambda": "much"}}, "parameters.lambda: found 'much'; expected a number"),
        ({"tokenizer": {"source": "union", "pads": 8}}, "tokenizer.pads: unknown key; expected source, pad_to_mult"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "tokenizer_source: stands beside tokenizer; leave it out"),
        ({"tokenizer": {"tokens": {"<x>": {}}}}, "tokenizer.tokens.<x>: found {}; expected {source: …, force: "),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": "org/else"}}}},
            "tokenizer.tokens.<x>.source: org/else is none of the models that are merged",
        ),
        ({"tokenizer_source": "org/else"}, "tokenizer_source: org/else is none of the models that are merged"),
        ({"merge_method": "karcher"}, "parameters.weight: karcher has no weights"),
        (
            {"models": [{"model": "org/else+org/lora", "parameters": {"weight": 1}}, *CONFIG["models"]]},
            r"models\[0\].model: org/else\+org/lora is an adapter on another model",
        ),
        (
            {"models": [{"model": "org/math", "parameters": {"weight": 1, "lambda": 2}}, *CONFIG["models"][1:]]},
            "parameters.lambda: found other values for other models",
        ),
        (
            {"models": [{"model": "org/a", "parameters": {"weight": {"filter": "q", "value": 1}}}, *CONFIG["models"]]},
            r"models\[0\].parameters.weight: no filter fits all tensors",
        ),
    ],
)
def test_what_no_recipe_can_say_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as refused:
        imported(CONFIG | change, tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/config.yml: ")


def test_the_command_prints_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ties.yml").write_text(TIES)
    assert command_line("import", tmp_path / "ties.yml") == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(tmp_path / "ties.yml")


def test_a_recipe_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"name": "a", "base": {"model": "b", "subfolder": "c"}, "experts": {"a": {"model": "a"}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe | {"merges": {"a": {"method": "passthrough"}}}))
    assert command_line("import", tmp_path / "a.yaml") == 2
    assert "merge_method is missing; expected a configuration of mergekit" in capsys.readouterr().err


def test_the_printed_recipe_may_lie_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("base", "math"):
        (tmp_path / "configs" / name).mkdir(parents=True)
    one = {"model": "math", "parameters": {"weight": 0.5}}
    config = tmp_path / "configs" / "one.yml"
    config.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": "base", "models": [one]}))
    for folder, place in ((tmp_path, f"{tmp_path}/configs/"), (config.parent, "")):
        monkeypatch.chdir(folder)
        assert command_line("import", config) == 0
        recipe = yaml.safe_load(capsys.readouterr().out)
        assert (recipe["base"], recipe["experts"]["math"]["model"]) == (f"{place}base", f"{place}math")
