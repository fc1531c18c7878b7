import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    DebertaV2Config,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
)

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.compare import differences, with_settings_of
from sensmerge.tasks.networks.expert import load_network, open_expert
from tests.conftest import llama_config, make_llama, perturbed

Save = Callable[..., Path]


def parsed(kind: type[PretrainedConfig], settings: dict[str, Any], folder: Path) -> PretrainedConfig:
    """A config as it is read from a file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind.model_type, **settings}))
    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    return config


@pytest.mark.parametrize(
    ("kind", "expert", "base", "setting"),
    [
        ("llama", {"rope_theta": 1e6}, {}, "rope_parameters.rope_theta"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "rope_parameters.factor"),
        ("llama", {"hidden_act": "relu"}, {}, "hidden_act"),
        ("llama", {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ("mistral", {"sliding_window": None}, {"sliding_window": 4096}, "sliding_window"),
        ("mixtral", {"num_experts_per_tok": 1}, {}, "num_experts_per_tok"),
        ("gemma2", {"final_logit_softcapping": 15.0}, {}, "final_logit_softcapping"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 26}, {}, "layer_types.0"),
        ("qwen3_moe", {"norm_topk_prob": True}, {"norm_topk_prob": False}, "norm_topk_prob"),
        ("cohere", {"logit_scale": 1.0}, {}, "logit_scale"),
        ("opt", {"do_layer_norm_before": False}, {}, "do_layer_norm_before"),
        ("bert", {"is_decoder": True}, {}, "is_decoder"),
        ("roberta", {"pad_token_id": 0}, {}, "pad_token_id"),
        ("esm", {"token_dropout": True}, {"token_dropout": False}, "token_dropout"),
        ("deberta-v2", {"relative_attention": True}, {"relative_attention": False}, "relative_attention"),
        ("gemma3", {"vision_config": {"hidden_act": "relu"}}, {}, "vision_config.hidden_act"),
        ("gemma3", {"text_config": {"query_pre_attn_scalar": 64}}, {}, "text_config.query_pre_attn_scalar"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_count(
    kind: str, expert: dict[str, Any], base: dict[str, Any], setting: str, tmp_path: Path
) -> None:
    cls = type(AutoConfig.for_model(kind))
    ours, theirs = parsed(cls, base, tmp_path / "base"), parsed(cls, expert, tmp_path / "expert")
    assert setting in [one.setting for one in differences(theirs, ours, own_head=False)]
    adopted = with_settings_of(ours, theirs, own_head=False)
    assert type(adopted) is cls
    assert differences(adopted, ours, own_head=False) == []


@pytest.mark.parametrize(
    ("kind", "expert", "base"),
    [
        (MistralConfig, {"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        (
            MistralConfig,
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2}},
        ),
        (MistralConfig, {"sliding_window": 4096}, {}),
        (MistralConfig, {"max_position_embeddings": 8192}, {}),
        (MistralConfig, {"attention_dropout": 0.1, "initializer_range": 0.1}, {}),
        (MistralConfig, {"eos_token_id": [2, 5], "pad_token_id": 7, "bos_token_id": 3}, {}),
        (MistralConfig, {"use_cache": False, "torch_dtype": "float16", "pretraining_tp": 2}, {}),
        (MistralConfig, {"unsloth_version": "2025.1", "_name_or_path": "a", "transformers_version": "4.40.0"}, {}),
        (MistralConfig, {"tie_word_embeddings": True, "head_dim": 128}, {}),
        (MixtralConfig, {"router_aux_loss_coef": 0.1, "output_router_logits": True}, {}),
        (Qwen2Config, {"max_window_layers": 21, "num_hidden_layers": 24}, {"num_hidden_layers": 24}),
        (BertConfig, {"position_embedding_type": "absolute", "classifier_dropout": 0.1}, {}),
        (BertConfig, {"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "single_label_classification"}, {}),
        (RobertaConfig, {"gradient_checkpointing": True, "finetuning_task": "sst2"}, {}),
    ],
    ids=str,
)
def test_what_says_nothing_of_the_computation(
    kind: type[PretrainedConfig], expert: dict[str, Any], base: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = parsed(kind, base, tmp_path / "base"), parsed(kind, expert, tmp_path / "expert")
    assert differences(theirs, ours, own_head=False) == []


def test_a_limit_of_positions_that_the_angles_depend_on(tmp_path: Path) -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    ours = parsed(MistralConfig, scaled, tmp_path / "base")
    theirs = parsed(MistralConfig, scaled | {"max_position_embeddings": 8192}, tmp_path / "expert")
    assert next(iter(differences(theirs, ours, own_head=False))).setting == "max_position_embeddings"


def test_settings_that_no_config_declares(tmp_path: Path) -> None:
    """They count where the network reads them, as DeBERTa's does; what nobody reads does not."""
    ours = parsed(DebertaV2Config, {}, tmp_path / "base")
    theirs = parsed(DebertaV2Config, {"share_att_key": True, "num_local_experts": 3}, tmp_path / "expert")
    assert [one.setting for one in differences(theirs, ours, own_head=False)] == ["share_att_key"]


