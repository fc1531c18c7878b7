"""Finished steps in what a node tells Prometheus."""

import re
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

# A process of its own: Ray exports metrics once for every connection that a process has had.
DRIVER = """
import sys
from pathlib import Path
import ray
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.execute.run import StepMetrics
from sensmerge.pipeline.store.store import Key
from sensmerge.tasks.checkpoints.listing import Listing, LocalModel
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.pipeline.execute.worker import Done, Spent

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
(node,) = (one for one in ray.nodes() if one["Alive"])
metrics = StepMetrics("counted")
job = DownloadJob(Listing(LocalModel(Path()), Path(), None, ()), Path())
for name in ("ta", "ties"):
    step = Step(name, Key("merge", name, {}), (), job)
    metrics.count(step, Done({}, Spent(seconds=2.5), bytes=1000))
print(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
def test_steps_are_counted(ray_address: str) -> None:
    command = [sys.executable, "-c", DRIVER, ray_address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        page = driver.stdout.readline().strip()
        assert page.startswith("http://")
        wanted = {"steps_total": 2, "bytes_total": 2000, "step_seconds_count": 2}
        found: dict[str, float] = {}
        deadline = time.monotonic() + 60
        while found != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(1)
            for line in urlopen(page).read().decode().splitlines():
                match = re.fullmatch(r"ray_sensmerge_(\w+)\{(.*)\} (\S+)", line)
                if match and match[1] in wanted and 'recipe="counted"' in match[2] and 'stage="merge"' in match[2]:
                    found[match[1]] = float(match[3])
        driver.communicate()
    assert driver.returncode == 0
