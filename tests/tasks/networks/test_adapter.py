import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG, read_adapter_config
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import Expert, load_network, open_expert
from tests.conftest import bert_config, llama_config, make_bert_expert, make_bert_trunk, make_gpt2, make_llama

LLAMA: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"]}
BERT: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}


def adapt(network: PreTrainedModel, folder: Path, **settings: Any) -> PeftModel:
    """Make and save a LoRA adapter all of whose parameters are random."""
    torch.manual_seed(1)
    adapted = get_peft_model(network, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted


def untied_llama() -> PreTrainedModel:
    return make_llama(tie_word_embeddings=False)


def bert_classifier(labels: int = 3) -> PreTrainedModel:
    return make_bert_expert(make_bert_trunk(), 1, labels)


def distilbert_config(labels: int = 2) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=259, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=128, num_labels=labels
    )


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    path = folder / ADAPTER_WEIGHTS
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)
    return folder


def assert_same_as_peft(expert: Expert, merged: dict[str, torch.Tensor]) -> None:
    """Compare every tensor of an expert with peft's merged network, and the task vectors with its difference."""
    base = expert.base
    stripped = {base.network_name(name): tensor for name, tensor in merged.items()}
    for name in base.weights:
        wanted = stripped.get(base.network_name(name), base.read(name))
        torch.testing.assert_close(expert.read(name).float(), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(expert.delta(name), wanted - base.read(name), rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in expert.head_tensors().items())


@pytest.mark.parametrize(
    ("make", "settings", "adapted", "whole"),
    [
        pytest.param(make_llama, LLAMA, 6, 0, id="llama"),
        pytest.param(make_llama, LLAMA | {"target_modules": "all-linear"}, 14, 0, id="llama-all-linear"),
        pytest.param(make_llama, LLAMA | {"use_rslora": True}, 6, 0, id="llama-rslora"),
        pytest.param(make_llama, LLAMA | {"init_lora_weights": "orthogonal"}, 6, 0, id="llama-orthogonal"),
        pytest.param(make_llama, LLAMA | {"layers_to_transform": [1]}, 3, 0, id="llama-one-layer"),
        pytest.param(
            make_llama,
            LLAMA
            | {
                "rank_pattern": {r"layers\.0.*q_proj": 2, "down_proj": 3, "^model.layers.1.self_attn.v_proj": 5},
                "alpha_pattern": {"v_proj": 11, r"1.self_attn.q_proj": 1},
                "use_rslora": True,
            },
            6,
            0,
            id="llama-patterns",
        ),
        pytest.param(
            untied_llama, LLAMA | {"modules_to_save": ["embed_tokens", "lm_head"]}, 6, 2, id="llama-saved-embeddings"
        ),
        pytest.param(untied_llama, LLAMA | {"modules_to_save": ["model.norm", "head"]}, 6, 2, id="llama-saved-by-end"),
        pytest.param(
            untied_llama, LLAMA | {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}, 4, 0, id="llama-embedding"
        ),
        pytest.param(
            make_llama,
            LLAMA | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            6,
            1,
            id="llama-tied-saved-embedding",
        ),
        pytest.param(make_gpt2, GPT2, 6, 0, id="gpt2"),
        pytest.param(
            make_gpt2, GPT2 | {"rank_pattern": {"mlp.c_proj": 2}, "fan_in_fan_out": True}, 6, 0, id="gpt2-patterns"
        ),
        pytest.param(make_gpt2, GPT2 | {"target_modules": ["wpe", "c_fc"]}, 3, 0, id="gpt2-embedding"),
    ],
)
def test_language_models(
    make: Callable[[], PreTrainedModel],
    settings: dict[str, Any],
    adapted: int,
    whole: int,
    save: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = open_base(save(make(), "base", tmp_path))
    reference = adapt(make(), tmp_path / "lora", **settings).merge_and_unload()
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert (len(expert.low_rank), len(expert.own), expert.head) == (adapted, whole, {})
    assert_same_as_peft(expert, reference.state_dict())
    assert sum(expert.touches(name) for name in base.weights) == adapted + whole


def test_libraries_warn_of_nothing(llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(), tmp_path / "one", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        open_expert(tmp_path / "one", open_base(llamas["base"]), "experts.one")


def test_a_tied_embedding(llamas: dict[str, Path], tmp_path: Path) -> None:
    """Compared with peft before merging: when it merges, it adds the task vector once for each of both names."""
    settings = LLAMA | {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    reference = adapt(make_llama(), tmp_path / "lora", **settings).eval()
    expert = open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")
    assert len(expert.low_rank) == 3
    ids = torch.arange(3, 20)[None]
    logits = load_network(expert, "causal_lm", torch.float32, "cpu")(ids).logits
    torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "adapted", "head"),
    [
        pytest.param(BERT, 4, 2, id="default-head"),
        pytest.param(BERT | {"target_modules": ["query", "word_embeddings"]}, 3, 2, id="embedding"),
        pytest.param(BERT | {"target_modules": ["key"], "modules_to_save": ["classifier"]}, 2, 2, id="saved-head"),
        pytest.param(
            BERT | {"target_modules": ["key"], "task_type": None, "modules_to_save": ["classifier"]},
            2,
            2,
            id="no-task-type",
        ),
    ],
)
@pytest.mark.parametrize("base_class", ["trunk", "masked"])
def test_classifiers(
    settings: dict[str, Any], adapted: int, head: int, base_class: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    network = bert_classifier()
    trunk = BertForMaskedLM(bert_config()) if base_class == "masked" else BertModel(bert_config())
    trunk.base_model.load_state_dict(network.bert.state_dict(), strict=False)
    base = open_base(save(trunk, "base", tmp_path))
    reference = adapt(network, tmp_path / "lora", **settings).merge_and_unload().eval()
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert (len(expert.low_rank), len(expert.head)) == (adapted, head)
    assert expert.config.num_labels == 3
    assert_same_as_peft(expert, reference.state_dict())
    if base_class == "trunk":
        ids = torch.arange(3, 20)[None]
        logits = load_network(expert, "classification", torch.float32, "cpu", head_of=expert)(ids).logits
        torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_of_a_pooler(save: Callable[..., Path], tmp_path: Path) -> None:
    """A pooler that the base lacks was drawn at random in training and is stored nowhere."""
    settings = BERT | {"target_modules": ["query", "dense"]}
    adapt(bert_classifier(), tmp_path / "lora", **settings)
    with_pooler = open_base(save(make_bert_trunk(), "trunk", tmp_path))
    assert "pooler.dense.weight" in open_expert(tmp_path / "lora", with_pooler, "experts.x").low_rank
    without = open_base(save(BertForMaskedLM(bert_config()), "masked", tmp_path))
    with pytest.raises(InputError, match=r"experts.x: .* adapts bert.pooler.dense, which the base does not have"):
        open_expert(tmp_path / "lora", without, "experts.x")


def test_an_adapter_of_a_bare_trunk(save: Callable[..., Path], tmp_path: Path) -> None:
    """Its names lack the prefix that the base, saved with a language-model head, has."""
    trunk = make_bert_trunk()
    masked = BertForMaskedLM(bert_config())
    masked.bert.load_state_dict(trunk.state_dict(), strict=False)
    base = open_base(save(masked, "base", tmp_path))
    reference = adapt(trunk, tmp_path / "lora", target_modules=["query"], task_type="FEATURE_EXTRACTION")
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert len(expert.low_rank) == 2
    assert_same_as_peft(expert, reference.merge_and_unload().state_dict())


def test_classes_are_counted_on_the_last_layer_of_a_head(save: Callable[..., Path], tmp_path: Path) -> None:
    """DistilBERT's head has two layers, whose names sort the other way round."""
    torch.manual_seed(0)
    network = DistilBertForSequenceClassification(distilbert_config(5))
    masked = DistilBertForMaskedLM(distilbert_config())
    masked.distilbert.load_state_dict(network.distilbert.state_dict())
    base = open_base(save(masked, "base", tmp_path))
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier", "classifier"]}
    reference = adapt(network, tmp_path / "lora", target_modules=["q_lin"], **settings).merge_and_unload().eval()
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert expert.config.num_labels == 5
    assert_same_as_peft(expert, reference.state_dict())
    ids = torch.arange(3, 20)[None]
    logits = load_network(expert, "classification", torch.float32, "cpu", head_of=expert)(ids).logits
    torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-5)


def test_a_head_that_the_base_has_too_is_merged(save: Callable[..., Path], tmp_path: Path) -> None:
    base = open_base(save(bert_classifier(), "base", tmp_path))
    reference = adapt(bert_classifier(), tmp_path / "lora", **BERT).merge_and_unload()
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert expert.head == {}
    assert expert.own.keys() == {"classifier.weight", "classifier.bias"}
    assert_same_as_peft(expert, reference.state_dict())


def test_bfloat16_factors(save: Callable[..., Path], tmp_path: Path) -> None:
    base = open_base(save(make_llama(), "base", tmp_path))
    adapt(make_llama(), tmp_path / "lora", **LLAMA)
    edit_tensors(tmp_path / "lora", lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    reference = PeftModel.from_pretrained(make_llama(), tmp_path / "lora").merge_and_unload()
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert_same_as_peft(expert, reference.state_dict())


def test_a_bfloat16_base_is_not_rounded(save: Callable[..., Path], tmp_path: Path) -> None:
    base = open_base(save(make_llama().bfloat16(), "base", tmp_path))
    adapt(make_llama(), tmp_path / "lora", **LLAMA)
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert expert.read(name).dtype == expert.delta(name).dtype == torch.float32
    assert torch.equal(expert.read(name), base.read(name).float() + expert.delta(name))


def test_settings_that_old_versions_left_out(save: Callable[..., Path], tmp_path: Path) -> None:
    base = open_base(save(make_llama(), "base", tmp_path))
    reference = adapt(make_llama(), tmp_path / "lora", **LLAMA).merge_and_unload()
    config = json.loads((tmp_path / "lora" / ADAPTER_CONFIG).read_text())
    kept = {key: config[key] for key in ("peft_type", "task_type", "target_modules", "r", "lora_alpha")}
    (tmp_path / "lora" / ADAPTER_CONFIG).write_text(json.dumps(kept))
    assert_same_as_peft(open_expert(tmp_path / "lora", base, "experts.x"), reference.state_dict())


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(make_llama, LLAMA | {"use_rslora": True}, id="llama"),
        pytest.param(make_gpt2, GPT2, id="gpt2"),
        pytest.param(untied_llama, LLAMA | {"target_modules": ["embed_tokens", "k_proj"]}, id="embedding"),
    ],
)
def test_factors_are_those_of_peft(
    make: Any, settings: dict[str, Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    """In the parameter's own orientation, which GPT-2's modules and embeddings store the other way round."""
    origin = make()
    base = open_base(save(origin, "base", tmp_path))
    before = {name: tensor.clone() for name, tensor in origin.state_dict().items()}
    merged = adapt(origin, tmp_path / "lora", **settings).merge_and_unload().state_dict()
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert expert.low_rank
    for name in base.weights:
        factors = expert.factors(name)
        assert (factors is not None) == (name in expert.low_rank)
        if factors is not None:
            first, second, scaling = factors
            assert first.dtype == second.dtype == torch.float32
            assert (len(first), second.shape[1]) == (4, 4)
            delta = scaling * (second.double() @ first.double())
            torch.testing.assert_close(delta.float(), merged[name] - before[name], rtol=0, atol=1e-6)
            assert delta.abs().max() > 0.01


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [0, 2]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("a_setting_of_tomorrow", {"alpha": 2}),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
    ],
)
def test_settings_that_are_refused_by_name(key: str, value: object, llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(), tmp_path / "lora", **LLAMA)
    edit_config(tmp_path / "lora", **{key: value})
    with pytest.raises(InputError) as error:
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")
    message = str(error.value)
    assert message.startswith(f"experts.x: {tmp_path / 'lora' / ADAPTER_CONFIG}: {key} ")
    assert repr(value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_real_adapters_that_are_refused(settings: dict[str, Any], llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(), tmp_path / "lora", **LLAMA | settings)
    with pytest.raises(InputError, match=next(iter(settings))):
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")


SLOW = "(.|..|...)+[!?]"
"""A pattern that goes back for ever on any name."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in ("8", [8], None, 0, -1, 2.5, True, 10**30, math.nan)),
        *(("lora_alpha", value) for value in ("6", [6], None, True, math.nan, math.inf, 10**400, 1e300, {})),
        *(("rank_pattern", value) for value in (["q_proj"], "q_proj", {"q_proj": "2"}, {"q_proj": 0})),
        *(("rank_pattern", {pattern: 2}) for pattern in ("(q_proj", SLOW, "a{4294967294}", "a" * 5000)),
        *(("alpha_pattern", value) for value in ({"q_proj": [1]}, {"q_proj": math.inf}, {"v_proj": 10**30}, 7)),
        *(("alpha_pattern", {pattern: 2}) for pattern in ("*", SLOW)),
        *(("target_modules", value) for value in (5, {"q_proj": 1}, [5], ["q_proj", SLOW], SLOW, "(", "nothing.*")),
        *(("exclude_modules", value) for value in (5, [None], SLOW, "(")),
        *(("modules_to_save", value) for value in ("norm", 5, [5], [SLOW], ["a" * 5000])),
        *(("layers_to_transform", value) for value in ("1", [1.5], [[1]])),
        *(("layers_pattern", value) for value in (5, SLOW, [SLOW], [5])),
        *(("task_type", value) for value in (5, ["CAUSAL_LM"], {"a": 1})),
        *(("use_rslora", value) for value in ("yes", 1, [])),
        *(("ensure_weight_tying", value) for value in ("yes", 1)),
        *(("init_lora_weights", value) for value in ({"a": 1}, [True], "a" * 5000)),
        ("a" * 5000, 5),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_of_wrong_types_and_sizes(key: str, value: object, llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(), tmp_path / "lora", **LLAMA)
    changes: dict[str, Any] = {key: value}
    if key == "layers_pattern":
        changes |= {"layers_to_transform": [1]}
    edit_config(tmp_path / "lora", **changes)
    with pytest.raises(InputError) as error:
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")
    message = str(error.value)
    assert message.startswith(f"experts.x: {tmp_path / 'lora' / ADAPTER_CONFIG}: {key[:20]}")
    assert "\n" not in message
    assert len(message) <= 500


def test_settings_are_by_default_what_they_are_in_peft(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    ours = read_adapter_config(tmp_path).model_dump(exclude={"path"})
    peft = LoraConfig().to_dict()
    assert {key: peft[key] or None for key in ours} == {key: ours[key] or None for key in ours}


def test_modules_are_chosen_as_peft_chooses_them(save: Callable[..., Path], tmp_path: Path) -> None:
    settings = LLAMA | {"target_modules": r"(?!.*layers\.0).*(q|v)_proj", "exclude_modules": r".*\.v_proj"}
    origin = make_llama()
    base = open_base(save(origin, "base", tmp_path))
    adapted = adapt(origin, tmp_path / "lora", **settings)
    expert = open_expert(tmp_path / "lora", base, "experts.x")
    assert set(expert.low_rank) == {"model.layers.1.self_attn.q_proj.weight"}
    assert_same_as_peft(expert, adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("config", [IA3Config(feedforward_modules=["down_proj"]), VeraConfig(r=4)], ids=["IA3", "VERA"])
def test_other_adapter_types(config: Any, llamas: dict[str, Path], tmp_path: Path) -> None:
    config.target_modules = ["k_proj", "down_proj"] if isinstance(config, IA3Config) else ["q_proj"]
    get_peft_model(make_llama(), config).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="only LORA adapters can be merged"):
        open_expert(tmp_path / "other", open_base(llamas["base"]), "experts.x")


@pytest.mark.parametrize("text", ["{bad", "[1]", "\udcff"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as error:
        read_adapter_config(tmp_path)
    assert str(error.value).startswith(str(tmp_path / ADAPTER_CONFIG))


def test_a_convolution_is_refused(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    adapt(ViTForImageClassification(config), tmp_path / "lora", target_modules=["projection"])
    with pytest.raises(InputError, match=r"adapts vit.embeddings.patch_embeddings.projection, a Conv2d"):
        open_expert(tmp_path / "lora", open_base(tmp_path / "base"), "experts.x")


def test_an_adapter_of_another_architecture(llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_gpt2(), tmp_path / "lora", **GPT2)
    with pytest.raises(InputError, match=r"experts.x: .*adapts transformer.h.0.attn.c_attn, which the base does not"):
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"intermediate_size": 64}, {"hidden_size": 64}], ids=str)
def test_an_adapter_of_another_size(changes: dict[str, int], llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(**changes), tmp_path / "lora", **LLAMA)
    with pytest.raises(InputError, match=r"experts.x: .*model.layers.*made for another base"):
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")


def test_an_adapter_with_more_words(save: Callable[..., Path], tmp_path: Path) -> None:
    """Tokens were added in training: peft then stores the whole embedding and head, whatever is adapted."""
    base = save(untied_llama(), "base", tmp_path)
    larger = untied_llama()
    larger.resize_token_embeddings(261)
    adapt(larger, tmp_path / "lora", **LLAMA | {"modules_to_save": ["embed_tokens", "lm_head"]})
    with pytest.raises(InputError, match=r"experts.x: .*weight has shape \(261, 32\).* \(259, 32\)"):
        open_expert(tmp_path / "lora", open_base(base), "experts.x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), r"has no tensor .*lora_A.weight, .* \(11 of 12 are there\)"),
        (lambda tensors: dict(list(tensors.items())[2:]), r"has no tensor .*, which its config asks for \(10 of 12"),
        (lambda tensors: {}, r"has no tensor .*, which its config asks for \(0 of 12"),
        (lambda tensors: tensors | {"something": torch.ones(1)}, "tensor something does not start with"),
        (lambda tensors: tensors | {"base_model.model.x.y": torch.ones(1)}, "x.y is neither a LoRA factor nor"),
        (lambda tensors: {name: t.flatten() for name, t in tensors.items()}, "the factors of .* have shapes"),
    ],
)
def test_broken_tensors(change: Any, reason: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(), tmp_path / "lora", **LLAMA)
    edit_tensors(tmp_path / "lora", change)
    with pytest.raises(InputError, match=f"experts.x: .*{ADAPTER_WEIGHTS}: .*{reason}"):
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")


def test_a_rank_that_the_config_does_not_have(llamas: dict[str, Path], tmp_path: Path) -> None:
    adapt(make_llama(), tmp_path / "lora", **LLAMA)
    edit_config(tmp_path / "lora", r=8)
    with pytest.raises(InputError, match=r"have shapes \(4, 48\) and \(32, 4\), expected \(8, 48\) and \(32, 8\)"):
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")


def test_the_networks_here_are_what_they_should_be() -> None:
    """Conv1D hides a wrong transposition only where it is square, and tied weights must be tied."""
    square = make_gpt2().transformer.h[0].attn.c_proj
    assert square.weight.shape == (32, 32)
    assert not isinstance(square, nn.Linear)
    assert llama_config().tie_word_embeddings
