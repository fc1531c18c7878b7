from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from sensmerge.tasks.networks.names import Names, names_of, parameter_names, plain
from tests.census.networks import tiny_network
from tests.conftest import bert_config, gpt2_config, llama_config


def names(network: type[PreTrainedModel], config: object) -> Names:
    with torch.device("meta"):
        return names_of(network(config))


@pytest.fixture(scope="module")
def masked() -> Names:
    return names(BertForMaskedLM, bert_config())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("bert.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("cls.predictions.transform.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.weight"),
        ("classifier.weight", "classifier.weight"),
    ],
)
def test_key(name: str, key: str, masked: Names) -> None:
    assert masked.key(name) == masked.parameter(name) == key


def test_key_is_the_same_for_trunk_and_head(masked: Names) -> None:
    trunk = names(BertModel, bert_config())
    classifier = names(BertForSequenceClassification, bert_config())
    assert trunk.parameters.keys() >= masked.trunk
    assert trunk.trunk == classifier.trunk == trunk.parameters.keys()
    assert classifier.parameters.keys() - classifier.trunk == {"classifier.weight", "classifier.bias"}


def test_parameters_are_in_network_order() -> None:
    with torch.device("meta"):
        network = LlamaForCausalLM(llama_config())
    assert parameter_names(network)[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in parameter_names(network)
    places = names_of(network).parameters
    assert list(places.values()) == list(range(len(places)))
    assert places["layers.0.mlp.up_proj.weight"] < places["layers.1.mlp.up_proj.weight"] < places["norm.weight"]


def test_tied_parameters_have_one_key(masked: Names) -> None:
    assert masked.tied == {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert masked.parameter("cls.predictions.decoder.bias") == "cls.predictions.bias"
    assert names(LlamaForCausalLM, llama_config()).tied == {"lm_head.weight": "embed_tokens.weight"}
    assert names(LlamaForCausalLM, llama_config(tie_word_embeddings=False)).tied == {}
    assert names(LlamaForSequenceClassification, llama_config()).tied == {}


@pytest.mark.parametrize("wrapped", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_what_compilation_and_data_parallelism_put_before_names(wrapped: str) -> None:
    llama = names(LlamaForCausalLM, llama_config())
    assert llama.key(f"{wrapped}model.norm.weight") == llama.parameter(f"{wrapped}model.norm.weight") == "norm.weight"
    assert plain("model._orig_mod.layers.0._orig_mod.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert plain("model.my_module.weight") == "model.my_module.weight"


def test_experts_of_a_mixture_have_keys_of_their_own_and_share_a_parameter() -> None:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    mixtral = names(MixtralForCausalLM, config)
    stored = [f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight" for i in (0, 1) for w in ("w1", "w3")]
    assert len({mixtral.key(name) for name in stored}) == 4
    assert {mixtral.parameter(name) for name in stored} == {"layers.0.mlp.experts.gate_up_proj"}
    assert "layers.0.mlp.experts.gate_up_proj" in mixtral.parameters


def test_only_language_models_have_no_task_head(masked: Names) -> None:
    assert not names(LlamaForCausalLM, llama_config()).has_task_head
    assert not names(GPT2LMHeadModel, gpt2_config()).has_task_head
    assert names(LlamaForSequenceClassification, llama_config()).has_task_head
    assert masked.has_task_head


def test_what_transformers_no_longer_reads() -> None:
    gpt2 = names(GPT2LMHeadModel, gpt2_config())
    assert gpt2.is_unread("h.0.attn.bias")
    assert gpt2.is_unread("transformer.h.1.attn.bias")
    assert not gpt2.is_unread("h.0.attn.c_attn.bias")
    assert not gpt2.is_unread("h.0.something.weight")
    llama = names(LlamaForCausalLM, llama_config())
    assert llama.is_unread("model.layers.1.self_attn.rotary_emb.inv_freq")
    assert llama.is_unread("model.rotary_emb.inv_freq")
    assert not llama.is_unread("model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize("name", ["LagunaForCausalLM", "CamembertForCausalLM", "DeepseekV4ForCausalLM"])
def test_every_parameter_that_transformers_saves_is_found_again(name: str, tmp_path: Path) -> None:
    """Patterns of old names match some of today's; heads may come before trunks."""
    network = tiny_network(name)
    network.save_pretrained(tmp_path)
    names = names_of(network)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        found = {key for tensor in saved.keys() for key in names.all_parameters(tensor)}  # noqa: SIM118
    assert names.parameters.keys() <= found
    assert {names.parameter(parameter) for parameter, _ in network.named_parameters()} == names.parameters.keys()


def test_a_fused_tensor_is_several_parameters() -> None:
    names = names_of(tiny_network("HrmTextForCausalLM"))
    found = names.all_parameters("model.L_module.layers.0.mlp.gate_up_proj.weight")
    assert found == tuple(f"L_module.layers.0.mlp.{one}_proj.weight" for one in ("gate", "up"))
    assert set(found) <= names.parameters.keys()
