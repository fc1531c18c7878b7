"""Kind sts (semantic textual similarity): how alike two texts are by the cosine of their embeddings.

The models are encoders without a head: an embedding is the pooled last hidden state of a text. There is no loss, so
nothing is measured on calibration rows. A record holds `prediction`, the cosine, and `label`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from sensmerge.tasks.artifacts import load_json
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.checks import check_number, number_of
from sensmerge.tasks.kinds.correlation import pearson, spearman
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import class_tokens
from sensmerge.tasks.rows.source import DataSource, Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MODULES = "modules.json"
"""What sentence-transformers makes embeddings with, beside the network."""
_POOLED = ("Transformer", "Pooling", "Normalize")
"""Those of them that the kind knows: a cosine needs no normalised embeddings."""


@dataclass(frozen=True)
class TextPair(Sample):
    """The longer one of two texts, and what both are."""

    texts: tuple[tuple[int, ...], ...] = ()
    """token ids of both"""

    @property
    def content(self) -> tuple[Any, ...]:
        """See `Sample`."""
        return (*self.texts, self.label)


@KINDS.register("sts")
class StsTask(RowTask):
    """The model embeds two texts; how alike they are is the cosine of their embeddings. It has no head, and no loss."""

    head: ClassVar[str] = "trunk"
    templates: ClassVar[tuple[str, ...]] = ("prompt", "pair")
    fields: ClassVar[tuple[str, ...]] = ("label",)
    metrics: ClassVar[Mapping[str, Metric]] = {
        "spearman": Metric(("label", "prediction"), spearman),
        "pearson": Metric(("label", "prediction"), pearson),
    }

    kind: Literal["sts"]
    prompt: str = Field("{sentence1}", description="template of the first text")
    pair: str = Field("{sentence2}", description="template of the second text")
    label: str = Field("label", description="field with the similarity, a number, which may also be written as text")
    pool: Literal["mean", "cls", "last"] = Field(
        "mean", description="what of the last hidden state is the embedding: mean over tokens, first token, last token"
    )
    metric: Local[Literal["spearman", "pearson"]] = Field(
        "spearman", description="main metric: correlation of the cosine with the similarity"
    )

    @field_validator("calibration")
    @classmethod
    def _no_calibration(cls, value: DataSource | None) -> DataSource | None:
        if value is not None:
            raise ValueError("the kind has no loss to measure on it; leave it out, and what needs it: sens, se, …")
        return value

    def notes(self, key: str, tokenizer: "PreTrainedTokenizerBase", expert: Path) -> list[str]:
        """See `Task`: the expert has to make its embeddings by pooling alone."""
        listed = expert / MODULES
        modules = load_json(listed) if listed.is_file() else []
        if not isinstance(modules, list):
            raise InputError(f"{listed}: holds {shown(modules)}; expected a list of modules; get the file again")
        types = [str(one.get("type")) if isinstance(one, dict) else shown(one) for one in modules]
        others = [one for one in types if one.rpartition(".")[2] not in _POOLED]
        if others:
            raise InputError(
                f"{key}.kind: sts takes pooled hidden states as embeddings, but {listed} also has {', '.join(others)}; "
                "leave the task out"
            )
        return []

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: there has to be a number."""
        check_number(row[self.label], f"{settings}.label names field {self.label!r}, which in {where}")

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the longer text, marked with both; see `samples`."""
        both = self.samples(row, tokenizer, where, labels)
        longer = max(both, key=lambda one: len(one.input_ids))
        texts = tuple(tuple(one.input_ids) for one in both)
        return TextPair(longer.inputs, longer.prompt_tokens, number_of(row[self.label]), texts)

    def samples(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> list[Sample]:
        """Return both texts, each with the tokenizer's special tokens, cut from the right but for these."""
        found = []
        for setting in self.templates:
            ids = class_tokens(render(getattr(self, setting), row), tokenizer, self.max_length)
            if not ids:
                raise InputError(f"{where}: the text of {setting} has no token; leave the row out")
            found.append(Sample({"input_ids": ids}, len(ids)))
        return found

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """Return the embedding of a text, float64, from its last hidden state, (T, width), padded on the right."""
        from sensmerge.tasks.networks.networks import finite

        hidden = finite(logits[: len(sample.input_ids)]).double()
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[self.pool]
        return pooled.cpu().numpy()

    def record(self, row: Row, judged: Sequence[Any]) -> Record:
        """See `RowTask`."""
        first, second = judged
        lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
        return {"prediction": float(first @ second) / lengths if lengths else 0.0, "label": number_of(row[self.label])}

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`."""
        texts = {setting: render(getattr(self, setting), row) for setting in self.templates}
        return {**texts, "expected": record["label"], "answer": record["prediction"]}
