"""A signal becomes an exception that closes what is open."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sensmerge.pipeline.execute.run import execute
from sensmerge.pipeline.execute.stop import SIGNALS, Stopped, stoppable
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.store import Key
from tests.conftest import plan_of
from tests.pipeline.execute.jobs import Tell

BOTH = pytest.mark.parametrize(("told", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


@BOTH
def test_a_signal_ends_the_block_and_only_that(told: signal.Signals, status: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped, match=told.name) as raised, stoppable():
        signal.raise_signal(told)
    assert raised.value.exit_status == status
    assert not isinstance(raised.value, Exception)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_what_goes_wrong_without_a_signal_is_what_it_was() -> None:
    with pytest.raises(KeyError, match="absent"), stoppable():
        raise KeyError("absent")


@pytest.mark.ray
@BOTH
def test_while_ray_waits_for_a_step(
    llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str, told: signal.Signals, status: int
) -> None:
    plan = plan_of(tmp_path, llama_recipe)
    job = Tell(os.getpid(), told)
    step = Step("work", Key.of("work", job), (), job)
    with pytest.raises(Stopped, match=told.name) as raised, stoppable():
        execute(replace(plan, steps=(step,), todo={step.title: "new"}), ray_address, Console(quiet=True))
    assert raised.value.exit_status == status
    assert plan.store.partial(step.key).is_dir()
    assert plan.store.manifest(step.key) is None
