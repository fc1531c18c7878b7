"""Adapters that train rows of tokens, or bring an embedding of another size, against peft's own merge."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.conftest import do_steps, make_llama, perturbed, plan_of
from tests.hub_server import HubServer
from tests.pipeline.test_vocabulary import EMBEDDING, HEAD, MERGES, recipe_of
from tests.tasks.networks.test_tokenizers import WORDS, word_tokenizer

ROWS = 44
"""Of the base: 40 words, and four rows that no token is of."""


def base_llama(tied: bool) -> LlamaForCausalLM:
    return make_llama(vocab_size=ROWS, tie_word_embeddings=tied)


def save_adapter(
    base: LlamaForCausalLM, folder: Path, seed: int, added: tuple[str, ...] = (), rows: int = ROWS, **settings: Any
) -> dict[str, Tensor]:
    """Save an adapter of the base with a tokenizer, and return what peft makes of both."""
    torch.manual_seed(seed)
    network = copy.deepcopy(base)
    if rows != ROWS:
        network.resize_token_embeddings(rows, mean_resizing=False)
    start = copy.deepcopy(network)
    usual = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(network, LoraConfig(**usual | settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    word_tokenizer(added).save_pretrained(folder)
    merged: dict[str, Tensor] = PeftModel.from_pretrained(start, folder).merge_and_unload().state_dict()
    return merged


def merged_of(folder: Path, *experts: str, **more: Any) -> dict[str, Tensor]:
    plan = plan_of(folder, recipe_of(*experts, **more))
    do_steps(plan)
    network, problems = AutoModelForCausalLM.from_pretrained(plan.artifact("merge", "ta"), output_loading_info=True)
    assert not any(problems.values())
    found: dict[str, Tensor] = network.state_dict()
    return found


@pytest.mark.parametrize(
    ("tied", "indices"), [(False, [39, 5, 7]), (False, {"embed_tokens": [39, 5], "lm_head": [3]}), (True, [39, 5])]
)
def test_rows_that_an_adapter_trains(tied: bool, indices: Any, tmp_path: Path) -> None:
    base = base_llama(tied)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    a = save_adapter(base, tmp_path / "a", 1, trainable_token_indices=indices)
    b = save_adapter(base, tmp_path / "b", 2, target_modules=["v_proj"])
    merged = merged_of(tmp_path, "a", "b")
    assert not torch.equal(a[EMBEDDING][39], base.state_dict()[EMBEDDING][39])
    for name, value in merged.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"trainable_token_indices": [40]}),
        (True, {"trainable_token_indices": [40]}),
        (False, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    ],
)
def test_a_token_that_an_adapter_trains_alone(tied: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    """In a row that no token of the base has: the row is the adapter's, and no untrained one is in it."""
    base = base_llama(tied)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    a = save_adapter(base, tmp_path / "a", 1, ("<a>",), **settings)
    b = save_adapter(base, tmp_path / "b", 2)
    merged = merged_of(tmp_path, "a", "b")
    assert not torch.equal(a[EMBEDDING][40], base.state_dict()[EMBEDDING][40])
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(merged[name][40], a[name][40], rtol=0, atol=1e-6)
    for name, value in merged.items():
        keep = [row for row in range(len(value)) if row != 40 or name not in (EMBEDDING, HEAD)]
        torch.testing.assert_close(value[keep], ((a[name] + b[name]) / 2)[keep], rtol=0, atol=1e-6)


def test_a_token_that_an_adapter_names_and_leaves_as_it_is(tmp_path: Path) -> None:
    """Its row is the base's, with all models in one vocabulary."""
    base = base_llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for seed, (name, added) in enumerate((("a", ("<a>",)), ("b", ()))):
        save_adapter(base, tmp_path / name, seed, added)
    plan = plan_of(tmp_path, recipe_of("a", "b"))
    assert plan.inputs.tokenizer.seen == {}
    assert AutoTokenizer.from_pretrained(plan.inputs.tokenizer.folder).get_vocab()["<a>"] == 40


