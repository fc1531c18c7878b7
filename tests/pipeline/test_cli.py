"""Bad input: one clear line on standard error, exit status 2, nothing half-written."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command

from sensmerge.pipeline import cli, cli_recipe
from sensmerge.pipeline.plan import plan as plan_module
from sensmerge.pipeline.store.store import Store
from tests.conftest import command_line, make_llama, perturbed, write_recipe, write_rows

Recipe = dict[str, Any]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail as bad input does; returns the one line it says."""

    def refused(recipe: Recipe, *more: object, command: str = "plan") -> str:
        path = write_recipe(tmp_path, recipe)
        capsys.readouterr()  # what was printed while models were made
        status = command_line(command, path, "--store", tmp_path / "store", *more)
        error = capsys.readouterr().err
        assert status == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        left = [path.name for path in (tmp_path / "store").glob("*")] if (tmp_path / "store").is_dir() else []
        assert set(left) <= {"hub", ".lock"}, "something half-written was left in the store"
        return error

    return refused


def broken_copy(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model folder with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_traceback_shows_no_password(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom sensmerge.pipeline import cli\nfrom sensmerge.pipeline.recipe.schema import Recipe\n"
        "def broken(): raise RuntimeError('https://user:canary@host/x')\n"
        "Recipe.model_json_schema = broken\nsys.argv = ['sensmerge', 'schema']\ncli.main()"
    )
    project = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | project)
    assert told.returncode == 1
    assert "RuntimeError: https://host/x" in told.stderr
    assert "canary" not in told.stderr


def test_misspelt_key(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    llama_recipe["merges"]["ta"]["wieght"] = 1
    assert "unknown key merges.ta.wieght" in refused(llama_recipe)


def test_missing_model_folder(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    llama_recipe["experts"]["math"]["model"] = "nowhere"
    assert "error: experts.math: " in refused(llama_recipe)


@pytest.mark.parametrize("key", ["experts.math.subfolder", "tasks.math.evaluation.data_files"])
def test_a_path_that_no_system_has(key: str, llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    assert "File name too long; use a shorter path" in refused(llama_recipe, "--set", f"{key}={'x' * 3000}")


def test_missing_data_file(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    llama_recipe["tasks"]["math"]["calibration"]["data_files"] = "none.jsonl"
    error = refused(llama_recipe)
    assert "tasks.math.calibration" in error
    assert "none.jsonl" in error


def test_another_architecture(llama_recipe: Recipe, berts: dict[str, Path], refused: Callable[..., str]) -> None:
    llama_recipe["experts"]["math"]["model"] = str(berts["mood"])
    assert "experts.math" in (error := refused(llama_recipe))
    assert "model_type 'bert', the base has 'llama'" in error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 16}, "hidden_size 16, the base has 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, the base has 2"),
    ],
)
def test_another_size(
    llama_recipe: Recipe,
    save: Callable[..., Path],
    refused: Callable[..., str],
    changes: dict[str, int],
    said: str,
) -> None:
    llama_recipe["experts"]["math"]["model"] = str(save(make_llama(**changes), "math"))
    assert said in refused(llama_recipe)


