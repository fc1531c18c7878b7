import time

import pytest

from sensmerge.pipeline.tracking.system_metrics import Load, sampled


def test_the_machine_is_looked_at_again_and_again() -> None:
    before = time.time_ns() // 1_000_000
    with sampled(interval=0.05) as samples:
        while len(samples) < 3:
            time.sleep(0.05)
    assert len(samples) >= 3
    times = [sample.time for sample in samples]
    assert before <= times[0] <= times[-1] <= time.time_ns() // 1_000_000
    assert times == sorted(times)
    for sample in samples:
        assert 0 < sample.values["system_memory_usage_percentage"] <= 100
        assert {"cpu_utilization_percentage", "disk_usage_percentage"} <= sample.values.keys()


def test_a_run_that_fails_ends_the_looking() -> None:
    found: list[Load] = []

    def fail() -> None:
        with sampled(interval=0.05) as samples:
            try:
                raise RuntimeError("the run failed")
            finally:
                found.extend(samples)

    with pytest.raises(RuntimeError, match="the run failed"):
        fail()
    number = len(found)
    time.sleep(0.2)
    assert len(found) == number


def test_a_short_run_has_a_sample_too() -> None:
    with sampled() as samples:
        pass
    assert len(samples) == 1
