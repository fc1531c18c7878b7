"""The rule of causality against the networks themselves: does a later token change what is predicted before it?"""

from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sensmerge.tasks.networks.causality import not_causal

TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 48),
    **{"num_key_value_heads": 2, "head_dim": 8, "d_head": 8, "vocab_size": 99, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
# Reformer refuses to be made without is_decoder, X-MOD to be run without a language; both are told by is_decoder.
NOT_RUN = ("reformer", "xmod")
FLAGS = ("is_decoder", "is_encoder_decoder", "causal", "is_causal", "use_bidirectional_attention")
CONFIGS = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
FLAGGED = [
    name
    for name, config in CONFIGS.items()
    if (getattr(config, "is_encoder_decoder", False) or any(flag in vars(config) for flag in FLAGS))
    or name in ("xlnet", "cpmant", "gpt2", "llama", "mamba")
]


def tiny(name: str, **flags: Any) -> PretrainedConfig:
    config = CONFIGS[name]
    known = {field.name for field in fields(config)}
    return config(**{key: value for key, value in TINY.items() if key in known} | flags)


def looks_ahead(config: PretrainedConfig) -> bool:
    torch.manual_seed(0)
    network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config).eval()
    first = torch.randint(5, 90, (1, 8))
    second = first.clone()
    second[0, -1] += 3
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        logits = [network(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (first, second)]
    return not torch.allclose(*logits, atol=1e-5)


def by_flag(name: str) -> list[dict[str, Any]]:
    """The settings that a family has a say in, both ways."""
    config, found = CONFIGS[name](), [{}]
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        found.append({"is_decoder": True})
    if name == "xlm":
        found.append({"causal": True})
    # Gemma 2 heeds it or not, depending on the implementation of attention.
    if name != "gemma2" and getattr(config, "use_bidirectional_attention", True) is not True:
        found.append({"use_bidirectional_attention": "all" if name.startswith("gemma4") else True})
    return found


@pytest.mark.parametrize("name", [name for name in FLAGGED if name not in NOT_RUN])
def test_the_rule_is_what_the_network_does(name: str) -> None:
    for flags in by_flag(name):
        config = tiny(name, **flags)
        reason = not_causal(config)
        if config.is_encoder_decoder:
            assert reason == "is an encoder-decoder, of which the decoder alone would be run"
        else:
            assert (reason is not None) == looks_ahead(config), (flags, reason)


@pytest.mark.parametrize("name", NOT_RUN)
def test_what_cannot_be_run_is_told_by_its_setting(name: str) -> None:
    assert "is_decoder is false" in str(not_causal(tiny(name, is_decoder=False)))
    assert not_causal(tiny(name, is_decoder=True)) is None
