"""Kind regression: every expert has a head of its own that gives a text, or a pair of texts, a number.

A record holds `prediction` and `label`. The loss is the squared error.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.checks import check_number, number_of
from sensmerge.tasks.kinds.correlation import mean_squared_error, pearson, spearman
from sensmerge.tasks.kinds.kind import KINDS, Labels
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record
from sensmerge.tasks.kinds.texts import TextTask
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@KINDS.register("regression")
class RegressionTask(TextTask):
    """The model has a head of its own for this task that gives a text, or a pair of texts, a number."""

    head: ClassVar[str] = "classification"
    fields: ClassVar[tuple[str, ...]] = ("label",)
    reads_answer: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "pearson": Metric(("label", "prediction"), pearson),
        "spearman": Metric(("label", "prediction"), spearman),
        "mse": Metric(("label", "prediction"), mean_squared_error, higher_is_better=False),
    }

    kind: Literal["regression"]
    label: str = Field("label", description="field with the number, which may also be written as text")
    metric: Local[Literal["pearson", "spearman", "mse"]] = Field(
        "spearman", description="main metric: a correlation, or the mean squared error"
    )

    def check_config(self, config: "PretrainedConfig", key: str) -> None:
        """See `Task`: the head has to give one number, and its loss to be the squared error."""
        if config.num_labels != 1 or config.problem_type not in (None, "regression"):
            raise InputError(
                f"{key}.kind: regression, but the expert's config has num_labels {config.num_labels} and problem_type "
                f"{config.problem_type}; expected num_labels 1, and problem_type regression or none; use kind "
                "classification for classes, or leave the task out"
            )

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: there has to be a number."""
        check_number(row[self.label], f"{settings}.label names field {self.label!r}, which in {where}")

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the text or the pair, and its number."""
        inputs = self.question(row, tokenizer, where)
        return Sample(inputs, len(inputs["input_ids"]), number_of(row[self.label]))

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the only logit is the number."""
        from sensmerge.tasks.networks.networks import finite

        return {"prediction": float(finite(logits)), "label": sample.label}

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`."""
        return {**self.texts(row), "expected": record["label"], "answer": record["prediction"]}
