"""Answers as people read them: what is compared, and what is equal."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.answers import normalized, number
from sensmerge.tasks.kinds.completion import CompletionTask

ROW = {"prompt": "how many?", "completion": "8 times 9 is 72\n#### 72"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", "72"),
        ("72.0", "72"),
        ("$72", "72"),
        ("It is $ 72.", "72"),
        ("-$72", "-72"),
        ("−72 €", "-72"),
        ("of 5, it is 1,234.50 m", "1234.5"),
        ("1,23", "23"),
        ("12,3456", "3456"),
        ("3-4", "4"),
        (".5", "0.5"),
        ("2e3", "2000"),
        ("2exact", "2"),
        ("72%", "72"),
        ("0072", "72"),
        ("\\boxed{72}", "72"),
        ("1e999999999999", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, expected: str | None) -> None:
    found = number(text)
    if text.startswith("1e999"):
        assert found is not None  # no exponent that would take the memory
    else:
        assert found == (None if expected is None else Decimal(expected))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_numbers_however_they_are_written(value: Decimal) -> None:
    for text in (f"{value:f}", f"{value:,f}", f"it is ${value:,f}.", f"{value:f}000", f"**{value:e}**"):
        assert number(text) == value


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    found = number(text)
    assert found is None or found.is_finite()


def test_normalized() -> None:
    assert normalized(" The  answer, is: an   Apple! ") == normalized("answer is apple") == "answer is apple"
    assert normalized("theatre") == "theatre"


@pytest.mark.parametrize(
    ("settings", "right", "wrong"),
    [
        ({}, [" 8 times 9 is 72\n#### 72 "], ["72", "#### 72"]),
        ({"compare": "number"}, ["$72", "72.0", "so 72."], ["73", "720", "seventy-two", "72 or 73"]),
        ({"compare": "normalized"}, ["8 Times 9, is the 72 72"], ["8 times 9 is 72"]),
        ({"answer": r"#### (.*)"}, ["x #### 72"], ["x #### 72.0", "72"]),
        ({"answer": r"#### (.*)", "compare": "number"}, ["x #### $72.00"], ["#### x", "72", "#### 71"]),
    ],
)
def test_answers_are_compared(settings: dict[str, str], right: list[str], wrong: list[str]) -> None:
    task = CompletionTask(kind="completion", generate=8, **settings)
    task.check_rows([ROW], "tasks.math.evaluation")
    assert [task.answer_record(ROW, text)["exact"] for text in right] == [1] * len(right)
    assert [task.answer_record(ROW, text)["exact"] for text in wrong] == [0] * len(wrong)


def test_a_number_that_is_not_there() -> None:
    task = CompletionTask(kind="completion", generate=8, compare="number")
    with pytest.raises(InputError, match=r"^tasks\.math\.compare is number, found none in the answer 'many' of row 0"):
        task.check_rows([{"prompt": "", "completion": "many"}], "tasks.math.evaluation")


def test_an_answer_of_which_nothing_is_left_is_refused() -> None:
    """Whatever a model says that is left of nothing, too, would be right."""
    task = CompletionTask(kind="completion", generate=8, compare="normalized")
    for answer in ("A", "the!", "..."):
        assert normalized(answer) is None
        said = r"^tasks\.math\.compare is normalized, found none in the answer .* of row 0.*; set compare: text"
        with pytest.raises(InputError, match=said):
            task.check_rows([{"prompt": "", "completion": answer}], "tasks.math.evaluation")


def test_what_people_read() -> None:
    task = CompletionTask(kind="completion", generate=8, compare="number")
    record = {"nll": 1.0} | task.answer_record(ROW, "72")
    expected = {"prompt": "how many?", "expected": ROW["completion"], "answer": "72", "right": True}
    assert task.table_row(ROW, record) == expected
    read = {"nll": 1.0, "correct": 3, "tokens": 4}
    assert task.table_row(ROW, read) == expected | {"answer": "3 of 4 tokens", "right": False}
