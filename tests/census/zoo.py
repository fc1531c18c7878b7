"""A tiny random network of every causal language model that transformers has."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 259
"""of the tests' byte-level tokenizer"""
LAYERS = 2
_LARGEST = 3_000_000
"""Parameters of a network that counts as tiny."""

_WIDTHS = {
    16: "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size dense_intermediate_size "
    "expert_ffn_hidden_size shared_experts_intermediate_size prompt_mid_dim intermediate_size_mlp "
    "gated_norm_rank hidden_size_per_layer_input",
    32: "hidden_size d_model n_embd emb_dim embedding_dim backbone_hidden_size attention_hidden_size lru_width "
    "word_embed_proj_dim embedding_size input_embedding_size output_embedding_size mamba_d_ssm ple_embed_dim",
    48: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff d_inner feed_forward_size "
    "shared_intermediate_size",
    8: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim "
    "linear_head_dim mamba_d_head mamba_head_dim mamba_headdim kv_channels dim_head d_head attention_head_size "
    "attention_head_dim index_head_dim kv_lora_rank q_lora_rank o_lora_rank mamba_d_state state_size ssm_state_size "
    "rotary_dim time_step_rank mamba_dt_rank laurel_rank adapter_rank hc_lowrank router_hidden_size chunk_size "
    "mamba_chunk_size index_topk linear_value_head_dim swa_v_head_dim d_rel rel_extent index_block_size",
    4: "num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts linear_num_heads linear_num_value_heads mamba_num_heads swa_num_attention_heads "
    "index_n_heads zero_expert_num n_mamba_heads num_query_groups num_random_blocks ngram ple_conv_kernel_size",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token top_k hc_mult o_groups mamba_n_groups n_groups mamba_ngroups n_group topk_group "
    "num_expert_group hc_count moe_top_k",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
    "num_nextn_predict_layers num_mem_blocks num_kv_shared_layers_",
    64: "max_position_embeddings n_positions n_ctx max_target_positions context_length model_max_length max_seq_len "
    "original_max_position_embeddings vocab_size_per_layer_input_ mem_len",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size pronunciation_vocab_size "
    "shape_vocab_size audio_vocab_size",
}
_SIZES = {name: size for size, names in _WIDTHS.items() for name in names.split()}
_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks num_layers_per_stack"
).split()
_WINDOWS = "sliding_window window_size attention_window_size sliding_window_size attention_chunk_size local_attention"
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_ssm": 64}  # expand · width = heads · head size
_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
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
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
"""By model type: what the names of settings do not tell."""


def class_names() -> list[str]:
    """Return the classes of all causal language models of transformers."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def tiny_network(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random network of a class in evaluation mode, float32, with a few narrow layers.

    Raises:
        Exception: the class cannot be made tiny by what is known of its settings, or wants more than text.
    """
    cls: type[PreTrainedModel] = getattr(transformers, name)
    known = cls.config_class
    config = known(**{**_shrunk(known()), **_EXCEPTIONS.get(known.model_type, {})})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{name}: {size} parameters")
    torch.manual_seed(seed)
    return cls(config).eval()


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a config that differ in its tiny form."""
    found: dict[str, Any] = {}
    known = config.to_dict()
    kinds = [each for each in known.values() if _is_kinds(each)]
    layers = max([LAYERS, *(len(set(each)) for each in kinds)])
    old = next((known[name] for name in _LAYERS if isinstance(known.get(name), int)), 0)
    latent = "kv_lora_rank" in known  # its keys and values have as many heads as its queries
    for name, value in known.items():
        if name == "num_key_value_heads" and latent:
            found[name] = _SIZES["num_attention_heads"]
        elif name == "head_dim" and not latent:
            found[name] = _SIZES[name]
        elif name in config.sub_configs:
            child = getattr(config, name)
            if child is not None:
                found[name] = {**_shrunk(child)}
        elif name in _SIZES and isinstance(value, int):
            found[name] = min(_SIZES[name], value) if value else value
        elif name in _LAYERS and value:
            found[name] = layers
        elif name in _WINDOWS.split() and isinstance(value, int):
            found[name] = 8
        elif name in _TOKENS:
            found[name] = _TOKENS[name]
        elif isinstance(value, list) and old and len(value) == old:
            first = list(dict.fromkeys(value)) if _is_kinds(value) else []
            found[name] = (first + value)[:layers]
    if config.is_encoder_decoder is False and "is_decoder" in known:
        found["is_decoder"] = True
    return found


def _is_kinds(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)
