"""Kind seq2seq: the model, an encoder-decoder, answers a source text with a target text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.bleu import BLEU_COUNTS, bleu, bleu_counts
from sensmerge.tasks.kinds.checks import NamedField
from sensmerge.tasks.kinds.generating import GeneratingTask
from sensmerge.tasks.kinds.kind import KINDS, Labels
from sensmerge.tasks.kinds.likelihood import likelihood_of
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import Inputs, class_tokens, collate, target_tokens
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seq2SeqSample(Sample):
    """A source that the encoder reads, and a target whose tokens the decoder is scored on: the network's labels."""

    @property
    def target(self) -> list[int]:
        """The target in tokens."""
        found: list[int] = self.inputs["labels"]
        return found

    @property
    def tokens(self) -> list[int]:
        """See `Sample`."""
        return self.input_ids + self.target

    def positions(self, new_tokens: int) -> int:
        """See `Sample`: encoder and decoder each count for themselves."""
        return max(len(self.input_ids), len(self.target), new_tokens)

    @property
    def prompt(self) -> Inputs:
        """See `Sample`: the source."""
        return {"input_ids": self.input_ids}

    @property
    def has_prompt(self) -> bool:
        """See `Sample`."""
        return bool(self.input_ids)


@KINDS.register("seq2seq")
class Seq2SeqTask(GeneratingTask):
    """An encoder-decoder answers a source text, and is scored on the tokens of the target text.

    The decoder is given the target as the model itself shifts it.
    """

    head: ClassVar[str] = "seq2seq_lm"
    templates: ClassVar[tuple[str, ...]] = ("source", "target")
    asks: ClassVar[tuple[str, ...]] = ("source", "max_length")
    metrics: ClassVar[Mapping[str, Metric]] = {**GeneratingTask.metrics, "bleu": Metric(BLEU_COUNTS, bleu)}

    kind: Literal["seq2seq"]
    source: str = Field("{source}", description="template of the source text; {field} is a field of the row")
    target: str = Field("{target}", description="template of the expected target text")
    max_length: int = Field(512, ge=2, description="maximum length of a source, in tokens; a longer one loses its end")
    max_target_length: int = Field(
        128, ge=1, description="maximum length of a target, in tokens; a longer one loses its end"
    )
    metric: Local[Literal["token_accuracy", "perplexity", "exact_match", "bleu"]] = Field(  # type: ignore[assignment]
        "token_accuracy",
        description="main metric; bleu: BLEU of all answers together, from 0 to 100, as sacrebleu has it by default",
    )

    def for_tuning(self) -> Self:
        """See `RowTask`: as other generating tasks, or by BLEU if that is the main metric."""
        return self if self.metric == "bleu" else super().for_tuning()

    def prompt_text(self, row: Row) -> str:
        """See `GeneratingTask`."""
        return render(self.source, row)

    def expected(self, row: Row) -> str:
        """See `GeneratingTask`."""
        return render(self.target, row)

    def named_fields(self, settings: str) -> list[NamedField]:
        """See `RowTask`."""
        if self.metric == "bleu" and not self.generate:
            raise InputError(f"{settings}.metric is bleu, set {settings}.generate to a number of tokens")
        return super().named_fields(settings)

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: there has to be a target, and the answer in it."""
        if not self.expected(row).strip():
            raise InputError(f"{where}: {settings}.target gives an empty text, expected one to score; leave it out")
        self.check_expected(row, settings, where)

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Seq2SeqSample:
        """Return source and target in the tokens that the tokenizer gives texts of either kind, its special ones too.

        Those of a target end with the tokenizer's end token.

        Raises InputError: a tokenizer that marks the languages of texts, or has no end token.
        """
        if hasattr(tokenizer, "tgt_lang"):
            raise InputError(
                f"{where}: the tokenizer ({type(tokenizer).__name__}) marks each text with its language, which kind "
                "seq2seq cannot name; leave the task out"
            )
        if tokenizer.eos_token_id is None:
            raise InputError(f"{where}: the tokenizer has no end token, expected one that ends every target")
        source = self.question(row, tokenizer, where)["input_ids"]
        target = target_tokens(self.expected(row), tokenizer, self.max_target_length)
        return Seq2SeqSample({"input_ids": source, "labels": target})

    def question(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str) -> Inputs:
        """See `RowTask`: the source."""
        return {"input_ids": class_tokens(self.prompt_text(row), tokenizer, self.max_length)}

    def calibration_batch(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> "dict[str, Tensor]":
        """See `RowTask`; `labels` are the target, (1, tokens), of which the network makes what the decoder is given."""
        return collate([self.sample(row, tokenizer, where, labels).inputs], pad_id=0)

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the likelihood of the target, each token from those before it."""
        assert isinstance(sample, Seq2SeqSample)
        return likelihood_of(sample.target, logits[: len(sample.target)])

    def answer_record(self, row: Row, text: str) -> Record:
        """See `GeneratingTask`; and what BLEU is computed of."""
        return super().answer_record(row, text) | bleu_counts(text, self.expected(row))
