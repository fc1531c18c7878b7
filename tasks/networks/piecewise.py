"""The text of a continuation piece by piece, while the rest of it is being written."""

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread

Listen = Callable[[str], None]


class _AbandonedError(Exception):
    """Nobody listens any more."""


def pieces(write: Callable[[Listen], str], settled: Callable[[str], str]) -> Iterator[str]:
    """Yield pieces that together are what `write` returns, as soon as they are certain.

    The writing is done in a thread of its own; it ends with the next token if the iterator is closed.

    Args:
        write: writes a text, calls what it is given with all of it so far again and again, and returns it.
        settled: says how much of a text no later token changes.

    Raises:
        What `write` raises.
    """
    heard: SimpleQueue[tuple[str, BaseException | None, bool]] = SimpleQueue()
    abandoned = Event()

    def listen(text: str) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        heard.put((settled(text), None, False))

    def work() -> None:
        try:
            heard.put((write(listen), None, True))
        except BaseException as error:
            heard.put(("", error, True))

    thread = Thread(target=work, daemon=True)
    thread.start()
    said, is_last = 0, False
    try:
        while not is_last:
            text, error, is_last = heard.get()
            if error is not None:
                raise error
            if len(text) > said:
                piece, said = text[said:], len(text)
                yield piece
    finally:
        abandoned.set()
        thread.join()


def settled(text: str, stop: Sequence[str], cleans: bool) -> str:
    """Return the beginning of a text that no later token changes.

    Args:
        text: all that is written so far.
        stop: texts that would end it: the beginning of one may be its end.
        cleans: whether the tokenizer takes spaces away when it sees what follows them; then words come whole.
    """
    text = text.rstrip("\ufffd")  # bytes of a character whose others are to come
    if cleans:
        text = text[: max(text.rfind(" "), 0)]
    begun = [size for one in stop for size in range(1, len(one)) if text.endswith(one[:size])]
    return text[: len(text) - max(begun, default=0)]
