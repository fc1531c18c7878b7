"""Texts as tokens, and samples as batches.

torch is imported where it is used: kinds of task, which a recipe is read by, are made of this.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.pictures import Picture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Inputs = Mapping[str, Any]
"""what a network reads of one sample, by its argument: a list of token ids, a picture, or a tensor"""
TYPES = "token_type_ids"
"""What networks are told of a pair of texts: of which of both a token is, 0 or 1."""
PADDING = 0.1
"""Share of a sample's place in its batch that is padding at most: less would save little, and make more batches."""


def tokens(text: str, tokenizer: "PreTrainedTokenizerBase", front: bool) -> list[int]:
    """Token ids of a text, with the tokenizer's begin tokens if `front`; never with an end token of its own.

    A text that begins with the begin token gets no second one.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=front, verbose=False)["input_ids"]
    # Some tokenizers close every text with their end token; here only `end_token` says so.
    if front and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        plain = tokens(text, tokenizer, front=False)
        if ids[-1 - len(plain) : -1] == plain:
            ids = ids[:-1]
    return ids[1:] if front and _begins_twice(text, tokenizer) else ids


def class_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None) -> list[int]:
    """Token ids of a text to classify with the tokenizer's special tokens, the begin token once, cut from the right."""
    twice = int(_begins_twice(text, tokenizer))
    longest = None if max_length is None else max_length + twice
    ids: list[int] = tokenizer(text, truncation=longest is not None, max_length=longest, verbose=False)["input_ids"]
    return ids[twice:]


def target_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[int]:
    """Token ids of a text that a decoder is to write, with the tokenizer's special tokens, its end token for certain.

    Of a text that is too long, the end token stays.
    """
    ids: list[int] = tokenizer(text_target=text, truncation=True, max_length=max_length, verbose=False)["input_ids"]
    if tokenizer.eos_token_id in ids:
        return ids
    return [*ids[: max_length - 1], tokenizer.eos_token_id]


def pair_tokens(
    first: str, second: str, tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> dict[str, list[int]]:
    """A pair of texts as inputs of a network, with the tokenizer's special tokens, the longer one cut from the right.

    They are `input_ids` and, where the tokenizer's networks read it, `TYPES`.
    """
    encoded = tokenizer(first, second, truncation=max_length is not None, max_length=max_length, verbose=False)
    return {name: encoded[name] for name in ("input_ids", TYPES) if name in encoded}


def word_tokens(
    words: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> tuple[list[int], list[int | None]]:
    """Token ids of a text in words with the tokenizer's special tokens, cut from the right but for these.

    Returns:
        The ids, and the place of each word's first token; None for a word without one: it is cut, or nothing is left
        of it.
    """
    encoded = tokenizer(
        list(words), is_split_into_words=True, truncation=max_length is not None, max_length=max_length, verbose=False
    )
    first: dict[int, int] = {}
    for place, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, place)
    return encoded["input_ids"], [first.get(number) for number in range(len(words))]


def check_words(tokenizer: "PreTrainedTokenizerBase", key: str) -> None:
    """Check that a tokenizer tells which tokens are of which word, and reads words with spaces between them.

    Byte-level tokenizers set none of their own accord, and networks were not trained on words in one piece.

    Raises:
        InputError: it is not so; `key` names the task.
    """
    folder = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise InputError(
            f"{key}: the tokenizer of {folder}, {type(tokenizer).__name__}, does not say which tokens are of which "
            "word; expected one with a tokenizer.json"
        )
    ids: list[int] = tokenizer(["ab", "c"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids).strip() == "abc":
        raise InputError(
            f"{key}: the tokenizer of {folder} reads words without the spaces between them; set add_prefix_space to "
            "true in its tokenizer_config.json, or for tokenizer_class TokenizersBackend in its tokenizer.json"
        )


def _begins_twice(text: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a text begins with the begin token, and the tokenizer sets another one before it."""
    begins = [token for token in (tokenizer.bos_token, tokenizer.cls_token) if token]
    if not text.lstrip().startswith(tuple(begins)):
        return False
    plain = tokens(text, tokenizer, front=False)
    whole: list[int] = tokenizer(text, verbose=False)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(begins)
    return whole[0] in ids and whole[0] == plain[0] and whole[1 : 1 + len(plain)] == plain


def pad(sequences: Sequence[list[int]], pad_id: int, side: Literal["left", "right"] = "right") -> "dict[str, Tensor]":
    """Sequences of token ids as one batch: int64 `input_ids` and `attention_mask` (1 real, 0 padding), both (B, T).

    Pad on the right to score and on the left to generate, where the next token must follow the last real one.
    """
    import torch

    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(sequences):
        place = slice(longest - len(tokens), longest) if side == "left" else slice(len(tokens))
        ids[i, place] = torch.tensor(tokens)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def collate(samples: Sequence[Inputs], pad_id: int, side: Literal["left", "right"] = "right") -> "dict[str, Tensor]":
    """Samples as one batch: token ids as `pad` does, labels and other lists alike with −100 and 0, pixels and tensors
    stacked.

    All samples have the same inputs, and pixels and tensors of one name one shape. Single texts among pairs have no
    `TYPES`: all their tokens are of the first.
    """
    import torch

    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values: list[Any] = [[0] * length(one) if name == TYPES and name not in one else one[name] for one in samples]
        if name == "input_ids":
            batch |= pad(values, pad_id, side)
        elif isinstance(values[0], list):
            batch[name] = pad(values, -100 if name == "labels" else 0, side)["input_ids"]
        elif isinstance(values[0], Picture):
            batch[name] = torch.stack([one.pixels() for one in values])
        else:
            batch[name] = torch.stack(values)
    return batch


def length(sample: Inputs) -> int:
    """How many tokens a sample has, those that a decoder is to write included; 0 where a network reads no text."""
    return len(sample.get("input_ids", ())) + len(sample.get("labels", ()))


def batches(lengths: Sequence[int], size: int | None = None, padding: float = PADDING) -> list[list[int]]:
    """Return the places of samples in batches of similar length, the longest first: no memory surprise comes late.

    Args:
        lengths: how many tokens each sample has; 0 for those that are no text.
        size: how many samples as long as the longest one make a batch. Shorter ones run more at a time, up to as many
            tokens, padding counted; 1 runs every sample alone. None sets no limit.
        padding: share of a sample's place in its batch that is padding at most.
    """
    most = None if size is None else size * max((1, *lengths))
    found: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fits = size != 1 and lengths[place] >= (1 - padding) * longest
        if found and fits and (most is None or (len(found[-1]) + 1) * max(1, longest) <= most):
            found[-1].append(place)
        else:
            found.append([place])
            longest = lengths[place]
    return found


def pad_token(network: "PreTrainedModel", tokenizer: Any) -> int:
    """Return a token id to pad with. The config's comes first: a decoder with a classification head looks for it.

    Of an image processor in place of the tokenizer, it is of no meaning.
    """
    own = (getattr(tokenizer, key, None) for key in ("pad_token_id", "eos_token_id"))
    for pad_id in (getattr(network.config, "pad_token_id", None), *own):
        if pad_id is not None:
            return int(pad_id)
    return 0