def test_settings_of_a_head_that_stays_the_experts_own(tmp_path: Path) -> None:
    ours = parsed(ModernBertConfig, {"classifier_pooling": "cls"}, tmp_path / "base")
    theirs = parsed(ModernBertConfig, {"classifier_pooling": "mean", "norm_eps": 1e-3}, tmp_path / "expert")
    assert [one.setting for one in differences(theirs, ours, own_head=True)] == ["norm_eps"]
    assert len(differences(theirs, ours, own_head=False)) == 2
    adopted = with_settings_of(ours, theirs, own_head=True)
    assert (adopted.classifier_pooling, adopted.norm_eps) == ("mean", ours.norm_eps)


def long_theta() -> LlamaForCausalLM:
    """An expert that learned with another base of its rotary angles."""
    network = LlamaForCausalLM(
        llama_config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}, hidden_act="relu")
    )
    network.load_state_dict(perturbed(make_llama(), 5).state_dict())
    return network


def test_an_expert_with_other_settings(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    folder, base = save(long_theta(), "long", tmp_path), open_base(llamas["base"])
    with pytest.raises(InputError) as error:
        open_expert(folder, base, "experts.long")
    assert str(error.value) == (
        f"experts.long: {folder} has other settings than the base: hidden_act 'relu' (the base has 'silu'), "
        "rope_parameters.rope_theta 77.0 (the base has 10000.0); expected those of the base: set experts.long.config: "
        "base to run the expert with them"
    )
    expert = open_expert(folder, base, "experts.long", base_config=True)
    assert expert.base_config
    assert expert.notes == (
        f"experts.long: {folder} runs with the base's settings, not with its own hidden_act 'relu' (the base has "
        "'silu'), rope_parameters.rope_theta 77.0 (the base has 10000.0)",
    )
    reference = make_llama().eval()
    reference.load_state_dict(long_theta().state_dict())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = load_network(expert, "causal_lm", torch.float32, "cpu")(ids).logits
        torch.testing.assert_close(found, reference(ids).logits, rtol=0, atol=0)
        assert not torch.allclose(found, long_theta().eval()(ids).logits, atol=1e-4)
    same = open_expert(llamas["math"], base, "experts.math", base_config=True)
    assert not same.base_config
    assert same.notes == ()


def test_a_language_model_inside_the_base(tmp_path: Path) -> None:
    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text | heads,
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=258,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    config.text_config.sliding_window = 9
    Gemma3ForCausalLM(config.text_config).save_pretrained(tmp_path / "expert")
    base = open_base(tmp_path / "base")
    with pytest.raises(InputError, match=r"other settings than the base: sliding_window 9 \(the base has 4096\)"):
        open_expert(tmp_path / "expert", base, "experts.a")
    expert = open_expert(tmp_path / "expert", base, "experts.a", base_config=True)
    assert expert.config is base.config
