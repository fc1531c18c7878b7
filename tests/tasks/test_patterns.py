import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.patterns import TimeLimit, compile_pattern

SLOW = "(a|aa)+$"
"""Takes a time that grows by half with each letter, in any engine that goes back."""


def last(pattern: str, text: str) -> str | None:
    return compile_pattern(pattern, "answer").last(text, TimeLimit())


@given(
    st.text("ab1. ", max_size=12),
    st.sampled_from(
        [r"\d+", "(a|b)*", "a+?(?=b)", "^a|b$", "(?i)AB", "(?<!a)b", "(a)?b", "[ab1]{2,3}", r"(\w)\1", "a{,2}", "b++"]
    ),
)
def test_what_is_found_is_what_python_finds(text: str, pattern: str) -> None:
    found = list(re.finditer(pattern, text))
    groups = re.compile(pattern).groups
    assert last(pattern, text) == ((found[-1][1 if groups else 0] or "") if found else None)
    whole = compile_pattern(pattern, "answer").matches(text, TimeLimit())
    assert whole == (re.fullmatch(pattern, text) is not None)


def refused(pattern: str, text: str = "") -> str:
    with pytest.raises(InputError) as error:
        last(pattern, text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 500
    return str(error.value)


def test_python_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    assert compile_pattern(r"[[(](\w)[\])]", "here").matches("(x)", TimeLimit())
    assert not recwarn.list


def test_a_slow_pattern_ends() -> None:
    begin = time.process_time()
    assert refused(SLOW, "a" * 60 + "b").startswith(f"answer: searching a text for {SLOW!r} takes too long; write")
    assert time.process_time() - begin < 5


def test_searches_may_have_one_limit_together() -> None:
    limit, pattern = TimeLimit(0.5), compile_pattern(SLOW, "answer")
    searches = (pattern.matches("a" * 24 + "b", limit) for _ in range(10_000))
    with pytest.raises(InputError, match="takes too long"):
        any(searches)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a", "is not a regular expression: missing )"),
        (r"\p{L}", "is not a regular expression: bad escape"),
        ("a**", "is not a regular expression: multiple repeat"),
        ("(" * 900 + ")" * 900, "is not a regular expression"),
        ("a" * 2001, "has 2,001 characters; expected a pattern of at most 2,000"),
        ("a{4294967294}", "repeats more than 10,000 characters"),
        ("(?:(?:ab|cd){1000}){1000}", "repeats more than 10,000 characters"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("(?:model){e<=1}", "is ambiguous"),
        ("[[:alpha:]]", "is ambiguous"),
    ],
)
def test_patterns_that_are_refused(pattern: str, reason: str) -> None:
    assert reason in refused(pattern)


@pytest.mark.parametrize("pattern", [r"[0-9a-f]{8}-[0-9a-f]{4}", r"\{e\}", '{"answer": "([^"]*)"}', r"\[\[:x"])
def test_patterns_that_look_alike_are_read(pattern: str) -> None:
    assert last(pattern, "nothing") is None
