"""Which tokens end a continuation, for every form in which a model says so; and how they are drawn."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.generation import (
    GREEDY,
    Decoding,
    _Draws,
    check_unused,
    end_tokens,
    generate,
    set_end_tokens,
    written,
)
from sensmerge.tasks.networks.tokens import Inputs
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
    assert generate(network, tokenizer, [{"input_ids": ids} for ids in prompts], 10) == expected
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
        found = generate(network, tokenizer, [{"input_ids": ids} for ids in prompts], 10)
        together, read[:] = list(read), []
        alone = [generate(network, tokenizer, [{"input_ids": ids}], 10)[0] for ids in prompts]
    assert found == alone == expected
    steps = min(10, 1 + max(map(len, expected)))  # an end token is generated too
    longest = max(map(len, prompts))
    assert together == [(len(prompts), longest)] + [(len(prompts), 1)] * (steps - 1)


# Draws and ends -------------------------------------------------------------------------------------------------------


def rows_of(*texts: str, tokenizer: PreTrainedTokenizerFast) -> list[Inputs]:
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]


def test_draws_have_the_probabilities_of_temperature_and_top_p(tokenizer: PreTrainedTokenizerFast) -> None:
    network = make_llama(initializer_range=0.3).eval()
    network.generation_config = GenerationConfig()
    (prompt,) = rows_of("1+2=", tokenizer=tokenizer)
    with torch.inference_mode():
        logits = network(torch.tensor([prompt["input_ids"]])).logits[0, -1]
    expected = (logits / 0.7).softmax(-1)
    likeliest = expected.sort(descending=True).indices
    kept = likeliest[: int((expected[likeliest].cumsum(0) < 0.6).sum()) + 1]
    counts = torch.zeros(len(logits))
    draws = 3000
    for start in range(0, draws, 500):
        seeds = range(start, start + 500)
        drawn = _Draws(Decoding(temperature=0.7, top_p=0.6), [prompt] * 500)
        drawn._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = drawn(torch.zeros(500, 1, dtype=torch.long), logits.expand(500, -1).clone()).argmax(-1)
        counts += found.bincount(minlength=len(logits))
    assert set(counts.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    share = expected[kept] / expected[kept].sum()
    assert (counts[kept] / draws - share).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_a_draw_depends_on_prompt_and_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    network = make_llama(initializer_range=0.3).eval()
    network.generation_config = GenerationConfig()
    prompts = rows_of("1+2=", "abcdefg", "x", "1+2=", tokenizer=tokenizer)
    how = Decoding(temperature=1.0, seed=3)
    found = generate(network, tokenizer, prompts, 12, how)
    assert found == [generate(network, tokenizer, [one], 12, how)[0] for one in prompts]
    assert found[0] == found[3]
    assert len({*map(tuple, found)}) == 3
    assert found != generate(network, tokenizer, prompts, 12, Decoding(temperature=1.0, seed=4))
    nearly = generate(network, tokenizer, prompts, 12, Decoding(temperature=1e-4))
    assert nearly == generate(network, tokenizer, prompts, 12)


def test_a_text_that_is_to_end_a_continuation_does(tokenizer: PreTrainedTokenizerFast) -> None:
    network = perturbed(make_llama(initializer_range=0.3), 1, 0.2).eval()
    network.generation_config = GenerationConfig()
    prompts = rows_of("1+2=", "abcdefg", "x", tokenizer=tokenizer)
    whole = [written(ids, tokenizer) for ids in generate(network, tokenizer, prompts, 12)]
    stop = (whole[0][4:6], whole[1][3])
    expected = [min((text[: text.find(one)] for one in stop if one in text), key=len, default=text) for text in whole]
    assert expected != whole
    read: list[int] = []
    with network.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        found = generate(network, tokenizer, prompts[:1], 12, Decoding(stop=stop[:1]))
    assert len(read) == len(found[0]) < 12  # nothing is computed after it
    found = generate(network, tokenizer, prompts, 12, Decoding(stop=stop))
    assert [written(ids, tokenizer, stop) for ids in found] == expected


def test_every_text_so_far_is_heard(tokenizer: PreTrainedTokenizerFast) -> None:
    network = make_llama(initializer_range=0.3).eval()
    network.generation_config = GenerationConfig()
    heard: list[str] = []
    (ids,) = generate(network, tokenizer, rows_of("1+2=", tokenizer=tokenizer), 9, GREEDY, heard.append)
    assert heard[: len(ids)] == [written(ids[: place + 1], tokenizer) for place in range(len(ids))]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": 0.9}, "top_p is 0.9, but temperature is 0: nothing is drawn"),
        ({"stop": ("a", "")}, "stop has an empty text"),
    ],
    ids=range(7),
)
def test_settings_out_of_their_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        Decoding(**settings)


@pytest.mark.parametrize(
    ("most", "how", "said"),
    [
        (5, GREEDY, "max_new_tokens is 5, but the model writes no text; leave it out"),
        (None, Decoding(temperature=0.5), "temperature is 0.5, but"),
        (None, Decoding(stop=("a",)), r"stop is \('a',\), but"),
        (None, Decoding(seed=1), "seed is 1, but"),
    ],
    ids=range(4),
)
def test_what_a_classifier_has_no_use_for(most: int | None, how: Decoding, said: str) -> None:
    check_unused(None, GREEDY)
    with pytest.raises(InputError, match=f"^{said}"):
        check_unused(most, how)
