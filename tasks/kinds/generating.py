"""What kinds share whose models write: losses on the expected text, and answers that are generated and compared.

The expected text is read, not generated: a record is its `likelihood`, and, if the model also generates, `exact` (0 or
1) and the `answer` itself.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Local, Only
from sensmerge.tasks.kinds.answers import COMPARED, Comparison, find_answer
from sensmerge.tasks.kinds.checks import NamedField
from sensmerge.tasks.kinds.kind import Labels, RowTask
from sensmerge.tasks.kinds.likelihood import likelihood, tokens_read
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record, mean, perplexity, ratio
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from torch import Tensor

_BY_TOKENS = {"metric": "token_accuracy", "generate": 0}
"""Settings of a task that is scored by its tokens alone."""


class GeneratingTask(RowTask):
    """A model is scored on the tokens of the text that is expected of it, and on its own answer if it generates one."""

    metrics: ClassVar[Mapping[str, Metric]] = {
        "token_accuracy": Metric(("correct", "tokens"), ratio),
        "perplexity": Metric(("nll", "tokens"), perplexity, higher_is_better=False),
        "exact_match": Metric(("exact",), mean, is_proportion=True),
    }

    generate: Annotated[int, Only("evaluation")] = Field(
        0, ge=0, description="how many tokens to generate greedily for exact match, at most; 0: no generation"
    )
    answer: Annotated[str | None, Only("evaluation")] = Field(
        None,
        description="regular expression whose last match (group 1, if any) is what exact match compares; if left out, "
        "the whole text",
    )
    compare: Annotated[Comparison, Only("evaluation")] = Field(
        "text",
        description="how exact match compares: text: but for surrounding space; number: the last number in it (72, "
        "72.0 and $72 are equal); normalized: in lower case, without punctuation, articles and double spaces",
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

    @abstractmethod
    def prompt_text(self, row: Row) -> str:
        """Return what a row asks, for people to read."""

    @abstractmethod
    def expected(self, row: Row) -> str:
        """Return the text that a row expects."""

    def check_expected(self, row: Row, settings: str, where: str) -> None:
        """Check that there is an answer in what a row expects; see `check_row`.

        Raises:
            InputError: the task's regular expression, or number, is not in it.
        """
        text: str | None = self.expected(row)
        if self.answer is not None:
            text = find_answer(self.answer, self.expected(row), f"{settings}.answer")
        if text is None:
            raise InputError(f"{settings}.answer: {shown(self.answer)} matches nothing in the completion of {where}")
        if COMPARED[self.compare](text) is None:
            raise InputError(
                f"{settings}.compare is {self.compare}, found none in the answer {shown(text)} of {where}; set "
                "compare: text, or leave the row out"
            )

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the likelihood."""
        return likelihood(sample, logits)

    def answer_record(self, row: Row, text: str) -> Record:
        """Return as `exact` whether a text is what the row expects, or holds the same answer, and the text.

        Raises:
            InputError: the pattern of the answer takes too long on the text.
        """
        texts: list[str | None] = [text, self.expected(row)]
        if self.answer is not None:
            texts = [find_answer(self.answer, one) for one in (text, self.expected(row))]
        found, expected = (None if one is None else COMPARED[self.compare](one) for one in texts)
        return {"exact": int(found is not None and found == expected), "answer": text}

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`; where nothing is generated, the answer is how many tokens of the text a model expects too."""
        texts = {"prompt": self.prompt_text(row), "expected": self.expected(row)}
        if "answer" in record:
            return {**texts, "answer": record["answer"], "right": bool(record["exact"])}
        return {**texts, **tokens_read(record)}
