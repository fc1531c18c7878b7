"""Code that others have written for Python's interpreter, such as templates: it is stopped when its time is up.

A signal would be simpler, but reaches the main thread alone, and workers have others.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block, which may be an endless loop of Python's, once it has taken so long.

    One call of a function that is not Python's own, however long it takes, is not interrupted.
    """
    thread, lock = threading.get_ident(), threading.Lock()
    is_over = is_up = False

    def end() -> None:
        nonlocal is_up
        with lock:
            if not is_over:
                is_up = True
                _raise(thread, TimeoutError)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
            if is_up:  # it may not have been raised yet
                _raise(thread, None)


def _raise(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error when it next runs Python's code; None takes back one that it has not raised."""
    found = ctypes.py_object(error) if error else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), found)
