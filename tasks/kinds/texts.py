"""Tasks whose networks read a text, or a pair of texts, and answer it with a head of the expert's own."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Added
from sensmerge.tasks.kinds.checks import NamedField
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.templates import render, template_fields
from sensmerge.tasks.networks.tokens import Inputs, class_tokens, pair_tokens
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTask(RowTask):
    """The model reads a text, or a pair of texts, all at once."""

    asks: ClassVar[tuple[str, ...]] = ("prompt", "pair", "max_length")

    prompt: str = Field("{text}", description="template of the text")
    pair: Added[str | None] = Field(
        None, description="template of a second text, which the tokenizer joins to the first as its model expects pairs"
    )

    def named_fields(self, settings: str) -> list[NamedField]:
        """See `RowTask`."""
        found = super().named_fields(settings)
        if self.pair is not None:
            try:
                found += [NamedField(name, "pair", True) for name in template_fields(self.pair)]
            except InputError as error:
                raise InputError(f"{settings}.pair: {error}") from None
        return found

    def texts(self, row: Row) -> dict[str, str]:
        """Return the text, or both of the pair, by the setting that makes it of a row."""
        templates = {"prompt": self.prompt} | ({} if self.pair is None else {"pair": self.pair})
        return {setting: render(template, row) for setting, template in templates.items()}

    def question(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str) -> Inputs:
        """Return the text or the pair with the tokenizer's special tokens, cut from the right but for these.

        Of a pair, the longer text is cut first. See `RowTask`: it is all of the sample.

        Raises:
            InputError: it has no token.
        """
        text, *others = self.texts(row).values()
        if not others:
            inputs: Inputs = {"input_ids": class_tokens(text, tokenizer, self.max_length)}
        else:
            inputs = pair_tokens(text, others[0], tokenizer, self.max_length)
        if not inputs["input_ids"]:
            raise InputError(f"{where}: the text has no token; leave the row out")
        return inputs
