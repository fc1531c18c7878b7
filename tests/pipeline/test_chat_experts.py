"""A fine-tuned chat model, and experts whose tokenizers, templates, end tokens and configs differ from it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sensmerge.tasks.checkpoints.companions import LARGEST
from sensmerge.tasks.errors import InputError
from tests.conftest import do_steps, make_llama, perturbed, plan_of, write_rows
from tests.tasks.networks.test_tokenizers import ROWS, TEMPLATE, WORDS, word_tokenizer

OTHER = "{% for m in messages %}<turn> {{ m.content }} <done> {% endfor %}"
TURN, DONE = len(WORDS) + 2, len(WORDS) + 3
EMBEDDING = "model.embed_tokens.weight"


def save(folder: Path, seed: int, ends: int | list[int], template: str | None, added: list[str], **config: Any) -> None:
    """Save a fine-tune with a tokenizer, a template and end tokens of its own."""
    network = perturbed(make_llama(vocab_size=ROWS, **config), seed)
    network.generation_config.eos_token_id = ends
    network.config.eos_token_id = ends[-1] if isinstance(ends, list) else ends
    network.save_pretrained(folder)
    word_tokenizer(added, template, eos=added[-1]).save_pretrained(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """The base has two tokens for turns; one expert has them too, the other two more, and ends its answers by them."""
    chat = ["<|im_start|>", "<|im_end|>"]
    save(tmp_path / "base", 0, [2, len(WORDS) + 1], TEMPLATE, chat)
    save(tmp_path / "same", 1, len(WORDS) + 1, TEMPLATE, chat)
    theta = {"rope_type": "default", "rope_theta": 1e6}
    save(tmp_path / "other", 2, DONE, OTHER, [*chat, "<turn>", "<done>"], rope_parameters=theta)
    return {
        "name": "chat",
        "base": "base",
        "experts": {"same": {"model": "same"}, "other": {"model": "other", "config": "base"}},
        "merges": {"ta": {"method": "task_arithmetic", "weight": 0.5}},
    }


def merged(recipe: dict[str, Any], folder: Path) -> tuple[Path, tuple[str, ...]]:
    plan = plan_of(folder, recipe)
    do_steps(plan)
    return plan.artifact("merge", "ta"), plan.inputs.notes


def assert_rows_are_merged(folder: Path, models: Path) -> None:
    """Every row of the embedding is the mean of the experts', but for those of tokens that only one of them has."""
    same, other = (load_file(models / name / "model.safetensors")[EMBEDDING] for name in ("same", "other"))
    found = load_file(folder / "model.safetensors")[EMBEDDING]
    for row in range(ROWS):
        expected = other[row] if row in (TURN, DONE) else (same[row] + other[row]) / 2
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)


def test_the_base_s_with_the_tokens_that_experts_add(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder, notes = merged(recipe, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = {word: number for number, word in enumerate([*WORDS, "<|im_start|>", "<|im_end|>", "<turn>", "<done>"])}
    assert tokenizer.get_vocab() == expected
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, len(WORDS) + 1, DONE]
    ids = tokenizer.apply_chat_template([{"content": "w1"}], tokenize=True, return_dict=False)
    assert ids == [len(WORDS), expected["w1"], len(WORDS) + 1]
    assert_rows_are_merged(folder, tmp_path)
    assert any("experts.other has another" in note for note in notes)
    assert any("runs with the base's settings" in note and "rope_theta" in note for note in notes)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.rope_parameters["rope_theta"] == make_llama().config.rope_parameters["rope_theta"]


def test_all_of_a_named_expert(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = merged(recipe | {"tokenizer": {"source": "other"}}, tmp_path)
    tokenizer, own = (AutoTokenizer.from_pretrained(one) for one in (folder, tmp_path / "other"))
    assert tokenizer.get_vocab() == own.get_vocab()
    assert tokenizer.chat_template == OTHER
    assert tokenizer.eos_token == "<done>"
    chat = [{"content": "w1"}, {"content": "w2"}]
    ids = [one.apply_chat_template(chat, tokenize=True, return_dict=False) for one in (tokenizer, own)]
    assert ids[0] == ids[1] == [TURN, 4, DONE, TURN, 5, DONE]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == DONE
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == DONE
    assert_rows_are_merged(folder, tmp_path)


def test_one_id_with_two_tokens(recipe: dict[str, Any], tmp_path: Path) -> None:
    word_tokenizer(["<|im_start|>", "<|im_end|>", "<tool>"], TEMPLATE, "<|im_end|>").save_pretrained(tmp_path / "same")
    folder, notes = merged(recipe, tmp_path)
    assert any("id 42 is '<tool>' and '<turn>'; rows are matched by their tokens" in note for note in notes)
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert [ids[token] for token in ("<tool>", "<turn>", "<done>")] == [TURN, TURN + 1, TURN + 2]
    same, other = (load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in ("same", "other"))
    found = load_file(folder / "model.safetensors")[EMBEDDING]
    for row, expected in ((TURN, same[TURN]), (TURN + 1, other[TURN]), (TURN + 2, other[DONE])):
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
    folder, _ = merged(recipe | {"tokenizer": {"source": "same"}}, tmp_path)
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(TURN) == "<tool>"
    torch.testing.assert_close(load_file(folder / "model.safetensors")[EMBEDDING][TURN], same[TURN], rtol=0, atol=1e-6)


def test_a_template_of_its_own(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A recipe's, or that of most models; the tokenizer is the base's."""
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    for asked, expected in ((own, own), ("auto", TEMPLATE)):
        folder, notes = merged(recipe | {"tokenizer": {"chat_template": asked}}, tmp_path)
        assert AutoTokenizer.from_pretrained(folder).chat_template == expected
        assert not any("has another" in note for note in notes)
    for asked in (
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ messages[9].content }}",
    ):
        plan_of(tmp_path, recipe | {"tokenizer": {"chat_template": asked}})  # others than those tried it may write
    with pytest.raises(InputError, match=r"tokenizer.chat_template: no Jinja template \(.*\); correct it"):
        plan_of(tmp_path, recipe | {"tokenizer": {"chat_template": "{% for m in messages %}"}})
    with pytest.raises(InputError, match=r"tokenizer.chat_template"):
        plan_of(tmp_path, recipe | {"tokenizer": {"chat_template": "chatml"}})


def test_other_settings_are_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["experts"]["other"]["config"]
    with pytest.raises(InputError, match=r"experts.other: .* rope_parameters.rope_theta 1000000.0 .the base has 10000"):
        plan_of(tmp_path, recipe)


def test_whose_tokenizer_it_is_changes_what_reads_texts_and_what_is_merged(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5"}]
    )
    recipe["tasks"] = {"same": {"kind": "completion", "evaluation": {"path": "json", "data_files": rows.name}}}
    (tmp_path / "base" / "large.json").write_bytes(b"0" * (LARGEST + 1))
    prints = []
    for source in ("union", "base", "other"):
        plan = plan_of(tmp_path, recipe | {"tokenizer": {"source": source}})
        prints.append({step.title: step.key.fingerprint for step in plan.steps})
        assert any("large.json, of more than 100 MiB, is left out" in note for note in plan.inputs.notes)
    for one, other in itertools.combinations(prints, 2):
        assert {title.split()[0] for title in one if one[title] != other[title]} == {"merge", "evaluate"}
