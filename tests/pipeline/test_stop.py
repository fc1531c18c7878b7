"""A signal becomes an exception that closes what is open."""

import signal

import pytest

from pipeline.stop import SIGNALS, Stopped, stoppable


@pytest.mark.parametrize(("told", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_block_and_only_that(told: signal.Signals, status: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped, match=told.name) as raised, stoppable():
        signal.raise_signal(told)
    assert raised.value.exit_status == status
    assert not isinstance(raised.value, Exception)
    assert [signal.getsignal(each) for each in SIGNALS] == before