def test_a_generation_config_that_transformers_cannot_read(
    llama_recipe: Recipe, save: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    base = save(make_llama(), "base", tmp_path)
    (base / "generation_config.json").write_text('{"pad_token_id": "x"}')
    llama_recipe["base"] = str(base)
    assert f"{base}/generation_config.json: transformers cannot read it" in refused(llama_recipe)


@pytest.mark.parametrize("names", [5, [5], [["LlamaForCausalLM"]], "LlamaForCausalLM"])
def test_architectures_that_are_no_names(
    names: object, llama_recipe: Recipe, save: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = save(make_llama(), "base", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": names}))
    llama_recipe["base"] = str(path.parent)
    assert f"{path}: architectures is" in refused(llama_recipe)


def test_missing_tensor(
    llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = broken_copy(llamas["math"], tmp_path / "math", lambda tensors: tensors.__delitem__(name))
    llama_recipe["experts"]["math"]["model"] = str(folder)
    assert name in refused(llama_recipe)


def test_extra_tensor(
    llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    folder = broken_copy(llamas["math"], tmp_path / "math", lambda tensors: tensors.update({name: torch.ones(2)}))
    llama_recipe["experts"]["math"]["model"] = str(folder)
    assert name in refused(llama_recipe)


def test_same_expert_under_two_paths(
    llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(llamas["math"], tmp_path / "again")
    llama_recipe["experts"]["code"]["model"] = "again"
    assert "experts.code: the same files as experts.math" in refused(llama_recipe)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_the_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def garbage(path: Path) -> None:
    path.write_bytes(b"not safetensors at all")


@pytest.mark.parametrize("damage", [truncate, lie_about_the_header, garbage])
def test_corrupt_weights(
    llama_recipe: Recipe,
    llamas: dict[str, Path],
    tmp_path: Path,
    refused: Callable[..., str],
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(llamas["math"], tmp_path / "math")
    damage(tmp_path / "math" / "model.safetensors")
    llama_recipe["experts"]["math"]["model"] = "math"
    error = refused(llama_recipe)
    assert "model.safetensors: truncated or corrupt" in error
    assert "experts.math" in error


def test_index_that_names_files_outside(
    llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(llamas["math"], tmp_path / "math")
    (tmp_path / "math" / "model.safetensors").rename(tmp_path / "math" / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (tmp_path / "math" / "model.safetensors.index.json").write_text(json.dumps(index))
    llama_recipe["experts"]["math"]["model"] = "math"
    assert "'../secret.safetensors', which lies outside the folder" in refused(llama_recipe)


def test_pickle_only(
    llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(llamas["math"], tmp_path / "math")
    (tmp_path / "math" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "math" / "pytorch_model.bin")
    llama_recipe["experts"]["math"]["model"] = "math"
    assert "pickle" in refused(llama_recipe)


def test_adapter_for_another_base(
    llama_recipe: Recipe, tmp_path: Path, refused: Callable[..., str], lora: Callable[..., Path]
) -> None:
    adapter = lora(make_llama(hidden_size=16, intermediate_size=24), tmp_path / "lora")
    llama_recipe["experts"]["math"]["model"] = str(adapter)
    assert "made for another base" in refused(llama_recipe)


@pytest.fixture
def lora() -> Callable[..., Path]:
    from peft import LoraConfig, get_peft_model

    def lora(network: torch.nn.Module, folder: Path) -> Path:
        adapted = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.save_pretrained(folder)
        return folder

    return lora


def test_empty_calibration_set(llama_recipe: Recipe, tmp_path: Path, refused: Callable[..., str]) -> None:
    write_rows(tmp_path / "math.jsonl", [])
    assert "tasks.math.calibration" in refused(llama_recipe)


def test_row_without_the_field(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    llama_recipe["tasks"]["math"]["prompt"] = "{question}"
    error = refused(llama_recipe)
    assert "tasks.math" in error
    assert "question" in error


def test_language_model_task_on_an_encoder(berts: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    recipe = {
        "name": "r",
        "base": str(berts["base"]),
        "experts": {name: {"model": str(berts[name])} for name in ("mood", "topic")},
        "tasks": {"mood": {"kind": "completion", "evaluation": {"path": "json", "data_files": str(rows)}}},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }
    assert "tasks.mood.kind: completion needs a language model" in refused(recipe)


def test_generation_from_nothing(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    llama_recipe["tasks"]["math"] |= {"prompt": "", "generate": 4}
    assert "the prompt has no token to generate from" in refused(llama_recipe)


def test_recipe_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_bytes("name: é".encode("latin-1"))
    assert command_line("plan", tmp_path / "r.yaml") == 2
    assert "expected a recipe in UTF-8" in capsys.readouterr().err


def test_store_in_the_place_of_a_file(llama_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, llama_recipe)
    assert command_line("plan", recipe, "--store", recipe) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_label_out_of_range(berts: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    task = {"kind": "classification", "evaluation": {"path": "json", "data_files": str(rows)}}
    recipe = {
        "name": "r",
        "base": str(berts["base"]),
        "experts": {name: {"model": str(berts[name])} for name in ("mood", "topic")},
        "tasks": {"mood": task},
        "merges": {"ta": {"method": "task_arithmetic"}},
    }
    assert "label" in (error := refused(recipe))
    assert "2" in error


def test_task_of_a_kind_the_expert_is_not_for(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    llama_recipe["tasks"]["math"] = {
        "kind": "classification",
        "evaluation": {"path": "json", "data_files": "math.jsonl"},
    }
    del llama_recipe["merges"]["ties-sens"]
    assert "tasks.math.kind: classification" in refused(llama_recipe)


def test_sample_longer_than_the_model_takes(llama_recipe: Recipe, tmp_path: Path, refused: Callable[..., str]) -> None:
    write_rows(tmp_path / "math.jsonl", [{"prompt": "x" * 300, "completion": "y"} for _ in range(6)])
    error = refused(llama_recipe)
    assert f"tasks.math.calibration: line 3 of {tmp_path}/math.jsonl takes 302 tokens" in error
    assert "set tasks.math.max_length lower" in error


def test_layer_pattern_that_matches_nothing(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    weights = {"math": {"*": 1, "model.layers.9": 0.5}, "code": 1}
    llama_recipe["merges"] = {
        "e": {"method": "ties", "coefficients": {"kind": "explicit", "weights": weights}},
    }
    assert "no layer matches 'model.layers.9'" in refused(llama_recipe)
    weights["math"] = {"model.layers.1": 0.5}
    assert "no pattern matches layer model.embed_tokens" in refused(llama_recipe)


def test_no_room_on_the_disk(
    llama_recipe: Recipe, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: usage)
    assert "no room on the disk: the run writes" in refused(llama_recipe)


def test_locked_store(llama_recipe: Recipe, tmp_path: Path, refused: Callable[..., str]) -> None:
    with Store(tmp_path / "store").lock():
        assert "locked by another run" in refused(llama_recipe, command="run")


def test_unreachable_mlflow_server(llama_recipe: Recipe, refused: Callable[..., str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    assert uri in refused(llama_recipe, "--tracking-uri", uri, command="run")


@pytest.mark.parametrize(
    "words",
    [("run", "R"), ("refresh", "R"), ("compare", "a/1", "a/2"), ("promote", "a/1"), ("rollback", "a"), ("gc",)],
    ids=lambda words: words[0],
)
def test_the_environment_names_mlflow_where_no_option_does(
    words: tuple[str, ...],
    llama_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = write_recipe(tmp_path, llama_recipe)
    (tmp_path / "store").mkdir()
    command = [*(recipe if word == "R" else word for word in words), "--store", tmp_path / "store"]
    named = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert command_line(*command) == 2
    assert f"MLflow server unreachable at {named}" in capsys.readouterr().err
    assert command_line(*command, "--tracking-uri", "./mlruns") == 2
    assert "--tracking-uri, or MLFLOW_TRACKING_URI, is ./mlruns: expected a server" in capsys.readouterr().err


def test_what_the_environment_says_is_in_no_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A schedule starts `refresh` again and again: a password must not be read from the list of processes."""
    (tmp_path / "recipe.yaml").touch()
    command = get_command(cli.app).commands["refresh"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow")
    for more in ([], ["--tracking-uri", "http://other"]):
        context = command.make_context("refresh", [str(tmp_path / "recipe.yaml"), "--store", str(tmp_path), *more])
        assert cli_recipe._words(context, leave_out=()) == [
            *("refresh", "--store", str(tmp_path), *more, "--wait", "0.0", "--refused-exit-status", "3"),
            *("--", str(tmp_path / "recipe.yaml")),
        ]


def test_report_in_a_folder_that_is_not_there(
    llama_recipe: Recipe, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "--report" in refused(llama_recipe, "--report", tmp_path / "none" / "report.json", command="run")


def test_plan_prints_steps_and_writes_nothing(
    llama_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, llama_recipe)
    assert command_line("plan", path, "--store", tmp_path / "store") == 0
    out = capsys.readouterr().out
    assert "18 of 18 steps to run" in out
    assert "ties-sens" in out
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))


def test_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["required"]) == {"name", "base", "experts", "merges"}


def test_unknown_option_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("plan", "x.yaml", "--stor", "y") == 2
    assert "--stor" in capsys.readouterr().err


def test_two_fine_tunes_that_differ_only_in_weights_are_two_experts(
    llama_recipe: Recipe, save: Callable[..., Path], tmp_path: Path
) -> None:
    llama_recipe["experts"]["code"]["model"] = str(save(perturbed(make_llama(), 7), "code"))
    assert command_line("plan", write_recipe(tmp_path, llama_recipe), "--store", tmp_path / "store") == 0


def test_a_store_that_may_only_be_read_is_planned_with(llama_recipe: Recipe, tmp_path: Path) -> None:
    store, bound = tmp_path / "store", []
    store.mkdir()
    store.chmod(0o555)
    for name in ("base", "math", "code"):  # else too new for their digests to be kept
        entry = llama_recipe if name == "base" else llama_recipe["experts"][name]
        key = "base" if name == "base" else "model"
        entry[key] = str(shutil.copytree(entry[key], tmp_path / name))
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1e9, 1e9))
    if os.geteuid() == 0:  # who may write everywhere
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv to give up a right of root")
        bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    plan = [*bound, sys.executable, "-m", "sensmerge.pipeline", "plan", str(write_recipe(tmp_path, llama_recipe))]
    done = subprocess.run([*plan, "--store", str(store)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "18 of 18 steps to run" in done.stdout
    named = ["--set", "tokenizer={source: math}"]
    done = subprocess.run([*plan, "--store", str(store), *named], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--store: {store}/hub/.tokenizers cannot be written (Permission denied)" in done.stderr
    assert not list(store.iterdir())


def test_what_goes_to_a_pipe_is_not_cut(
    llama_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "a-variant-whose-name-says-what-is-special-about-it-and-then-some-more-that-is-less-special"
    llama_recipe["merges"] = {long: {"method": "task_arithmetic"}}
    command = ("plan", write_recipe(tmp_path, llama_recipe), "--store", tmp_path / "store")
    assert command_line(*command) == 0
    assert f" {long}: math, code " in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "70")
    assert command_line(*command) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if "│" in line) <= 70
