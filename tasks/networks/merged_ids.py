"""A model's own tokenizer that gives the token ids of merged models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from sensmerge.tasks.errors import InputError

_WRITING = frozenset({"apply_chat_template", "get_chat_template", "chat_template", "special_tokens_map"})
"""What writes conversations as texts, in merged models' way."""


def in_merged_ids(
    tokenizer: PreTrainedTokenizerBase, moved: Mapping[int, int], folder: Path, writer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that gives other ids for the same tokens, and reads conversations as merged models do.

    Args:
        tokenizer: the tokenizer.
        moved: new ids by its own, of all tokens that have one.
        folder: of the tokenizer, for messages.
        writer: the tokenizer of merged models.
    """
    return cast(PreTrainedTokenizerBase, _MovedTokenizer(tokenizer, moved, folder, writer))


class _MovedTokenizer:
    """What tasks need of a tokenizer, with other ids; all else is the tokenizer's own."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        moved: Mapping[int, int],
        folder: Path,
        writer: PreTrainedTokenizerBase,
    ) -> None:
        self._own, self._moved, self._folder, self._writer = tokenizer, moved, folder, writer
        self._back = {new: own for own, new in moved.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copies and pickles ask for
            raise AttributeError(name)
        value = getattr(self._writer if name in _WRITING else self._own, name)
        if name.endswith("_token_id"):
            return self._moved.get(value)
        return value

    def __call__(self, *texts: Any, **settings: Any) -> Any:
        found = self._own(*texts, **settings)
        found["input_ids"] = [self._new(one) for one in found["input_ids"]]
        return found

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens that merged models have, by their ids there."""
        found = self._own.added_tokens_decoder
        return {self._moved[own]: token for own, token in found.items() if own in self._moved}

    def _new(self, own: int) -> int:
        if own not in self._moved:
            token = self._own.convert_ids_to_tokens(own)
            raise InputError(
                f"{self._folder}: its tokenizer gives {token!r} ({own}), which merged models have no row for; leave it "
                "out of the texts, or set tokenizer.source"
            )
        return self._moved[own]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        return [self._moved.get(one) for one in self._own.convert_tokens_to_ids(list(tokens))]

    def decode(self, ids: Sequence[int], **settings: Any) -> str:
        """Return the text of ids; tokens of other models, which the tokenizer does not know, are left out."""
        known = [self._back[one] for one in ids if one in self._back]
        return str(self._own.decode(known, **settings))
