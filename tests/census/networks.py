"""A tiny random network of every causal language model that transformers has, and of many other classes."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.census import tiny

_WAVES = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_ssm": 64}  # expand · width = heads · head size
_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "hrm_text": {"num_hidden_layers": 16},  # layers of the cache: stacks · layers of each · cycles
    "mamba2": {"num_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "num_logits_to_keep": 0,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "qwen2_5_vl_vision": {"depth": 2},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
    "longformer": {"attention_window": [8, 8]},
    "marian": {"decoder_start_token_id": 2},
    "t5": {"decoder_start_token_id": 0},
    "segformer": {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 32,
    },
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32},
    "wav2vec2": _WAVES,
    "hubert": _WAVES,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
"""By model type: what the names of settings do not tell."""


def class_names() -> list[str]:
    """Return the classes of all causal language models of transformers."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def tiny_config(cls: type[PreTrainedModel]) -> PretrainedConfig:
    """Return a config of a class of networks with few and narrow layers, from the defaults of its class of configs."""
    kind: type[PretrainedConfig] = cls.config_class
    default = kind()
    settings = tiny.tiny_settings(default)
    for name in [name for name in default.sub_configs if settings.get(name)]:
        settings[name] |= _EXCEPTIONS.get(getattr(default, name).model_type, {})
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    decodes = cls.__name__ in class_names() and "is_decoder" in default.to_dict()
    return kind(**{**settings, **({"is_decoder": True} if decodes else {}), **_EXCEPTIONS.get(kind.model_type, {})})


def tiny_network(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random network of a class in evaluation mode, float32, with a few narrow layers.

    Raises:
        Exception: the class cannot be made tiny by what is known of its settings.
    """
    cls: type[PreTrainedModel] = getattr(transformers, name)
    return tiny.tiny_network(cls, tiny_config(cls), seed)
