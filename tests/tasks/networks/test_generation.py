"""Which tokens end a continuation, for every form in which a model says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.generation import end_tokens, generate, set_end_tokens
from sensmerge.tasks.stages.evaluate import EvaluateJob
from tests.conftest import make_adapter, make_llama, perturbed, stored


def greedy(network: LlamaForCausalLM, prompt: list[int], length: int) -> list[int]:
    """The likeliest continuation, token by token, whatever would end it."""
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def state(folder: Path, ends: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


@pytest.mark.parametrize("ends", [7, [7], [5, 7]])
def test_every_end_token_that_a_model_states_ends_it(
    tmp_path: Path, save: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, ends: Any
) -> None:
    base = save(make_llama(eos_token_id=[1, 9]), "base", tmp_path)
    network = LlamaForCausalLM.from_pretrained(base)
    state(base, ends)
    set_end_tokens(network, base, base)
    stated = ends if isinstance(ends, list) else [ends]
    assert end_tokens(network, tokenizer) == sorted({1, 9, *stated})


def test_the_end_token_of_an_own_tokenizer_counts(
    tmp_path: Path, save: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    base, expert = save(make_llama(), "base", tmp_path), save(make_llama(), "expert", tmp_path)
    settings = json.loads((expert / "tokenizer_config.json").read_text())
    (expert / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    for folder, ends in ((base, [1]), (expert, [1, 2])):
        network = LlamaForCausalLM.from_pretrained(folder)
        set_end_tokens(network, folder, base)
        assert end_tokens(network, tokenizer) == ends


def test_an_adapter_ends_as_its_base_does_unless_it_says_otherwise(
    tmp_path: Path, save: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = save(make_llama(), "base", tmp_path)
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules="all-linear")
    state(base, [1, 40])
    network = LlamaForCausalLM.from_pretrained(base)
    set_end_tokens(network, adapter, base)
    assert end_tokens(network, tokenizer) == [1, 40]
    state(adapter, 50)
    set_end_tokens(network, adapter, base)
    assert end_tokens(network, tokenizer) == [1, 50]


@pytest.mark.parametrize(
    "content",
    ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1.5]}', '{"eos_token_id": 9223372036854775808}', "[]", "{"],
)
def test_end_tokens_that_are_none(tmp_path: Path, save: Callable[..., Path], content: str) -> None:
    base = save(make_llama(), "base", tmp_path)
    (base / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: "):
        set_end_tokens(make_llama(), base, base)


def test_continuations_are_greedy_up_to_any_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    network = perturbed(make_llama(initializer_range=0.3), 1, 0.2).eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2=", "abcdefg", "x")]
    whole = [greedy(network, prompt, 10) for prompt in prompts]
    ends = {whole[0][4], whole[1][2]}
    network.generation_config = GenerationConfig(eos_token_id=sorted(ends), repetition_penalty=9.0)
    expected = []
    for ids in whole:
        stop = next((i for i, token in enumerate(ids) if token in ends | {1}), 10)
        expected.append(ids[:stop])
    assert generate(network, tokenizer, [{"input_ids": ids} for ids in prompts], 10, 2, "cpu") == expected
    assert len(expected[1]) <= 2


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_ends_its_answers_with_a_token_of_its_own_is_scored_by_it(
    tmp_path: Path, save: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, merged: bool
) -> None:
    """An expert's generation config counts for the expert, a merged folder's for the merged model."""
    base = save(make_llama(), "base", tmp_path)
    network = perturbed(make_llama(initializer_range=0.3), 1, 0.2).eval()
    model = save(network, "model", tmp_path)
    answer = greedy(network, tokenizer("1+2=")["input_ids"], 6)
    stop = next(i for i in range(1, 6) if answer[i] not in answer[:i])
    rows = [{"prompt": "1+2=", "completion": tokenizer.decode(answer[:stop])}]
    task = CompletionTask(kind="completion", generate=6, metric="exact_match")
    scores = []
    for ends in (1, [1, answer[stop]]):
        state(model, ends)
        out = tmp_path / str(ends)
        out.mkdir()
        files = Artifact("", base)
        job = EvaluateJob(
            files, Artifact("", model), None, files, task, stored(rows), None, "float32", {}, "math", not merged, "cpu"
        )
        scores.append(job.finish(out)["exact_match"]["value"])
    assert scores == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_reads_every_token_once_and_ends_with_its_last_answer(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    network = perturbed(make_llama(initializer_range=0.3), 1, 0.2).eval().to(dtype)
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2=", "abcdefghijk", "x", "y z", "9*8=72")]
    whole = [greedy(network, prompt, 10) for prompt in prompts]
    end = whole[0][3]
    network.generation_config = GenerationConfig(eos_token_id=[end])
    expected = []
    for ids in whole:
        stop = next((i for i, token in enumerate(ids) if token in (end, 1)), 10)
        expected.append(ids[:stop])
    read: list[tuple[int, ...]] = []
    with (
        torch.inference_mode(),
        network.model.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ),
    ):
        found = generate(network, tokenizer, [{"input_ids": ids} for ids in prompts], 10, 2, "cpu")
        together, read[:] = list(read), []
        alone = [generate(network, tokenizer, [{"input_ids": ids}], 10, 2, "cpu")[0] for ids in prompts]
    assert found == alone == expected
    steps = min(10, 1 + max(map(len, expected)))  # an end token is generated too
    longest = max(map(len, prompts))
    assert together == [(len(prompts), longest)] + [(len(prompts), 1)] * (steps - 1)
