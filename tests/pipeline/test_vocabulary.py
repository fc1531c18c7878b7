"""Experts whose tokens differ from the base's, merged, measured, scored and routed in one vocabulary."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.errors import InputError
from tests.conftest import do_steps, make_llama, perturbed, plan_of
from tests.tasks.networks.test_tokenizers import WORDS, word_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MERGES = {"ta": {"method": "task_arithmetic", "weight": 0.5}}
ALONE = {"ta": {"method": "passthrough"}}


def save(
    folder: Path, seed: int, rows: int, words: Sequence[str] = WORDS, added: Sequence[str] = (), **config: Any
) -> Path:
    """Save a fine-tune with so many rows, whose tokenizer has some words and added tokens."""
    base = make_llama(vocab_size=len(WORDS), **config)
    base.resize_token_embeddings(rows, mean_resizing=False)
    network = perturbed(base, seed) if seed else base
    network.config.eos_token_id = network.generation_config.eos_token_id = words.index("</s>")
    network.save_pretrained(folder)
    word_tokenizer(added, words=words).save_pretrained(folder)
    return folder


def recipe_of(*experts: str, **more: Any) -> dict[str, Any]:
    named = {one: {"model": one} for one in experts}
    merges = MERGES if len(experts) > 1 else ALONE
    return {"name": "words", "base": "base", "experts": named, "merges": merges} | more


def shuffled() -> list[str]:
    return [*WORDS[:3], *reversed(WORDS[3:])]


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_in_another_order_and_of_one_model_alone(tied: bool, tmp_path: Path) -> None:
    """Rows are matched by their tokens, and that of one expert's token is its own; files load in transformers."""
    config = {"tie_word_embeddings": tied}
    save(tmp_path / "base", 0, 40, **config)
    save(tmp_path / "a", 1, 41, added=["<a>"], **config)
    save(tmp_path / "b", 2, 48, shuffled(), ["<b>", "<c>"], **config)
    plan = plan_of(tmp_path, recipe_of("a", "b"))
    do_steps(plan)
    folder = plan.artifact("merge", "ta")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == {token: place for place, token in enumerate([*WORDS, "<a>", "<b>", "<c>"])}
    network, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert network.config.vocab_size == 43
    base, a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "a", "b"))
    merged, places = network.state_dict(), shuffled()
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        for row, token in enumerate(WORDS):
            expected = (a[name][row] + b[name][places.index(token)]) / 2
            torch.testing.assert_close(merged[name][row], expected, rtol=0, atol=1e-6)
        for row, expected in ((40, a[name][40]), (41, b[name][40]), (42, b[name][41])):
            torch.testing.assert_close(merged[name][row], expected, rtol=0, atol=1e-6)
    other = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(merged[other], (a[other] + b[other]) / 2, rtol=0, atol=1e-6)
    assert len(base[EMBEDDING]) == 40
    assert "tokenizer: embeddings of merged models have 43 rows; those of the base have 40" in plan.inputs.notes


def test_one_vocabulary_is_read_as_it_is(tmp_path: Path) -> None:
    """No tensor is gathered where all models have one vocabulary, whatever is in their tokenizers' other files."""
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, seed, 48)
    config = tmp_path / "a" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    plan = plan_of(tmp_path, recipe_of("a", "b"))
    assert plan.inputs.tokenizer.seen == {}
    assert plan.inputs.base.folder == tmp_path / "base"
    assert not plan.inputs.base.checkpoint.gathered


def test_rows_that_no_tokenizer_names_keep_their_places(tmp_path: Path) -> None:
    """Without tokenizers, a row more is the expert's own; `source: base` leaves it out."""
    for seed, (name, rows) in enumerate((("base", 40), ("a", 41), ("b", 40))):
        save(tmp_path / name, seed, rows)
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
    a, b = (load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in ("a", "b"))
    for source, rows in (("union", 41), ("base", 40), ("a", 41)):
        plan = plan_of(tmp_path, recipe_of("a", "b", tokenizer={"source": source}))
        do_steps(plan)
        assert any("rows of one number are taken to be of one token" in note for note in plan.inputs.notes)
        found = load_file(plan.artifact("merge", "ta") / "model.safetensors")[EMBEDDING]
        assert len(found) == rows
        torch.testing.assert_close(found[:40], (a[:40] + b) / 2, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[40:], a[40:][: rows - 40], rtol=0, atol=1e-6)


def test_a_named_source_without_the_tokens_of_others(tmp_path: Path) -> None:
    save(tmp_path / "base", 0, 48)
    save(tmp_path / "a", 1, 64, added=["<a>"])
    save(tmp_path / "b", 2, 41, shuffled(), ["<b>"])
    plan = plan_of(tmp_path, recipe_of("a", "b", tokenizer={"source": "b"}))
    do_steps(plan)
    found = load_file(plan.artifact("merge", "ta") / "model.safetensors")[EMBEDDING]
    a, b = (load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in ("a", "b"))
    expected = [(a[WORDS.index(token)] + b[row]) / 2 for row, token in enumerate(shuffled())]
    torch.testing.assert_close(found, torch.stack([*expected, b[40]]), rtol=0, atol=1e-6)
    assert any("merged models are without '<a>' (40) of experts.a" in note for note in plan.inputs.notes)


def masked(seed: int, rows: int) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    network = BertForMaskedLM(BertConfig(vocab_size=40, pad_token_id=0, **sizes))
    network.resize_token_embeddings(rows, mean_resizing=False)
    return perturbed(network, seed) if seed else network


