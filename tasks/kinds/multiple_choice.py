"""Kind multiple_choice: the model ranks the choices of a question.

A record holds `prediction`, the choice of the largest Σ ln p ÷ characters of its text (lm-eval's `acc_norm`), and
`label`, the right choice.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local, Only
from sensmerge.tasks.kinds.checks import NamedField, is_text, is_unicode, whole_number
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.likelihood import likelihood, text_sample
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record, agreement
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import tokens
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@KINDS.register("multiple_choice")
class MultipleChoiceTask(RowTask):
    """The model ranks the choices by their likelihood per character, given the prompt."""

    templates: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    fields: ClassVar[tuple[str, ...]] = ("choices", "answer")
    answer_setting: ClassVar[str | None] = "answer"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric(("label", "prediction"), agreement, is_proportion=True)
    }

    kind: Literal["multiple_choice"]
    prompt: str = Field("{prompt}", description="template of the question")
    completion: str = Field(" {choice}", description="template of one choice; {choice} is its text")
    choices: str = Field("choices", description="field with the list of choices")
    answer: str = Field("answer", description="field with the index of the right choice")
    loss_on: Annotated[Literal["completion", "all"], Only("calibration")] = Field(
        "completion", description="tokens that count in calibration losses"
    )
    metric: Local[Literal["accuracy"]] = Field("accuracy", description="main metric")

    def named_fields(self, settings: str) -> list[NamedField]:
        """See `RowTask`; {choice} is no field of the row."""
        fields, choice = super().named_fields(settings), NamedField("choice", "completion", True)
        if choice not in fields:
            raise InputError(f"{settings}.completion is {self.completion!r}, expected a template that names {{choice}}")
        return [named for named in fields if named != choice]

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: there have to be choices, and the right one among them."""
        choices, answer = row[self.choices], row[self.answer]
        if (
            not isinstance(choices, list)
            or not choices
            or not all(is_text(one) and str(one) and is_unicode(str(one)) for one in choices)
        ):
            raise InputError(f"{where}: choices are {choices!r}, expected a list of texts that are not empty")
        if whole_number(answer) not in range(len(choices)):
            raise InputError(f"{where}: answer is {answer!r}, expected the index of a choice, 0 to {len(choices) - 1}")

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the sample of the right choice; see `samples`."""
        return self.samples(row, tokenizer, where, labels)[int(row[self.answer])]

    def samples(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> list[Sample]:
        """Return one sample per choice: prompt and choice tokenised apart and joined, without an end token.

        Cut from the left, as lm-eval does: choices are compared by their likelihood, so each must be whole.
        Raises InputError if a choice alone does not fit `max_length`.
        """
        prompt = tokens(render(self.prompt, row), tokenizer, front=True)
        samples = []
        for choice in row[self.choices]:
            completion = tokens(render(self.completion, row | {"choice": choice}), tokenizer, front=False)
            ids = (prompt + completion)[-self.max_length :]
            sample = Sample({"input_ids": ids}, len(ids) - len(completion))
            if not completion or sample.prompt_tokens < 1:
                raise InputError(
                    f"{where}: choice {choice!r} needs 1 to {self.max_length - 1} tokens after a prompt of at least "
                    f"one, it has {len(completion)} after {len(prompt)}; raise max_length or leave the row out"
                )
            samples.append(sample)
        return samples

    def calibration_sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the sample of the right choice; with `loss_on: all` the joined text tokenised as one."""
        if self.loss_on == "completion":
            return self.sample(row, tokenizer, where, labels)
        choice = {"choice": row[self.choices][int(row[self.answer])]}
        text = render(self.prompt, row) + render(self.completion, row | choice)
        return text_sample(tokens(text, tokenizer, front=True)[-self.max_length :], where)

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the likelihood of one choice."""
        return likelihood(sample, logits)

    def record(self, row: Row, judged: Sequence[Any]) -> Record:
        """See `RowTask`."""
        scores = [-one["nll"] / len(str(choice)) for one, choice in zip(judged, row[self.choices], strict=True)]
        return {"prediction": scores.index(max(scores)), "label": int(row[self.answer])}

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`: the texts of choices."""
        expected, answer = (str(row[self.choices][record[key]]) for key in ("label", "prediction"))
        right = record["prediction"] == record["label"]
        return {"prompt": render(self.prompt, row), "expected": expected, "answer": answer, "right": right}
