"""Blocks that end when their time is up, and not after that."""

import threading

import pytest

from sensmerge.tasks.deadline import deadline


def test_an_endless_loop_ends_in_any_thread() -> None:
    ended = []

    def work() -> None:
        try:
            with deadline(0.01):
                while True:
                    pass
        except TimeoutError:
            ended.append(threading.get_ident())

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(set(ended)) == 2


def test_what_ends_in_time_goes_on_undisturbed() -> None:
    """However near to the deadline it is, nothing is raised behind the block."""
    for _ in range(50):
        try:
            with deadline(1e-3):
                for _ in range(20_000):
                    pass
        except TimeoutError:
            pass
        for _ in range(1000):
            pass
    with pytest.raises(KeyError), deadline(60):
        raise KeyError
