"""Greedy continuations, and the tokens that end them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.companions import GENERATION_CONFIG, has_tokenizer
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.tokens import Inputs, collate


def set_end_tokens(network: PreTrainedModel, folder: Path, base: Path) -> None:
    """Let every token end a network's continuations that its folder says an answer ends with.

    These are the end tokens of its `generation_config.json` (that of `base` where it has none, as an adapter), of its
    config, and of its own tokenizer if it has one.

    Args:
        network: filled with the weights of the model in `folder`.
        folder: folder of the model.
        base: folder of its base.

    Raises:
        InputError: a `generation_config.json` whose end tokens are no token ids, or an unreadable tokenizer.
    """
    stated = _stated(folder if (folder / GENERATION_CONFIG).is_file() else base)
    own = [load_tokenizer(folder).eos_token_id] if has_tokenizer(folder) else []
    network.generation_config.eos_token_id = _ids(stated, _of_config(network), own)


def _stated(folder: Path) -> list[int]:
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return []
    found = load_object(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) for one in ids):
        raise InputError(f"{path}: eos_token_id is {found!r}; expected a token id or a list of them")
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
    """Return the greedy continuations of one batch of prompts in tokens, each up to an end token (left out)."""
    ends = end_tokens(network, tokenizer)
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad_id
    )
    batch = {name: values.to(device) for name, values in collate(prompts, pad_id, side="left").items()}
    with _generation_config(network, greedy):
        generated = network.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
    places = [next((i for i, token in enumerate(ids) if token in ends), len(ids)) for ids in generated]
    return [ids[:place] for ids, place in zip(generated, places, strict=True)]


@contextmanager
def _generation_config(network: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation settings: `generate` would fill gaps from them, a repetition penalty say."""
    own = network.generation_config
    network.generation_config = config
    try:
        yield
    finally:
        network.generation_config = own
