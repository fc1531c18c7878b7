"""Texts and pictures as a merged model reads them when it answers without a task."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import finite, own_ending, positions
from sensmerge.tasks.networks.pictures import PIXELS, Picture, picture_bytes
from sensmerge.tasks.networks.readers import read_by
from sensmerge.tasks.networks.tokens import Inputs, class_tokens, tokens, word_tokens


def inputs_of(
    given: Sequence[Any], reader: Any, network: PreTrainedModel, max_new_tokens: int | None, places: Sequence[str]
) -> list[Inputs]:
    """Return what a network reads of texts, or of pictures.

    Args:
        given: texts, or the files of pictures as bytes or in base64.
        reader: the model's tokenizer, or its image processor.
        network: the model's.
        max_new_tokens: length of a text's continuation at most; None for a classifier.
        places: what messages call them.

    Raises:
        InputError: as `text_inputs`; what is no picture.
    """
    each = zip(given, places, strict=True)
    if read_by(network) == "pictures":
        found = [Picture(picture_bytes(one, place), reader, place) for one, place in each]
        return [{PIXELS: one.pixels()} for one in found]
    return [text_inputs(one, reader, network, max_new_tokens, place) for one, place in each]


def text_inputs(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    network: PreTrainedModel,
    max_new_tokens: int | None,
    where: str,
) -> Inputs:
    """Return what a network reads of one text: one to classify or to answer, or a prompt that leaves
    room for its continuation.

    Args:
        text: the text.
        tokenizer: of the model.
        network: that is to answer.
        max_new_tokens: length of the continuation or answer at most; None for a classifier.
        where: what messages call the text.

    Raises:
        InputError: as `check_room`.
    """
    if max_new_tokens is not None and not network.config.is_encoder_decoder:
        ids = tokens(text, tokenizer, front=True)
    elif max_new_tokens is None and _is_tagger(network):
        ids, _ = word_tokens(text.split(), tokenizer)
    else:
        ids = class_tokens(text, tokenizer)
    check_room(ids, network, max_new_tokens, where)
    return {"input_ids": ids}


def check_room(ids: Sequence[int], network: PreTrainedModel, max_new_tokens: int | None, where: str) -> None:
    """Check that a network has room for a text in tokens, and for what it is to write; see `text_inputs`.

    Raises:
        InputError: a text without a token, or longer than the network takes.
    """
    config = network.config
    whole = max_new_tokens is None or config.is_encoder_decoder  # nothing follows the text
    new = 0 if whole else max_new_tokens or 0
    limit = positions(config)
    if config.is_encoder_decoder and limit is not None and (max_new_tokens or 0) > limit:
        raise InputError(f"max_new_tokens is {max_new_tokens}; the model takes {limit} tokens: lower it")
    room = (limit or len(ids) + new) - new
    if room < 1:
        raise InputError(f"max_new_tokens is {new}; the model takes {room + new} tokens, prompt included: lower it")
    if not 0 < len(ids) <= room:
        raise InputError(f"{where} has {len(ids)} tokens; the model takes 1 to {room}: shorten it")


def head_answer(logits: Tensor, text: Any, tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel) -> str:
    """Return what a head says of a text: the name of its class, its number, or a class for each of its words.

    Words are what white space parts; their classes are parted by spaces, `O` where the tokenizer makes no token of one.

    Args:
        logits: (classes,), or (T, classes) of a classifier of tokens; one that has a single class gives a number.
        text: the text; or a picture, at which no head of texts looks.
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
