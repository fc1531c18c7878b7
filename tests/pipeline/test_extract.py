"""The command that writes a fine-tune as an adapter: what it prints and writes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sensmerge.pipeline.extract import parse_rank
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, make_llama, perturbed
from tests.hub_server import HubServer


@pytest.mark.parametrize(("text", "rank"), [("16", 16), ("1", 1), ("0.9", 0.9), ("1e-3", 0.001)])
def test_a_rank_or_a_share(text: str, rank: float) -> None:
    assert parse_rank(text) == rank


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "all", "nan", "inf", ""])
def test_other_ranks_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--rank {text}: expected a whole number"):
        parse_rank(text)


def test_it_writes_an_adapter_and_what_it_lacks(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "adapter"
    base, expert = llamas["base"], llamas["math"]
    assert command_line("extract", base, expert, "--rank", 4, "-o", target, "--store", tmp_path / "store") == 0
    out = capsys.readouterr().out
    errors = json.loads((target / "errors.json").read_text())
    part = errors["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert f"model.layers.0.mlp.up_proj.weight: rank 4, error {part['relative_error']:.3g}" in out
    embedding = errors["tensors"]["model.embed_tokens.weight"]
    line = "left out: it is not the weight of a linear layer"
    assert f"model.embed_tokens.weight: {line}, {embedding['share']:.2%} of the change" in out
    assert f"lacks {errors['relative_error']:.3g} of the change" in out
    assert sum(one["share"] for one in errors["tensors"].values()) == pytest.approx(1)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target)
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter", "store"}


def test_an_output_that_exists_is_left_alone(llamas: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    assert command_line("extract", llamas["base"], llamas["math"], "--rank", 4, "-o", target) == 2
    assert list(target.iterdir()) == []


def test_a_fine_tune_that_unties_is_refused(
    llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = save(perturbed(make_llama(tie_word_embeddings=False), 3), "untied", tmp_path)
    store = ("--store", tmp_path / "store")
    assert command_line("extract", llamas["base"], expert, "--rank", 4, "-o", tmp_path / "adapter", *store) == 2
    assert "changes one of two parameters that the base ties" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_base_on_the_hub_is_named_with_its_commit(llamas: dict[str, Path], hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_repo("org/base", {path.name: path.read_bytes() for path in llamas["base"].iterdir()})
    store = ("--store", tmp_path / "store")
    assert command_line("extract", "hub:org/base", llamas["math"], "--rank", 2, "-o", tmp_path / "one", *store) == 0
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)


def test_what_is_no_linear_weight_is_stored_whole_if_asked(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, store = tmp_path / "adapter", ("--store", tmp_path / "store")
    assert command_line("extract", llamas["base"], llamas["math"], "--rank", 32, "--whole", "-o", target, *store) == 0
    out = capsys.readouterr().out
    assert "model.norm.weight: stored whole" in out
    assert "left out" not in out
    assert json.loads((target / "errors.json").read_text())["relative_error"] < 1e-6
