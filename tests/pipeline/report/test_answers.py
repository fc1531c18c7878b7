"""What people read of the rows of every kind: its text, what is right, and what a model says."""

import base64
import hashlib
from typing import Any

import pytest

from sensmerge.pipeline.report import answers
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.image_classification import ImageClassificationTask
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.kinds.regression import RegressionTask
from sensmerge.tasks.kinds.sts import StsTask

LABELS = {"bad": 0, "good": 1}


@pytest.mark.parametrize(
    ("task", "row", "record", "expected"),
    [
        (
            ClassificationTask(kind="classification", prompt="It says: {text}"),
            {"text": "fine", "label": 1},
            {"prediction": 0, "label": 1},
            {"prompt": "It says: fine", "expected": "good", "answer": "bad", "right": False},
        ),
        (
            ImageClassificationTask(kind="image_classification"),
            {"image": base64.b64encode(b"picture").decode(), "label": "good"},
            {"prediction": 1, "label": 1},
            {
                "prompt": f"7 bytes, sha256 {hashlib.sha256(b'picture').hexdigest()}",
                **{"expected": "good", "answer": "good", "right": True},
            },
        ),
        (
            MultipleChoiceTask(kind="multiple_choice"),
            {"prompt": "2 + 2?", "choices": ["3", 4], "answer": 1},
            {"prediction": 1, "label": 1},
            {"prompt": "2 + 2?", "expected": "4", "answer": "4", "right": True},
        ),
        (
            RegressionTask(kind="regression", prompt="{a}", pair="{b}"),
            {"a": "one", "b": "two", "label": "2.5"},
            {"prediction": 2.25, "label": 2.5},
            {"prompt": "one", "pair": "two", "expected": 2.5, "answer": 2.25},
        ),
        (
            StsTask(kind="sts"),
            {"sentence1": "one", "sentence2": "two", "label": 5},
            {"prediction": 0.5, "label": 5.0},
            {"prompt": "one", "pair": "two", "expected": 5.0, "answer": 0.5},
        ),
    ],
)
def test_a_row_of_the_table(task: RowTask, row: dict[str, Any], record: dict[str, Any], expected: Any) -> None:
    assert task.table_row(row, record, LABELS if task.has_own_head else None) == expected


def test_of_a_long_text_the_middle_is_left_out_and_that_is_said() -> None:
    most = answers.MOST_TEXT
    assert answers.shortened("a" * most) == "a" * most
    text = answers.shortened("a" * most + "b" * 1234)
    assert text.startswith("a" * (most // 2))
    assert text.endswith("b" * (most // 2))
    assert "[… 1234 characters …]" in text
