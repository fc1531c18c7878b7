"""What is shown of work under way, with and without a terminal."""

import io
import time

import pytest
from rich.console import Console

from sensmerge.pipeline.execute.pieces import clock
from sensmerge.pipeline.execute.progress import progress


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = io.StringIO()
    with progress(Console(file=file), 2, "steps") as shown:
        for second in range(0, 65, 5):
            now = 100.0 + second
            shown.at_work([f"merge ta ({second} s)", "merge b", "merge c", *["evaluate d"] * 80])
            if second == 10:
                shown.advance("merge [a] is done")  # no markup
        now += 30
        shown.at_work(["merge c"], 4)
        now += 30
        shown.at_work([], 2)
        now += 30
        shown.at_work([])
        shown.advance(None)
    assert file.getvalue().splitlines() == [
        "[1/2] merge [a] is done",
        "at work: merge ta (40 s), merge b, merge c and 80 more",
        "at work: merge c; 4 waiting for a worker",
        "2 waiting for a worker",
    ]


def test_a_terminal_shows_what_is_at_work_beside_the_bar() -> None:
    file = io.StringIO()
    with progress(Console(file=file, force_terminal=True, width=120), 2, "steps") as shown:
        shown.at_work(["merge a", "merge b", "merge c", "merge d", "merge e"], 1)
        shown.advance("one")
    text = file.getvalue()
    assert "merge a, merge b, merge c and 2 more; 1 waiting for a worker" in text
    assert "[1/2] one" in text
    assert "at work" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (7300, "2 h 1 min")]
)
def test_times_as_people_read_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text
