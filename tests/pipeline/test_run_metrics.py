"""Finished steps in what a node tells Prometheus."""

import re
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray

from pipeline.run import StepMetrics
from pipeline.worker import Done, Spent
from tests.conftest import plan_of


@pytest.mark.ray
def test_steps_are_counted(llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str) -> None:
    plan = plan_of(tmp_path, llama_recipe)
    ray.init(address=ray_address, logging_level="ERROR")
    try:
        metrics = StepMetrics("counted")
        for step in plan.steps:
            if step.stage == "merge":
                metrics.count(step, Done({}, Spent(seconds=2.5), bytes=1000))
        (node,) = (one for one in ray.nodes() if one["Alive"])
        page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        wanted = {"steps_total": 2, "bytes_total": 2000, "step_seconds_count": 2}
        found: dict[str, float] = {}
        deadline = time.monotonic() + 60
        while found != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(1)
            lines = urlopen(page).read().decode().splitlines()
            for line in lines:
                match = re.fullmatch(r"ray_sensmerge_(\w+)\{(.*)\} (\S+)", line)
                if match and match[1] in wanted and 'recipe="counted"' in match[2] and 'stage="merge"' in match[2]:
                    found[match[1]] = float(match[3])
    finally:
        ray.shutdown()
