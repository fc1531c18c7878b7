"""Experts whose tokens differ from the base's, merged, measured, scored and routed in one vocabulary."""

import copy
import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from sensmerge.tasks.checkpoints.checkpoint import WEIGHTS, open_checkpoint
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.expert import load_network
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.statistics.statistic import read_layers
from tests.conftest import SHARED, do_steps, make_llama, perturbed, plan_of, write_rows
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


def test_another_architecture_is_named_as_such(tmp_path: Path) -> None:
    """And not by the tokens that it lacks."""
    save(tmp_path / "base", 0, 40)
    GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "a")
    word_tokenizer(["<a>"]).save_pretrained(tmp_path / "a")
    with pytest.raises(
        InputError, match=r"experts\.a: .* has model_type 'gpt2', the base has 'llama'; expected a fine-tune"
    ):
        plan_of(tmp_path, recipe_of("a"))


PLACES = [*WORDS, "<a>", "<b>"]
"""The tokens of merged models, in their order."""


def by_hand(folder: Path, words: Sequence[str], others: dict[str, torch.Tensor]) -> PreTrainedModel:
    """An expert whose embedding has the rows of merged models, put together token by token."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    own = dict(zip(words, network.get_input_embeddings().weight.detach().clone(), strict=True))
    network.resize_token_embeddings(len(PLACES), mean_resizing=False)
    with torch.no_grad():
        network.get_input_embeddings().weight.copy_(
            torch.stack([own[one] if one in own else others[one] for one in PLACES])
        )
    return network.eval()


def task(folder: Path, name: str, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    write_rows(folder / f"{name}.jsonl", rows[:2])
    write_rows(folder / f"{name}-test.jsonl", rows[2:])
    calibration, evaluation = ({"path": "json", "data_files": f"{name}{end}.jsonl"} for end in ("", "-test"))
    return {"kind": "completion", "calibration": calibration, "evaluation": evaluation, "end_token": False}


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, list[str]]]:
    """A folder with base and two experts, each with a token of its own; a recipe with tasks that use them."""
    words = {"a": [*WORDS, "<a>"], "b": [*shuffled(), "<b>"]}
    save(tmp_path / "base", 0, 40)
    save(tmp_path / "a", 1, 41, added=["<a>"])
    save(tmp_path / "b", 2, 41, shuffled(), ["<b>"])
    tasks = {}
    for name, own in words.items():
        network = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        texts = []
        for number in range(5):
            prompt = f"w{number} <{name}> w{2 * number + 3}"
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            answer = network.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :].tolist()
            texts.append((prompt, f" {own[answer[0]]}"))
        tasks[name] = task(tmp_path, name, texts) | {"generate": 1}
    merges: dict[str, Any] = {
        "ta": {"method": "task_arithmetic", "weight": 0.5},
        "sens": {"method": "ties", "coefficients": {"kind": "sens", "temperature": 0.5}},
        "se": {
            "method": "task_arithmetic",
            "weight": 0.5,
            "application": {"kind": "se", "temperature": 1e6, "score": "centroid", "layer": 1, "pool": "mean"},
        },
        "calibrated": {"method": "task_arithmetic", "weight": 0.5, "calibrate": {}},
        "tuned": {"method": "task_arithmetic", "tune": {"weight": [0.3, 0.5]}},
        "alone": {"method": "task_arithmetic", "coefficients": {"kind": "explicit", "weights": {"a": 1.0, "b": 0.0}}},
    }
    return tmp_path, recipe_of("a", "b", tasks=tasks, merges=merges), words


def test_measured_scored_and_routed_in_one_vocabulary(
    measured: tuple[Path, dict[str, Any], dict[str, list[str]]],
) -> None:
    folder, recipe, words = measured
    plan = plan_of(folder, recipe)
    do_steps(plan)
    rows = {
        name: AutoModelForCausalLM.from_pretrained(folder / name).get_input_embeddings().weight.detach()[40]
        for name in words
    }
    others = {f"<{name}>": row for name, row in rows.items()}
    experts = {name: by_hand(folder / name, own, others) for name, own in words.items()}
    texts = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in words}
    samples = {
        name: [[[PLACES.index(word) for word in row[key].split()] for key in ("prompt", "completion")] for row in found]
        for name, found in texts.items()
    }

    for name, network in experts.items():
        total: dict[str, float] = {}
        for prompt, completion in samples[name]:
            network.zero_grad()
            ids = torch.tensor([prompt + completion])
            network(ids, labels=torch.tensor([[-100] * len(prompt) + completion])).loss.backward()
            for key, parameter in network.named_parameters():
                layer = layer_of(key)
                value = float((parameter.detach() * parameter.grad).abs().double().sum())
                total[layer] = total.get(layer, 0) + value / len(samples[name])
        found = read_layers(plan.artifact("statistics", name), "sensitivity")
        assert found == pytest.approx(total, rel=1e-5)

    distances = json.loads((plan.artifact("cross_task", "all") / "distances.json").read_text())
    for i, j in (("a", "b"), ("b", "a")):
        norms = []
        for prompt, completion in samples[j]:
            with torch.no_grad():
                ours, theirs = (experts[name](torch.tensor([prompt + completion])).logits[0] for name in (i, j))
            norms.append(float((ours - theirs).norm(dim=-1).mean()))
        assert distances[i][j] == pytest.approx(sum(norms) / len(norms), rel=1e-5)

    for name in words:  # an expert answers its own task as it does alone, whatever the others' tokens are
        scores = json.loads((plan.artifact("evaluate", f"{name}/{name}") / "scores.json").read_text())
        assert scores["exact_match"]["value"] == 1.0
    scores = json.loads((plan.artifact("evaluate", "alone/a") / "scores.json").read_text())
    assert scores["exact_match"]["value"] == 1.0

    static = AutoModelForCausalLM.from_pretrained(plan.artifact("merge", "ta")).eval()
    dynamic = DynamicModel.load(plan.artifact("route", "se"))
    inputs = [{"input_ids": samples["b"][0][0]}]
    with torch.no_grad():
        (logits,) = dynamic.logits(inputs, dynamic.route(inputs))
        expected = static(torch.tensor([inputs[0]["input_ids"]])).logits[0]
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=0, atol=1e-4)
    assert len(PLACES) == expected.shape[1]


def test_an_expert_gives_the_logits_of_its_own_tokens(
    measured: tuple[Path, dict[str, Any], dict[str, list[str]]],
) -> None:
    """In the vocabulary of merged models, and alone in a merge."""
    folder, recipe, words = measured
    plan = plan_of(folder, recipe)
    expert = plan.inputs.experts["b"]
    own = AutoTokenizer.from_pretrained(folder / "b")
    seen = load_tokenizer(expert.folder)
    text = "w1 <b> w30 </s> w7"
    ids, moved = own(text).input_ids, seen(text)["input_ids"]
    assert moved == [PLACES.index(one) for one in text.split()]
    assert ids != moved
    assert (seen.eos_token_id, seen.bos_token_id, seen.pad_token_id) == (2, 1, None)
    assert seen.decode(moved) == own.decode(ids)
    network = load_network(expert, "causal_lm", torch.float32, "cpu")
    places = [PLACES.index(one) for one in words["b"]]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder / "b").eval()(torch.tensor([ids])).logits
        torch.testing.assert_close(network(torch.tensor([moved])).logits[..., places], expected, rtol=0, atol=1e-5)
    alone = plan_of(folder, recipe_of("b"), store="alone")
    do_steps(alone)
    merged = AutoModelForCausalLM.from_pretrained(alone.artifact("merge", "ta")).eval()
    reader = AutoTokenizer.from_pretrained(alone.artifact("merge", "ta"))
    places = [reader.get_vocab()[one] for one in words["b"]]
    with torch.no_grad():
        found = merged(torch.tensor([reader(text).input_ids])).logits[..., places]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tokens_that_merged_models_lack_are_read_as_they_read_them(
    measured: tuple[Path, dict[str, Any], dict[str, list[str]]],
) -> None:
    folder, recipe, _ = measured
    plan = plan_of(folder, recipe | {"tokenizer": {"source": "a"}})
    assert set(plan.inputs.tokenizer.readers) == {"a"}
    assert plan.inputs.tokenizer.of("b") == plan.inputs.tokenizer.artifact


def test_classifiers_with_tokens_of_their_own(berts: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    """They have heads of their own, on a trunk whose embedding has the tokens of both."""
    tasks = {}
    for name, token, numbers in (("mood", "<mood>", (0, 1)), ("topic", "<topic>", (0, 1, 2))):
        network = AutoModelForSequenceClassification.from_pretrained(berts[name])
        network.resize_token_embeddings(260, mean_resizing=False)
        with torch.no_grad():
            network.get_input_embeddings().weight[259] = 0.5 * torch.randn(
                32, generator=torch.Generator().manual_seed(1)
            )
        network.eval().save_pretrained(tmp_path / name)
        reader = copy.deepcopy(tokenizer)
        reader.add_tokens([AddedToken(token, special=True)])
        reader.save_pretrained(tmp_path / name)
        texts = [f"{number} {token} is {number * number}" for number in range(6)]
        with torch.no_grad():
            labels = [int(network(**reader(one, return_tensors="pt")).logits.argmax()) for one in texts]
        assert set(labels) <= set(numbers)
        rows: list[dict[str, object]] = [{"text": one, "label": y} for one, y in zip(texts, labels, strict=True)]
        data = {}
        for split, part in (("calibration", rows[:2]), ("evaluation", rows[2:])):
            data[split] = {"path": "json", "data_files": write_rows(tmp_path / f"{name}-{split}.jsonl", part).name}
        tasks[name] = {"kind": "classification", **data}
    sens = {"sens": {"method": "task_arithmetic", "coefficients": {"kind": "sens", "temperature": 1.0}}}
    recipe = recipe_of("mood", "topic", tasks=tasks, merges=MERGES | sens) | {"base": str(berts["base"])}
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    for name in ("mood", "topic"):
        scores = json.loads((plan.artifact("evaluate", f"{name}/{name}") / "scores.json").read_text())
        assert scores["accuracy"]["value"] == 1.0
    trunk = load_file(plan.artifact("merge", "ta") / WEIGHTS)["embeddings.word_embeddings.weight"]
    for row, name in ((259, "mood"), (260, "topic")):
        own = load_file(tmp_path / name / WEIGHTS)["bert.embeddings.word_embeddings.weight"][259]
        torch.testing.assert_close(trunk[row], own, rtol=0, atol=1e-6)


CASES = SHARED / "cases" / "checkpoints"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "apart"),
    [
        ("C01_vocab_plus_one", []),
        ("C14_trainable_tokens_untied", []),
        ("G16_embedding_base_layer_changed", []),
        ("F01_added_tokens_in_padding", [50, 51]),
    ],
)
def test_cases_of_users(case: str, apart: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that only expert a has tokens for are a's; all others are what the case says is right."""
    monkeypatch.setattr("sys.argv", [case, str(tmp_path)])
    runpy.run_path(str(CASES / f"{case}.py"), run_name="__main__")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    merged, right = load_file(plan.artifact("merge", "m") / WEIGHTS), load_file(tmp_path / "right.safetensors")
    assert merged.keys() == right.keys()
    own = load_file(tmp_path / "a" / WEIGHTS) if apart else {}
    for name, value in right.items():
        lone = apart if name in (EMBEDDING, HEAD) else []
        keep = [row for row in range(len(value)) if row not in lone]
        torch.testing.assert_close(merged[name][keep], value[keep], rtol=0, atol=1e-6)
        for row in lone:
            torch.testing.assert_close(merged[name][row], own[name][row], rtol=0, atol=1e-6)
