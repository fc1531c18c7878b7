"""Whether a network predicts each token from those before it alone, as a language model's scores suppose."""

from transformers import PretrainedConfig

# Of the networks that transformers ends in a language model's head: these ignore `is_decoder` and are causal anyhow, …
_ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese", "trocr")
# … and in these every token sees those after it, unless each call says otherwise.
_NEVER_CAUSAL = ("cpmant", "xlnet")


def not_causal(config: PretrainedConfig) -> str | None:
    """Return why a network with this config, ended in a language model's head, cannot be scored as one; else None.

    Half of an encoder-decoder has nothing to attend to, and where a token sees those after it, its prediction is
    copied, not made.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder, of which the decoder alone would be run"
    text = config.get_text_config()
    if text.model_type in _NEVER_CAUSAL:
        return "lets every token see those after it"
    if text.model_type not in _ALWAYS_CAUSAL and getattr(text, "is_decoder", True) is False:
        return "lets every token see those after it (is_decoder is false)"
    for setting in ("causal", "is_causal"):
        if getattr(text, setting, True) is False:
            return f"lets every token see those after it ({setting} is false)"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "lets every token see those after it (use_bidirectional_attention)"
    return None
