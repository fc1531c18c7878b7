"""Greedy continuations, and the tokens that end them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.companions import GENERATION_CONFIG, has_tokenizer
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.tokens import Inputs, collate

_OF_DECODERS = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")
"""Settings without which the answers of some encoder-decoders have no meaning: how they begin (in which language, say),
and what no answer has (their padding token, say)."""


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
    pad_id: int,
    device: torch.device | str,
) -> list[list[int]]:
    """Return the greedy continuations of one batch of prompts in tokens, each up to an end token (left out).

    Those of an encoder-decoder are what it answers its prompts with.
    """
    ends, writes = end_tokens(network, tokenizer), network.config.is_encoder_decoder
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_id,
        **(_of_decoder(network) if writes else {}),
    )
    side: Literal["left", "right"] = "right" if writes else "left"
    batch = {name: values.to(device) for name, values in collate(prompts, pad_id, side).items()}
    with _generation_config(network, greedy):
        generated = network.generate(**batch)[:, 1 if writes else batch["input_ids"].shape[1] :].tolist()
    places = [next((i for i, token in enumerate(ids) if token in ends), len(ids)) for ids in generated]
    return [ids[:place] for ids, place in zip(generated, places, strict=True)]


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
