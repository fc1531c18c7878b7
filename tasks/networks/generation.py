"""Continuations: how their tokens are chosen, and what ends them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.companions import GENERATION_CONFIG, has_tokenizer
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.tokens import Inputs, collate, pad_token

MAX_NEW_TOKENS = 64
"""Length of a continuation at most, if nothing is said of it."""
_OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")
"""Settings without which the answers of some encoder-decoders have no meaning: how they begin (in which language, say),
and what no answer has (their padding token, say)."""


@dataclass(frozen=True)
class Decoding:
    """How the tokens of a continuation are chosen, and which texts end it.

    Raises InputError for a setting that is out of its range.
    """

    temperature: float = 0.0
    """what logits are divided by before a token is drawn; 0: always the likeliest token (greedy)"""
    top_p: float = 1.0
    """tokens are drawn from the likeliest ones whose probabilities add up to this"""
    seed: int = 0
    """of the draws; equal prompts and seeds give equal continuations, whatever else is in the batch"""
    stop: tuple[str, ...] = ()
    """texts that end a continuation; they are left out of it"""

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; expected 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0, and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError(f"top_p is {self.top_p}, but temperature is 0: nothing is drawn; set a temperature")
        if "" in self.stop:
            raise InputError("stop has an empty text, which ends everything; leave it out")


GREEDY = Decoding()


def check_unused(max_new_tokens: int | None, decoding: Decoding) -> None:
    """Raise InputError if something is said of continuations to a model that writes none."""
    given = asdict(decoding) | {"max_new_tokens": max_new_tokens}
    for name, default in (asdict(GREEDY) | {"max_new_tokens": None}).items():
        if given[name] != default:
            raise InputError(f"{name} is {shown(given[name])}, but the model writes no text; leave it out")


def set_end_tokens(network: PreTrainedModel, folder: Path, base: Path) -> None:
    """Let every token end a network's continuations that its folder says an answer ends with.

    These are the end tokens of its `generation_config.json` (that of `base` where it has none, as an adapter), of its
    config, and of its own tokenizer if it has one. An encoder-decoder also begins its answers as that file says.

    Args:
        network: filled with the weights of the model in `folder`.
        folder: folder of the model.
        base: folder of its base.

    Raises:
        InputError: a `generation_config.json` whose end tokens are no token ids, or an unreadable tokenizer.
    """
    path = (folder if (folder / GENERATION_CONFIG).is_file() else base) / GENERATION_CONFIG
    settings = load_object(path) if path.is_file() else {}
    if network.config.is_encoder_decoder:
        for name in _OF_DECODERS:
            if settings.get(name) is not None:
                setattr(network.generation_config, name, settings[name])
    stated = _stated(settings, path)
    own = [load_tokenizer(folder).eos_token_id] if has_tokenizer(folder) else []
    network.generation_config.eos_token_id = _ids(stated, _of_config(network), own)


def _stated(settings: Mapping[str, Any], path: Path) -> list[int]:
    found = settings.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) and abs(one) < 2**31 for one in ids):
        raise InputError(f"{path}: eos_token_id is {shown(found)}; expected a token id or a list of them")
    return ids


def _of_config(network: PreTrainedModel) -> list[int | None]:
    found: int | list[int | None] | None = getattr(network.config.get_text_config(), "eos_token_id", None)
    return found if isinstance(found, list) else [found]


def _ids(*groups: Iterable[int | None] | None) -> list[int]:
    return sorted({one for group in groups for one in group or () if one is not None})


def end_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all tokens that end a continuation: of generation config, config and tokenizer."""
    stated = network.generation_config.eos_token_id if network.generation_config else None
    return _ids(stated if isinstance(stated, list) else [stated], _of_config(network), [tokenizer.eos_token_id])


def generate(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Inputs],
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
    listen: Callable[[str], None] | None = None,
) -> list[list[int]]:
    """Return the continuations of one batch of prompts in tokens, each up to an end token (left out).

    Those of an encoder-decoder are what it answers its prompts with.

    Args:
        network: on the device where it runs.
        tokenizer: of the network.
        prompts: what is continued, or answered.
        max_new_tokens: length of a continuation at most.
        decoding: how tokens are chosen; a text that ends a continuation is the last of its tokens, or among those.
        listen: is called after each token with the text of the first continuation so far.
    """
    ends, writes = end_tokens(network, tokenizer), network.config.is_encoder_decoder
    pad_id = pad_token(network, tokenizer)
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_id,
        **(_of_decoder(network) if writes else {}),
    )
    side: Literal["left", "right"] = "right" if writes else "left"
    batch = {name: values.to(network.device) for name, values in collate(prompts, pad_id, side).items()}
    start = 1 if writes else batch["input_ids"].shape[1]

    def cut(ids: list[int]) -> list[int]:
        return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]

    options: dict[str, Any] = {}
    if decoding.temperature > 0:
        options["logits_processor"] = LogitsProcessorList([_Draws(decoding, prompts)])
    if decoding.stop or listen is not None:
        read = _Reading(start, lambda ids: written(cut(ids), tokenizer), decoding.stop, listen)
        options["stopping_criteria"] = StoppingCriteriaList([read])
    with _generation_config(network, greedy):
        generated = network.generate(**batch, **options)[:, start:].tolist()
    return [cut(ids) for ids in generated]


def written(ids: list[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> str:
    """Return the text of a continuation, up to the first of the texts that end it."""
    return until(tokenizer.decode(ids, skip_special_tokens=True), stop)


def until(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Makes the largest logit of every row a draw from its distribution: Gumbel noise is added (Gumbel 1954).

    Each row has a random generator of its own, seeded by what it continues, so a draw does not depend on the batch.
    """

    def __init__(self, decoding: Decoding, prompts: Sequence[Inputs]) -> None:
        self._warped = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
        if decoding.top_p < 1:
            self._warped.append(TopPLogitsWarper(decoding.top_p))
        self._generators = [torch.Generator().manual_seed(_seed(decoding.seed, one)) for one in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (rows, vocabulary) logits."""
        warped: Tensor = self._warped(input_ids, scores)
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=one) for one in self._generators]
        smallest = torch.finfo(torch.float32).tiny
        return warped - torch.stack(drawn).clamp_min(smallest).log().to(warped.device)


def _seed(seed: int, prompt: Inputs) -> int:
    text = json.dumps([seed, list(prompt["input_ids"])])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class _Reading(StoppingCriteria):  # type: ignore[misc]
    """Reads what is written, token by token: a row ends with a text that is to end it."""

    def __init__(
        self,
        start: int,
        read: Callable[[list[int]], str],
        stop: Sequence[str],
        listen: Callable[[str], None] | None,
    ) -> None:
        self._start = start
        self._read = read
        self._stop = stop
        self._listen = listen

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows have ended, (rows,) bool."""
        texts = [self._read(ids) for ids in input_ids[:, self._start :].tolist()]
        if self._listen is not None:
            self._listen(texts[0])
        return torch.tensor([any(one in text for one in self._stop) for text in texts], device=input_ids.device)


def _of_decoder(network: PreTrainedModel) -> dict[str, Any]:
    """Return how the answers of an encoder-decoder begin, by its generation config or else its config."""
    owners = (network.generation_config, network.config)
    found = {name: [getattr(owner, name, None) for owner in owners] for name in _OF_DECODERS}
    return {name: next((one for one in values if one is not None), None) for name, values in found.items()}


@contextmanager
def _generation_config(network: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation settings: `generate` would fill gaps from them, a repetition penalty say."""
    own = network.generation_config
    network.generation_config = config
    try:
        yield
    finally:
        network.generation_config = own
