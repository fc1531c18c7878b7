"""What rows may hold, and what is said of what they may not."""

from datetime import date
from typing import Any

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask

KEY = "tasks.math.calibration"


COMPLETION: dict[str, Any] = {"kind": "completion"}


CHOICE: dict[str, Any] = {"kind": "multiple_choice"}


def completion_task(**settings: Any) -> CompletionTask:
    return CompletionTask(**COMPLETION | settings)


def test_good_rows_pass() -> None:
    completion_task(answer=r"#### (\d+)").check_rows([{"prompt": "", "completion": "so #### 12"}], KEY)
    classification = ClassificationTask(kind="classification")
    classification.check_rows([{"text": "a", "label": 1}, {"text": "b", "label": "no"}], KEY, {"yes": 0, "no": 1})
    classification.check_rows([{"text": "a", "label": 99}], KEY)
    MultipleChoiceTask(**CHOICE).check_rows([{"prompt": "p", "choices": ["a", "b"], "answer": 1}], KEY)


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        (
            COMPLETION | {"prompt": "Q: {question}"},
            {"prompt": "p", "completion": "c"},
            "tasks.math.prompt names field 'question', row 0 of tasks.math.calibration has 'prompt', 'completion'",
        ),
        (
            COMPLETION,
            {"prompt": "p", "completion": None},
            "tasks.math.completion names field 'completion', which is null in row 0 of tasks.math.calibration",
        ),
        (COMPLETION, {"prompt": True, "completion": "c"}, "field 'prompt', which is true in row 0 .*expected a text"),
        (COMPLETION, {"prompt": "p", "completion": ["a"]}, "field 'completion', which is a list in row 0"),
        (COMPLETION, {"prompt": [{"role": "user"}], "completion": "c"}, "field 'prompt', which is a list in row 0"),
        (COMPLETION, {"prompt": {"a": 1}, "completion": "c"}, "field 'prompt', which is an object in row 0"),
        (COMPLETION, {"prompt": 0.5, "completion": "c"}, "field 'prompt', which is the number 0.5 without a text"),
        (
            COMPLETION,
            {"prompt": date(2024, 1, 15), "completion": "c"},
            "field 'prompt', which is a date .2024-01-15. in row 0",
        ),
        (COMPLETION | {"prompt": "{prompt.x}"}, {"prompt": "p"}, "tasks.math.prompt: template"),
        (COMPLETION | {"metric": "exact_match"}, {}, "tasks.math.metric is exact_match, set tasks.math.generate"),
        (COMPLETION | {"answer": "("}, {"prompt": "p", "completion": "c"}, "tasks.math.answer: .* regular expression"),
        (COMPLETION | {"answer": "#"}, {"prompt": "p", "completion": "c"}, "tasks.math.answer: '#' matches nothing"),
        ({"kind": "classification"}, {"text": "t"}, "tasks.math.label names field 'label'"),
        (
            {"kind": "classification"},
            {"text": "t", "label": 2},
            "label is 2, expected one of .* 2 classes: 0 no, 1 yes",
        ),
        ({"kind": "classification"}, {"text": "t", "label": -1}, "row 0 of tasks.math.calibration: label is -1"),
        ({"kind": "classification"}, {"text": "t", "label": "maybe"}, "label is 'maybe'"),
        ({"kind": "classification"}, {"text": "t", "label": 0.5}, "label is 0.5"),
        ({"kind": "classification"}, {"text": "t", "label": True}, "label is True"),
        ({"kind": "classification"}, {"text": "t", "label": "01"}, "label is '01'"),
        ({"kind": "classification"}, {"text": "t", "label": "2"}, "label is '2'"),
        ({"kind": "classification"}, {"text": "t", "label": None}, "names field 'label', which is null in row 0"),
        (CHOICE, {"prompt": "p", "choices": ["a"]}, "tasks.math.answer names field 'answer'"),
        (CHOICE, {"prompt": "p", "choices": [], "answer": 0}, r"choices are \[\]"),
        (CHOICE, {"prompt": "p", "choices": ["a", ""], "answer": 0}, "expected a list of texts that are not empty"),
        (CHOICE, {"prompt": "p", "choices": "ab", "answer": 0}, "choices are 'ab'"),
        (CHOICE, {"prompt": "p", "choices": ["a", True], "answer": 0}, r"choices are \['a', True\]"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": True}, "answer is True"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": "2"}, "answer is '2', .* 0 to 1"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": 2}, "answer is 2, .* 0 to 1"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": "A"}, "answer is 'A'"),
        (CHOICE | {"completion": " x"}, {}, "tasks.math.completion is ' x', expected a template that names {choice}"),
    ],
)
def test_bad_rows(settings: dict[str, Any], row: dict[str, Any], message: str) -> None:
    kinds = {"completion": CompletionTask, "classification": ClassificationTask, "multiple_choice": MultipleChoiceTask}
    with pytest.raises(InputError, match=message):
        kinds[settings["kind"]](**settings).check_rows([row], KEY, {"no": 0, "yes": 1})


def test_the_bad_row_is_named() -> None:
    rows = [{"prompt": "p", "completion": "c"}] * 4 + [{"prompt": "p"}]
    with pytest.raises(InputError, match="row 4 of"):
        completion_task().check_rows(rows, KEY)


def test_a_bad_row_is_named_by_its_place() -> None:
    rows, places = [{"prompt": "p", "completion": "c"}, {"prompt": "p"}], ["line 1 of a.csv", "line 7 of a.csv"]
    with pytest.raises(
        InputError, match=r"tasks\.math\.completion names field 'completion', line 7 of a\.csv has 'prompt'"
    ):
        completion_task().check_rows(rows, KEY, places=places)


def test_half_a_character_is_refused_by_its_row() -> None:
    with pytest.raises(InputError, match=r"field .prompt., which has half a surrogate pair in row 0 of .*; repair"):
        completion_task().check_rows([{"prompt": "a \ud800", "completion": "b"}], KEY)