@pytest.mark.parametrize("rows", [42, 48])
def test_an_embedding_and_a_head_of_another_size(rows: int, tmp_path: Path) -> None:
    base = base_llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    a = save_adapter(base, tmp_path / "a", 1, ("<a>", "<x>"), rows, **saved)
    b = save_adapter(base, tmp_path / "b", 2, ("<x>",), target_modules=["v_proj", "embed_tokens"])
    merged = merged_of(tmp_path, "a", "b")
    for name, value in merged.items():
        expected = (a[name][: len(WORDS)] + b[name][: len(WORDS)]) / 2 if name in (EMBEDDING, HEAD) else None
        expected = (a[name] + b[name]) / 2 if expected is None else expected
        torch.testing.assert_close(value[: len(expected)], expected, rtol=0, atol=1e-6)
    # <a> is a token of one of them alone, and <x> one of both, which number it differently.
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(merged[name][40], a[name][40], rtol=0, atol=1e-6)
    expected = (a[EMBEDDING][41] + b[EMBEDDING][40]) / 2
    torch.testing.assert_close(merged[EMBEDDING][41], expected, rtol=0, atol=1e-6)


def test_factors_of_an_embedding_beside_more_tokens(tmp_path: Path) -> None:
    """The factors' columns follow the tokens; rows that the adapter lacks are no change of it."""
    base = base_llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    a = save_adapter(base, tmp_path / "a", 1, target_modules=["q_proj", "embed_tokens", "lm_head"])
    words = [*WORDS[:3], *reversed(WORDS[3:])]
    full = copy.deepcopy(base)
    full.resize_token_embeddings(41, mean_resizing=False)
    perturbed(full, 3).save_pretrained(tmp_path / "b")
    word_tokenizer(["<b>"], words=words).save_pretrained(tmp_path / "b")
    merged, b = merged_of(tmp_path, "a", "b"), full.state_dict()
    for name in (EMBEDDING, HEAD):
        for row, token in enumerate(WORDS):
            expected = (a[name][row] + b[name][words.index(token)]) / 2
            torch.testing.assert_close(merged[name][row], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(merged[name][40], b[name][40], rtol=0, atol=1e-6)


def test_weights_that_are_not_here_yet(hub: HubServer, tmp_path: Path) -> None:
    """Only what must be compared is fetched for the plan, wherever its rows come from; jobs travel to workers."""
    base = base_llama(tied=False)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    full = copy.deepcopy(base)
    full.resize_token_embeddings(41, mean_resizing=False)
    perturbed(full, 3).save_pretrained(tmp_path / "a")
    word_tokenizer(["<a>"]).save_pretrained(tmp_path / "a")
    save_adapter(base, tmp_path / "b", 1)
    save_adapter(base_llama(tied=True), tmp_path / "c", 1, target_modules=["q_proj", "embed_tokens"])
    expected = merged_of(tmp_path, "a", "b", "c")
    for name in ("base", "a"):
        hub.add_repo(f"team/{name}", {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    recipe = recipe_of("b") | {"base": "hub:team/base", "merges": MERGES}
    recipe["experts"]["a"] = {"model": "hub:team/a"}
    plan = plan_of(tmp_path, recipe, store="hub")
    assert not list(plan.inputs.listings["base"].folder.glob("*.safetensors"))
    assert {"base", "a", "b"} == set(plan.inputs.tokenizer.seen)
    recipe["experts"]["c"] = {"model": "c"}  # whose copy of the base's embedding is compared with it
    plan = plan_of(tmp_path, recipe, store="hub")
    assert list(plan.inputs.listings["base"].folder.glob("*.safetensors"))
    for step in plan.steps:
        assert pickle.loads(pickle.dumps(step.job)) == step.job
    do_steps(plan)
    found = load_file(plan.artifact("merge", "ta") / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
