"""Texts as the tokens that a merged model reads when it answers texts without a task."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import positions
from sensmerge.tasks.networks.tokens import Inputs, class_tokens, tokens


def text_inputs(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    max_new_tokens: int | None,
    where: str,
) -> Inputs:
    """Return what a network reads of one text: one to classify or to answer, or a prompt that leaves
    room for its continuation.

    Args:
        text: the text.
        tokenizer: of the model.
        config: of the network.
        max_new_tokens: length of the continuation or answer at most; None for a classifier.
        where: what messages call the text.

    Raises:
        InputError: a text without a token, or longer than the network takes.
    """
    whole = max_new_tokens is None or config.is_encoder_decoder  # nothing follows the text
    ids = class_tokens(text, tokenizer) if whole else tokens(text, tokenizer, front=True)
    new = 0 if whole else max_new_tokens or 0
    limit = positions(config)
    if config.is_encoder_decoder and limit is not None and (max_new_tokens or 0) > limit:
        raise InputError(f"max_new_tokens is {max_new_tokens}; the model takes {limit} tokens: lower it")
    room = (limit or len(ids) + new) - new
    if room < 1:
        raise InputError(f"max_new_tokens is {new}; the model takes {room + new} tokens, prompt included: lower it")
    if not 0 < len(ids) <= room:
        raise InputError(f"{where} has {len(ids)} tokens; the model takes 1 to {room}: shorten it")
    return {"input_ids": ids}
