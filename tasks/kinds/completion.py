"""Kind completion: the model continues a prompt.

The expected completion is read, not generated: a record is its `likelihood`, with the end token if the task appends it,
and `exact` (0 or 1) if the model also generates.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Local, Only
from sensmerge.tasks.kinds.checks import NamedField
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask, Sample
from sensmerge.tasks.kinds.likelihood import likelihood, text_sample
from sensmerge.tasks.kinds.scores import Metric, Record, mean, perplexity, ratio
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import tokens
from sensmerge.tasks.patterns import TimeLimit, compile_pattern
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


_BY_TOKENS = {"metric": "token_accuracy", "generate": 0}
"""Settings of a task that is scored by its tokens alone."""


@KINDS.register("completion")
class CompletionTask(RowTask):
    """The model continues a prompt, and is scored on the tokens of the expected completion."""

    templates: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    metrics: ClassVar[Mapping[str, Metric]] = {
        "token_accuracy": Metric(("correct", "tokens"), ratio),
        "perplexity": Metric(("nll", "tokens"), perplexity, higher_is_better=False),
        "exact_match": Metric(("exact",), mean, is_proportion=True),
    }

    kind: Literal["completion"]
    prompt: str = Field("{prompt}", description="template of the prompt; {field} is a field of the row")
    completion: str = Field("{completion}", description="template of the expected completion")
    end_token: bool = Field(True, description="append the tokenizer's end token to the completion")
    loss_on: Annotated[Literal["completion", "all"], Only("calibration")] = Field(
        "completion", description="tokens that count in calibration losses"
    )
    generate: Annotated[int, Only("evaluation")] = Field(
        0, ge=0, description="how many tokens to generate greedily for exact match, at most; 0: no generation"
    )
    answer: Annotated[str | None, Only("evaluation")] = Field(
        None,
        description="regular expression whose last match (group 1, if any) is what exact match compares; if left out, "
        "the whole text",
    )
    metric: Local[Literal["token_accuracy", "perplexity", "exact_match"]] = Field(
        "token_accuracy", description="main metric"
    )

    @property
    def answer_tokens(self) -> int:
        """See `Task`."""
        return self.generate

    def for_tuning(self) -> Self:
        """See `RowTask`: by token accuracy, which needs no generation, or by exact match if that is the main metric."""
        return self if self.metric == "exact_match" else self.model_copy(update=_BY_TOKENS)

    def named_fields(self, settings: str) -> list[NamedField]:
        """See `RowTask`."""
        if self.metric == "exact_match" and not self.generate:
            raise InputError(f"{settings}.metric is exact_match, set {settings}.generate to a number of tokens")
        return super().named_fields(settings)

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: the answer has to be found in the completion."""
        if self.answer is None:
            return
        if find_answer(self.answer, render(self.completion, row), f"{settings}.answer") is None:
            raise InputError(f"{settings}.answer: {shown(self.answer)} matches nothing in the completion of {where}")

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return prompt and completion tokenised apart and joined, so the boundary is the same whatever follows.

        The tokenizer's begin tokens stand in front only, its end token stands at the end if `end_token`; a text that
        has them gets no second ones. Of a text that is too long, the prompt loses its beginning, down to half of
        `max_length`, before the completion loses its end.

        Raises InputError: a completion without a token, an end token the tokenizer does not have.
        """
        prompt = tokens(render(self.prompt, row), tokenizer, front=True)
        completion = self._ended(tokens(render(self.completion, row), tokenizer, front=False), tokenizer)
        prompt = prompt[-max(self.max_length - len(completion), self.max_length // 2) :]
        sample = Sample({"input_ids": (prompt + completion)[: self.max_length]}, len(prompt))
        if len(sample.input_ids) <= sample.scored_from:
            raise InputError(f"{where}: the completion has no token to score; leave the row out")
        return sample

    def calibration_sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the sample; with `loss_on: all` the joined text tokenised as one, as when a model reads plain text.

        Its tokens then need not be those of `sample` where prompt and completion meet.
        """
        if self.loss_on == "completion":
            return self.sample(row, tokenizer, where, labels)
        text = render(self.prompt, row) + render(self.completion, row)
        return text_sample(self._ended(tokens(text, tokenizer, front=True), tokenizer)[: self.max_length], where)

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the likelihood."""
        return likelihood(sample, logits)

    def answer_record(self, row: Row, text: str) -> Record:
        """Return as `exact` whether a text is the row's completion, or holds the same answer (`answer`).

        Raises:
            InputError: the pattern of the answer takes too long on the text.
        """
        expected = render(self.completion, row)
        if self.answer is None:
            return {"exact": int(text.strip() == expected.strip())}
        found = find_answer(self.answer, text)
        return {"exact": int(found is not None and found == find_answer(self.answer, expected))}

    def _ended(self, ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Token ids with the end token once, if the task wants it."""
        if not self.end_token:
            return ids
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end token: set end_token: false in the task")
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def find_answer(pattern: str, text: str, where: str = "answer") -> str | None:
    """The last match of a regular expression, its group 1 if it has one, without surrounding space; None if none.

    Raises:
        InputError: no regular expression, or one that takes too long on the text; `where` names it.
    """
    found = compile_pattern(pattern, where).last(text, TimeLimit())
    return None if found is None else found.strip()
