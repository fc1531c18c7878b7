"""Configurations of mergekit, run as they are, against mergekit 0.1.5 itself (skipped where pip cannot fetch it)."""

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sensmerge.pipeline.plan.models import hash_models, list_models
from sensmerge.pipeline.plan.plan import make_plan
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from tests.conftest import do_steps, make_llama, make_tokenizer, perturbed
from tests.mergekit import assert_equal_weights, merge


@pytest.fixture(scope="module")
def models(save: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and three experts, of three blocks."""
    folder = tmp_path_factory.mktemp("models")
    save(make_llama(num_hidden_layers=3), "base", folder)
    for seed, name in enumerate(("math", "code", "talk"), 1):
        save(perturbed(make_llama(num_hidden_layers=3), seed), name, folder)
    for seed, (name, added, order) in enumerate((("tools", ["<tool>", "</tool>"], 1), ("voices", ["<voice>"], -1)), 4):
        network = perturbed(make_llama(num_hidden_layers=3), seed)
        network.resize_token_embeddings(264, mean_resizing=False)
        network.save_pretrained(folder / name)
        tokenizer = make_tokenizer(order)
        tokenizer.add_tokens([AddedToken(one, special=True) for one in added])
        tokenizer.chat_template = "{% for m in messages %}<tool>{{ m.content }}</tool>{% endfor %}"
        tokenizer.save_pretrained(folder / name)
    return folder


def of(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    """Models with the parameters given to each, or to each by its name."""
    own = {
        name: {key: one[name] if isinstance(one, dict) else one for key, one in parameters.items()} for name in names
    }
    return [{"model": name, "parameters": own[name]} for name in names]


CONFIGS: dict[str, dict[str, Any]] = {
    "soup": {
        "merge_method": "linear",
        "models": of("base", "math", "code", weight={"base": 1, "math": 0.3, "code": 0.5}),
    },
    "per-model-weights": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": of("math", "code", weight={"math": 0.4, "code": [0.1, 0.9]}),
        "parameters": {"lambda": 0.8},
    },
    "union-with-pad": {
        "merge_method": "ties",
        "base_model": "base",
        "models": of("math", "tools", "voices", weight=0.5, density=0.6),
        "tokenizer": {"source": "union", "pad_to_multiple_of": 32},
    },
    "rows-of-tokens": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": of("tools", "math", "voices", weight={"tools": 0.3, "math": 0.4, "voices": 0.5}),
        "tokenizer": {
            "source": "tools",
            "tokens": {
                "</tool>": {"source": {"kind": "zero"}},
                "<new>": {"source": {"kind": "model_token", "model": "math", "token": "a"}},
                "a": {"source": "voices", "force": True},
                "b": {"source": {"kind": "model_token", "model": "tools", "token_id": 7}, "force": True},
            },
        },
        "chat_template": "auto",
    },
    "union-of-a-soup": {
        "merge_method": "linear",
        "models": of("tools", "voices", weight={"tools": 0.3, "voices": 0.5}),
        "tokenizer_source": "union",
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    },
    "tokenizer-of-the-base": {
        "merge_method": "linear",
        "base_model": "base",
        "models": of("base", "voices", "tools", weight=1.0),
        "tokenizer_source": "base",
    },
    "gradient-ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            *of("math", density=[1, 0.7, 0.1], weight=1.0),
            *of("code", density=0.5, weight=[0, 0.3, 0.7, 1]),
            *of("talk", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [{"sources": [{"model": "base", "layer_range": [0, 3]}, {"model": "math", "layer_range": [0, 3]}]}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "model-stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "math"}, {"model": "code"}],
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": [
            *of("math", weight=0.4),
            *of("code", weight=[{"filter": "mlp", "value": 0.2}, {"value": [0.5, 0.9]}]),
        ],
    },
    "passthrough": {
        "merge_method": "passthrough",
        "models": of("math", scale=[{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]),
    },
    "karcher": {"merge_method": "karcher", "models": [{"model": "base"}, {"model": "math"}]},
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            *of("math", weight=0.5, density=[0.3, 0.9], gamma=0.02),
            *of("code", weight=0.5, density=0.9, gamma=[0.01, 0.05]),
        ],
    },
}


@pytest.fixture(scope="module")
def theirs(mergekit: Path, models: Path) -> Path:
    """The folder of the models, with what mergekit makes of each configuration in `NAME-out`."""
    for name, config in CONFIGS.items():
        (models / f"{name}.yml").write_text(yaml.safe_dump(config | {"dtype": "float32"}))
    merge(mergekit, models, CONFIGS)
    return models


@pytest.mark.parametrize("name", CONFIGS)
def test_it_makes_what_mergekit_makes(name: str, theirs: Path) -> None:
    recipe, store = load_recipe(theirs / f"{name}.yml"), Store(theirs / f"{name}-store")
    store.make()
    listings = hash_models(list_models(recipe, theirs, store.hub_cache), store.hub_cache)
    plan = make_plan(recipe, theirs, store, listings)
    do_steps(plan)
    ours, out = plan.models()["merged"], theirs / f"{name}-out"
    tokenizers = [AutoTokenizer.from_pretrained(one) for one in (ours, out)]
    ids = [one.get_vocab() for one in tokenizers]
    assert ids[0].keys() == ids[1].keys()
    # Which of the experts adds its tokens first, mergekit leaves to chance.
    assert_equal_weights(ours, out, moved={ids[0][token]: ids[1][token] for token in ids[0]})
    if CONFIGS[name].keys().isdisjoint({"tokenizer", "tokenizer_source"}):
        assert filecmp.cmp(ours / "tokenizer.json", out / "tokenizer.json", shallow=False)
    assert_alike(*tokenizers)
    network, problems = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(problems.values())
    assert network.config.vocab_size == AutoConfig.from_pretrained(out).vocab_size


def assert_alike(ours: Any, theirs: Any) -> None:
    """Check that two tokenizers split texts alike, and have the same templates, special tokens and added tokens.

    Where mergekit leaves a union without a template because the base has none, ours is the first expert's.
    """
    for text in ("I say <tool>12 + 5</tool>.", " <voice><new> a b<s>"):
        assert ours.tokenize(text) == theirs.tokenize(text)
    assert theirs.chat_template is None or ours.chat_template.strip() == theirs.chat_template.strip()
    assert ours.special_tokens_map == theirs.special_tokens_map
    added = [{str(one): repr(one) for one in reader.added_tokens_decoder.values()} for reader in (ours, theirs)]
    assert added[0] == added[1]
