"""Texts as the tokens that a merged model reads when it answers texts without a task."""

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import finite, own_ending, positions
from sensmerge.tasks.networks.tokens import Inputs, class_tokens, tokens, word_tokens


def text_inputs(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    network: PreTrainedModel,
    max_new_tokens: int | None,
    where: str,
) -> Inputs:
    """Return what a network reads of one text: one to classify, or a prompt that leaves room for its continuation.

    Args:
        text: the text.
        tokenizer: of the model.
        network: that is to answer.
        max_new_tokens: length of the continuation at most; None for a classifier.
        where: what messages call the text.

    Raises:
        InputError: a text without a token, or longer than the network takes.
    """
    if max_new_tokens is not None:
        ids = tokens(text, tokenizer, front=True)
    elif _is_tagger(network):
        ids, _ = word_tokens(text.split(), tokenizer)
    else:
        ids = class_tokens(text, tokenizer)
    new = max_new_tokens or 0
    room = (positions(network.config) or len(ids) + new) - new
    if room < 1:
        raise InputError(f"max_new_tokens is {new}; the model takes {room + new} tokens, prompt included: lower it")
    if not 0 < len(ids) <= room:
        raise InputError(f"{where} has {len(ids)} tokens; the model takes 1 to {room}: shorten it")
    return {"input_ids": ids}


def head_answer(logits: Tensor, text: str, tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel) -> str:
    """Return what a head says of a text: the name of its class, its number, or a class for each of its words.

    Words are what white space parts; their classes are parted by spaces, `O` where the tokenizer makes no token of one.

    Args:
        logits: (classes,), or (T, classes) of a classifier of tokens; one that has a single class gives a number.
        text: the text.
        tokenizer: that read it.
        network: that the head is of.

    Raises:
        InputError: an answer that is NaN or infinite.
    """
    names = network.config.id2label
    if _is_tagger(network):
        classes = finite(logits).argmax(-1).tolist()
        _, places = word_tokens(text.split(), tokenizer)
        return " ".join("O" if place is None else str(names[classes[place]]) for place in places)
    if len(names) == 1:
        return repr(float(finite(logits)))
    return str(names[int(finite(logits).argmax())])


def _is_tagger(network: PreTrainedModel) -> bool:
    return own_ending([type(network).__name__]) == "token_classification"
