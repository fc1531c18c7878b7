"""A config in small: the same kinds of layers and heads, but few and narrow ones, to try a network at once."""

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 259
LAYERS = 2
"""At least; there is one of each kind that a config lists."""
_LARGEST = 3_000_000
"""Parameters of a network that counts as tiny."""
_NAMES = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
    "num_nextn_predict_layers num_mem_blocks",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk "
    "moe_k num_experts_per_token top_k hc_mult o_groups mamba_n_groups n_groups mamba_ngroups n_group "
    "topk_group num_expert_group hc_count moe_top_k",
    4: "num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts linear_num_heads linear_num_value_heads mamba_num_heads "
    "swa_num_attention_heads index_n_heads zero_expert_num n_mamba_heads num_query_groups num_random_blocks "
    "ngram ple_conv_kernel_size",
    8: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
    "swa_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim kv_channels dim_head d_head "
    "attention_head_size attention_head_dim index_head_dim kv_lora_rank q_lora_rank o_lora_rank mamba_d_state "
    "state_size ssm_state_size rotary_dim time_step_rank mamba_dt_rank laurel_rank adapter_rank hc_lowrank "
    "router_hidden_size chunk_size mamba_chunk_size index_topk swa_v_head_dim d_rel rel_extent index_block_size "
    "sliding_window window_size attention_window_size sliding_window_size attention_chunk_size local_attention",
    16: "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size prompt_mid_dim "
    "dense_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size intermediate_size_mlp "
    "gated_norm_rank hidden_size_per_layer_input qk_head_dim",
    32: "hidden_size d_model dim n_embd emb_dim embedding_dim backbone_hidden_size attention_hidden_size lru_width "
    "word_embed_proj_dim pooler_hidden_size embedding_size input_embedding_size output_embedding_size "
    "mamba_d_ssm ple_embed_dim",
    48: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff d_inner "
    "feed_forward_size shared_intermediate_size hidden_dim n_inner",
    64: "max_position_embeddings n_positions n_ctx max_target_positions context_length model_max_length max_seq_len "
    "original_max_position_embeddings mem_len",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size pronunciation_vocab_size "
    "shape_vocab_size audio_vocab_size",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""The size of a setting at most, by its name: what transformers' configs call layers, widths, heads, windows, …"""
_COUNTS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "num_layers_per_stack",
]
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tiny_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a config that differ in its tiny form."""
    known = config.to_dict()
    layers = max([LAYERS, *(len(set(value)) for value in known.values() if _is_kinds(value))])
    count = next((known[name] for name in _COUNTS if isinstance(known.get(name), int)), 0)
    latent = "kv_lora_rank" in known  # its keys and values have as many heads as its queries
    found: dict[str, Any] = {}
    for name, value in known.items():
        if name in config.sub_configs:
            child = getattr(config, name)
            found[name] = None if child is None else tiny_settings(child)
        elif name == "num_key_value_heads" and latent:
            found[name] = _SIZES["num_attention_heads"]
        elif name == "head_dim" and not latent:
            found[name] = _SIZES[name]
        elif name in _SIZES and isinstance(value, int) and value:
            found[name] = min(_SIZES[name], value)
        elif name in _COUNTS and value:
            found[name] = layers
        elif name in _TOKENS:
            found[name] = None if value is None else _TOKENS[name]
        elif name == "rope_parameters" and value:
            found[name] = _rope(value)
        elif isinstance(value, list) and count and len(value) == count:
            first = list(dict.fromkeys(value)) if _is_kinds(value) else []
            found[name] = (first + value)[:layers]
    return found


def tiny_network(cls: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random network in evaluation mode, float32; no parameter is zero.

    Raises:
        ValueError: it is not tiny.
    """
    with torch.device("meta"):
        if not is_tiny(cls(config)):
            raise ValueError(f"{cls.__name__}: its config cannot be made tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = cls(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.float().eval()


def is_tiny(network: PreTrainedModel) -> bool:
    """Return whether a network is as small as it need be."""
    return bool(sum(parameter.numel() for parameter in network.parameters()) <= _LARGEST)


def _is_kinds(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions without tables that are as long as heads are wide."""
    if any(isinstance(inner, dict) for inner in value.values()):
        return {key: _rope(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}
    kept = {key: inner for key, inner in value.items() if not isinstance(inner, list)}
    sections = {"mrope_section": [2, 1, 1]} if "mrope_section" in value else {}
    return {**kept, "rope_type": "default", **sections}
