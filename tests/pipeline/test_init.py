"""Recipes that `init` writes are recipes, whatever the models are called and say of themselves."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from sensmerge.pipeline.init import new_recipe
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, make_adapter, make_llama, write_rows


def uncommented(text: str) -> str:
    """The recipe with its tasks, and the merges that need them."""
    lines = [line for line in text.splitlines() if not re.match(r"# [A-Zs(]|  # These", line)]
    return "\n".join(re.sub(r"^( *)# ", r"\1", line) for line in lines)


def test_a_recipe_for_what_is_there(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(make_llama(), tmp_path / "lora", 3, r=4, task_type="CAUSAL_LM")
    target, data = tmp_path / "recipe.yaml", tmp_path / "data"
    models = (llamas["base"], llamas["math"], adapter)
    assert command_line("init", *models, "-o", target, "--store", tmp_path / "store") == 0
    assert capsys.readouterr().out.endswith(f"wrote {target}; next: sensmerge plan {target}\n")
    assert not (tmp_path / "store").exists()
    text = target.read_text()
    assert "hub work too) and uncomment them.\n# tasks:\n" in text
    assert re.search(r"^base: .*  # LlamaForCausalLM, [\d.]+ kB, float32$", text, re.MULTILINE)
    assert re.search(r"^  lora: \{model: .*lora\}  # adapter, rank 4, [\d.]+ kB$", text, re.MULTILINE)
    recipe = load_recipe(target)
    assert list(recipe.experts) == ["math", "lora"]
    assert list(recipe.merges) == [*(f"ta-weight-{weight}" for weight in (0.3, 0.5, 0.7, 1.0)), "ties", "tsv"]

    target.write_text(uncommented(text))
    for name in recipe.experts:
        (data / name).mkdir(parents=True)
        for file in ("train", "test"):
            rows = [{"prompt": f"{file} {n} is", "completion": f" {n + 1}"} for n in range(200)]
            write_rows(data / name / f"{file}.jsonl", rows)
    recipe = load_recipe(target)
    assert {name: task.kind for name, task in recipe.tasks.items()} == {"math": "completion", "lora": "completion"}
    assert set(recipe.merges) >= {"regmean", "tuned", "ta-sens", "ta-se"}
    assert command_line("plan", target, "--store", tmp_path / "store") == 0
    assert "evaluate" in capsys.readouterr().out


def test_kinds_of_tasks(llamas: dict[str, Path], berts: dict[str, Path], tmp_path: Path) -> None:
    def kinds(base: Path, *experts: Path) -> list[str]:
        text = new_recipe(str(base), [str(one) for one in experts], tmp_path, tmp_path)
        return [one["kind"] for one in yaml.safe_load(uncommented(text)).get("tasks", {}).values()]

    chatting = shutil.copytree(llamas["math"], tmp_path / "chatting")
    (chatting / "chat_template.jinja").write_text("{{ messages }}")
    adapter = make_adapter(make_llama(), tmp_path / "lora", 3)
    assert kinds(llamas["base"], chatting, llamas["math"], adapter) == ["chat", "completion", "completion"]
    assert kinds(chatting, llamas["math"], adapter) == ["chat", "chat"]
    base, *experts = berts.values()
    assert kinds(base, *experts) == ["classification"] * len(experts)
    scoring = shutil.copytree(experts[0], tmp_path / "scoring")
    config = json.loads((scoring / "config.json").read_text()) | {"id2label": {"0": "LABEL_0"}}
    (scoring / "config.json").write_text(json.dumps(config))
    assert kinds(base, scoring) == ["regression"]
    (chatting / "config.json").write_text(json.dumps({"architectures": ["NotYetKnown"]}))
    assert kinds(llamas["base"], chatting) == []


@pytest.mark.parametrize("name", ["a: b # c", "x\ny: 1", "- 'q\"", "ünï", "base", "..."])
def test_names_and_what_models_say_stay_where_they_are(name: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    for place in ("one", "two"):
        folder = shutil.copytree(llamas["math"], tmp_path / place / name)
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["A\nmerges: {}"], "dtype": "x\u2028y: 1"}
        (folder / "config.json").write_text(json.dumps(config))
    experts = [str(tmp_path / place / name) for place in ("one", "two")]
    recipe = yaml.safe_load(new_recipe(str(llamas["base"]), experts, tmp_path, tmp_path))
    assert set(recipe) == {"name", "base", "experts", "merges"}
    assert [one["model"] for one in recipe["experts"].values()] == experts
    assert len(recipe["experts"]) == 2


def test_one_expert_is_mixed_with_its_base(llamas: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "recipe.yaml"
    target.write_text(new_recipe(str(llamas["base"]), [str(llamas["math"])], tmp_path, tmp_path))
    assert list(load_recipe(target).merges) == ["mixed-weight-0.25", "mixed-weight-0.5", "mixed-weight-0.75"]
    target.write_text(uncommented(target.read_text()))
    assert list(load_recipe(target).merges)[3:] == ["tuned"]


def test_nothing_is_written_over(llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    models = (llamas["base"], llamas["math"])
    assert command_line("init", *models, "-o", tmp_path / "recipe.yaml") == 2
    assert "exists; name a file that does not" in capsys.readouterr().err
    assert command_line("init", *models, "-o", tmp_path / "none" / "recipe.yaml") == 2
    assert command_line("init", llamas["base"], tmp_path / "nothing") == 2
    assert "no such folder" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_a_model_twice_is_named(llamas: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experts math and math-2 are the same model"):
        new_recipe(str(llamas["base"]), [str(llamas["math"])] * 2, tmp_path, tmp_path)