def gpt2(seed: int, rows: int) -> PreTrainedModel:
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))
    network.resize_token_embeddings(rows, mean_resizing=False)
    return perturbed(network, seed) if seed else network


def bart(seed: int, rows: int) -> PreTrainedModel:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    torch.manual_seed(0)
    network = BartForConditionalGeneration(BartConfig(vocab_size=40, **sizes))
    network.resize_token_embeddings(rows, mean_resizing=False)
    return perturbed(network, seed) if seed else network


@pytest.mark.parametrize("make", [masked, gpt2, bart])
def test_whatever_has_a_row_for_every_token(make: Any, tmp_path: Path) -> None:
    """Heads' biases and all other tensors that are as long as the vocabulary have the merged one's length."""
    for seed, (name, words, added) in enumerate(
        (("base", WORDS, []), ("a", WORDS, ["<a>", "<x>"]), ("b", shuffled(), ["<x>"]))
    ):
        make(seed, 40 + len(added)).save_pretrained(tmp_path / name)
        word_tokenizer(added, words=words).save_pretrained(tmp_path / name)
    plan = plan_of(tmp_path, recipe_of("a", "b"))
    do_steps(plan)
    folder = plan.artifact("merge", "ta")
    network = type(make(0, 40))
    loaded, problems = network.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values())
    merged, a, b = (one.state_dict() for one in (loaded, *(network.from_pretrained(tmp_path / name) for name in "ab")))
    for name, value in merged.items():
        if not value.is_floating_point() or value.shape == a[name].shape == b[name].shape:
            continue
        axis = next(axis for axis, size in enumerate(value.shape) if size == 42)
        rows, ours, theirs = (one.movedim(axis, 0) for one in (value, a[name], b[name]))
        if not name.endswith("final_logits_bias"):  # zeros that nobody trains
            for row, token in enumerate([*WORDS, "<a>", "<x>"]):
                other = {"<a>": ours[40], "<x>": theirs[40]}.get(token)
                other = theirs[shuffled().index(token)] if other is None else other
                torch.testing.assert_close(rows[row], (ours[row] + other) / 2, rtol=0, atol=1e-6)
    assert loaded.config.vocab_size == 42


def test_token_ids_of_configs_follow_their_tokens(tmp_path: Path) -> None:
    words = [*WORDS[3:], *WORDS[:3]]
    save(tmp_path / "base", 0, 40)
    save(tmp_path / "a", 1, 41, words, ["<a>"])
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "a" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 37, "eos_token_id": [39, 40]}))
    plan = plan_of(tmp_path, recipe_of("a"))
    expert = plan.inputs.experts["a"]
    assert (expert.config.pad_token_id, expert.config.eos_token_id, expert.config.vocab_size) == (0, [2, 40], 41)
    generation = json.loads((expert.folder / "generation_config.json").read_text())
    assert (generation["pad_token_id"], generation["eos_token_id"]) == (0, [2, 40])
    do_steps(plan)
    folder = plan.artifact("merge", "ta")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [2, 40]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 40]


def test_what_makes_another_model_of_the_same_files(tmp_path: Path) -> None:
    """The vocabulary is in the fingerprints, and so are the files that rows are taken from, but no path."""
    save(tmp_path / "base", 0, 40)
    save(tmp_path / "a", 1, 41, added=["<a>"])
    save(tmp_path / "b", 2, 40)

    def prints(**tokenizer: Any) -> dict[str, str]:
        plan = plan_of(tmp_path, recipe_of("a", "b", tokenizer=tokenizer))
        return {step.title: step.key.fingerprint for step in plan.steps}

    first = prints()
    assert first == prints(source="union")
    assert first["merge ta"] != prints(source="base")["merge ta"]
    assert first["download a"] == prints(source="base")["download a"]


def test_a_model_s_own_file_is_no_view(tmp_path: Path) -> None:
    """What would name files elsewhere counts only in folders that the program wrote."""
    save(tmp_path / "base", 0, 40)
    save(tmp_path / "a", 1, 41, added=["<a>"])
    plan = plan_of(tmp_path, recipe_of("a"))
    view = plan.inputs.base.folder / ".view.json"
    assert len(open_checkpoint(view.parent).read(EMBEDDING)) == 41
    (tmp_path / "base" / ".view.json").write_bytes(view.read_bytes())
    assert len(open_checkpoint(tmp_path / "base").read(EMBEDDING)) == 40


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"source": "c"}, "tokenizer.source: found c; expected one of union, base, a"),
        ({"tokens": {"<n>": {"source": "c"}}}, "tokenizer.tokens.<n>.source: found c; expected one of base, a"),
        ({"tokens": {"<n>": {"source": "a"}}}, "tokenizer.tokens.<n>.source: experts.a has no token '<n>'"),
        (
            {"tokens": {"<n>": {"source": {"kind": "model_token", "model": "a", "token": "w99"}}}},
            "tokenizer.tokens.<n>.source: experts.a has no token 'w99'",
        ),
        (
            {"tokens": {"<n>": {"source": {"kind": "model_token", "model": "a", "token_id": 41}}}},
            "tokenizer.tokens.<n>.source.token_id: found 41; expected a row of experts.a, 0 to 40",
        ),
        ({"pad_to_multiple_of": 0}, "tokenizer.pad_to_multiple_of"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "base", 0, 40)
    save(tmp_path / "a", 1, 41, added=["<a>"])
    with pytest.raises(InputError, match=re.escape(message)):
        plan_of(tmp_path, recipe_of("a", tokenizer=tokenizer))
