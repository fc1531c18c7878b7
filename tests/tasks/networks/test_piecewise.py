"""Texts piece by piece: together they are the whole, and nothing that is said is taken back."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sensmerge.tasks.networks.generation import until, written
from sensmerge.tasks.networks.piecewise import Listen, pieces, settled


def told(ids: list[int], tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> Iterator[str]:
    """The pieces of a text whose tokens come one after the other, up to a text that ends it."""

    def write(listen: Listen) -> str:
        for place in range(len(ids)):
            text = written(ids[: place + 1], tokenizer)
            listen(until(text, stop))
            if any(one in text for one in stop):
                return until(text, stop)
        return written(ids, tokenizer, stop)

    return pieces(write, lambda text: settled(text, stop, False))


@given(st.text("abé€😀 \n", max_size=30), st.lists(st.text("ab 😀", min_size=1, max_size=3), max_size=2))
def test_pieces_make_the_whole(tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]) -> None:
    found = list(told(tokenizer(text)["input_ids"], tokenizer, tuple(stop)))
    assert "".join(found) == until(text, stop)
    assert "" not in found
    assert not any("\ufffd" in one for one in found)


def test_pieces_come_while_the_rest_is_written() -> None:
    gate = threading.Semaphore(0)

    def write(listen: Listen) -> str:
        listen("one")
        assert gate.acquire(timeout=60)
        listen("one two")
        return "one two three"

    found = pieces(write, lambda text: text)
    assert next(found) == "one"
    gate.release()
    assert list(found) == [" two", " three"]


@pytest.mark.parametrize(
    ("text", "stop", "cleans", "expected"),
    [
        ("a b", (), False, "a b"),
        ("a b", (), True, "a"),
        ("ab", (), True, ""),
        ("a\ufffd\ufffd", (), False, "a"),
        ("say: \n", ("\n\n",), False, "say: "),
        ("xaab", ("aabc", "bd"), False, "x"),
        ("xaa", ("aaa",), False, "x"),
    ],
)
def test_what_is_settled(text: str, stop: tuple[str, ...], cleans: bool, expected: str) -> None:
    assert settled(text, stop, cleans) == expected


def test_an_error_reaches_the_listener_and_a_listener_who_leaves_ends_the_writing() -> None:
    def fails(listen: Listen) -> str:
        listen("one")
        raise ValueError("no more")

    found = pieces(fails, lambda text: text)
    assert next(found) == "one"
    with pytest.raises(ValueError, match="no more"):
        next(found)

    ended = []

    def goes_on(listen: Listen) -> str:
        try:
            while True:
                listen("one")
        finally:
            ended.append(True)

    endless = pieces(goes_on, lambda text: text)
    assert next(endless) == "one"
    endless.close()  # type: ignore[attr-defined]
    assert ended == [True]
