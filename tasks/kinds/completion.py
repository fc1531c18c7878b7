"""Kind completion: the model continues a prompt."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Only
from sensmerge.tasks.kinds.generating import GeneratingTask
from sensmerge.tasks.kinds.kind import KINDS, Labels
from sensmerge.tasks.kinds.likelihood import text_sample
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import Inputs, tokens
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@KINDS.register("completion")
class CompletionTask(GeneratingTask):
    """The model continues a prompt, and is scored on the tokens of the expected completion."""

    templates: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    asks: ClassVar[tuple[str, ...]] = ("prompt", "max_length")

    kind: Literal["completion"]
    prompt: str = Field("{prompt}", description="template of the prompt; {field} is a field of the row")
    completion: str = Field("{completion}", description="template of the expected completion")
    end_token: bool = Field(True, description="append the tokenizer's end token to the completion")
    loss_on: Annotated[Literal["completion", "all"], Only("calibration")] = Field(
        "completion", description="tokens that count in calibration losses"
    )

    def prompt_text(self, row: Row) -> str:
        """See `GeneratingTask`."""
        return render(self.prompt, row)

    def expected(self, row: Row) -> str:
        """See `GeneratingTask`."""
        return render(self.completion, row)

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: the answer has to be found in the completion."""
        self.check_expected(row, settings, where)

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return prompt and completion tokenised apart and joined, so the boundary is the same whatever follows.

        The tokenizer's begin tokens stand in front only, its end token stands at the end if `end_token`; a text that
        has them gets no second ones. Of a text that is too long, the prompt loses its beginning, down to half of
        `max_length`, before the completion loses its end.

        Raises InputError: a completion without a token, an end token the tokenizer does not have.
        """
        prompt = tokens(self.prompt_text(row), tokenizer, front=True)
        completion = self._ended(tokens(self.expected(row), tokenizer, front=False), tokenizer)
        prompt = prompt[-max(self.max_length - len(completion), self.max_length // 2) :]
        sample = Sample({"input_ids": (prompt + completion)[: self.max_length]}, len(prompt))
        if len(sample.input_ids) <= sample.scored_from:
            raise InputError(f"{where}: the completion has no token to score; leave the row out")
        return sample

    def question(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str) -> Inputs:
        """See `RowTask`; of a prompt that is too long, the end stays."""
        return {"input_ids": tokens(self.prompt_text(row), tokenizer, front=True)[-self.max_length :]}

    def calibration_sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the sample; with `loss_on: all` the joined text tokenised as one, as when a model reads plain text.

        Its tokens then need not be those of `sample` where prompt and completion meet.
        """
        if self.loss_on == "completion":
            return self.sample(row, tokenizer, where, labels)
        text = self.prompt_text(row) + self.expected(row)
        return text_sample(self._ended(tokens(text, tokenizer, front=True), tokenizer)[: self.max_length], where)

    def _ended(self, ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Token ids with the end token once, if the task wants it."""
        if not self.end_token:
            return ids
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end token: set end_token: false in the task")
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
