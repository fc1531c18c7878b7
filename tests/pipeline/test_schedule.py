"""Schedules: their times, what they say of their runs, and how they are stopped, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest
from rich.console import Console

from sensmerge.pipeline.schedule import Times, keep
from sensmerge.pipeline.store.store import Store
from tests.conftest import command_line, write_recipe

EVERY_SECOND = "* * * * * *"


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        ("0 3 * * *", "2026-11-25 02:59:59", ["2026-11-25T03:00:00+01:00", "2026-11-26T03:00:00+01:00"]),
        ("0 3 * * 1", "2026-11-25 12:00:00", ["2026-11-30T03:00:00+01:00"]),  # Monday; 0 and 7 are Sunday
        ("0 3 * * 7", "2026-11-25 12:00:00", ["2026-11-29T03:00:00+01:00"]),
        ("0 3 1 * mon", "2026-11-25 12:00:00", ["2026-11-30T03:00:00+01:00", "2026-12-01T03:00:00+01:00"]),  # or
        # An hour that the clock skips, and one that it shows twice: once.
        ("30 2 * * *", "2027-03-27 12:00:00", ["2027-03-28T03:00:00+02:00", "2027-03-29T02:30:00+02:00"]),
        ("30 2 * * *", "2026-10-24 12:00:00", ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"]),
    ],
)
def test_times_are_those_of_cron(cron: str, after: str, expected: list[str]) -> None:
    times, moment = (
        Times(cron, "Europe/Berlin"),
        datetime.fromisoformat(after).replace(tzinfo=ZoneInfo("Europe/Berlin")),
    )
    found = []
    for _ in expected:
        moment = times.next(moment)
        found.append(moment.isoformat())
    assert found == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--cron", "0 25 * * *"], '--cron "0 25 * * *": Bad hour; give minute, hour, day of month'),
        (["--cron", "daily"], '--cron "daily": Wrong number of fields'),
        (["--cron", "0 3 */20 * 1L"], '--cron "0 3 */20 * 1L": does not occur'),
        (["--cron", "0 3 * * *", "--timezone", "Europe/Bonn"], "--timezone Europe/Bonn: unknown; give an IANA name"),
        (["--cron", "0 3 * * *", "--timezone", "../etc/passwd"], "--timezone ../etc/passwd: unknown"),
        (["--timezone", "Europe/Berlin"], "--timezone Europe/Berlin: needs --cron"),
        (["--cron", "0 3 * * *", "--set", "merges.ta.weigth=1"], "merges.ta"),
    ],
)
def test_bad_input_is_found_before_the_first_night(
    llama_recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    complaint: str,
) -> None:
    recipe = write_recipe(tmp_path, llama_recipe)
    assert command_line("refresh", recipe, "--store", tmp_path / "store", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert complaint in error
    assert not (tmp_path / "store").exists()


def test_runs_never_overlap_and_what_they_end_with_ends_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Three runs of more than two seconds, at every second; the fourth tells the schedule to stop, and goes on.
    run = (
        "import json, os, signal, sys, time\n"
        "from pathlib import Path\n"
        f"log = Path({str(log)!r})\n"
        "number = len(log.read_text().split()) // 2 if log.exists() else 0\n"
        "say = lambda what: log.open('a').write(f'{what}:{time.time()}\\n')\n"
        "say('start')\n"
        "if number == 3:\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "time.sleep(2.2)\n"
        "say('end')\n"
        "sys.exit([0, 3, 2][number])\n"
    )
    store, said = Store(tmp_path / "store"), StringIO()
    keep([sys.executable, "-c", run], Times(EVERY_SECOND, "Europe/Berlin"), store, Console(file=said))
    events = [(what, float(moment)) for what, moment in (line.split(":") for line in log.read_text().split())]
    assert [what for what, _ in events] == ["start", "end"] * 3 + ["start"]
    assert [moment for _, moment in events] == sorted(moment for _, moment in events)
    lines = said.getvalue().splitlines()
    for expected in (
        f"schedule: up, pid {os.getpid()}, next run ",
        "schedule: refresh succeeded (exit status 0), ",
        "schedule: refresh succeeded, but its challenger was not promoted (exit status 3), ",
        "schedule: refresh could not start, see above (exit status 2), ",
        "schedule: SIGTERM: stopping the refresh",
        "schedule: refresh was ended by SIGTERM, ",
        "schedule: stopped by SIGTERM",
    ):
        assert sum(expected in line for line in lines) == 1, expected
    # Seconds that passed during a run are one run, right after it.
    starts = [moment for what, moment in events if what == "start"]
    planned = [
        datetime.fromisoformat(line.rpartition("next run ")[2]).timestamp() for line in lines if "started" in line
    ]
    assert all(next_run <= start for next_run, start in zip(planned, starts[1:], strict=False))
    assert all(next_run - start <= 1 for next_run, start in zip(planned, starts, strict=True))
    health = json.loads((store.root / "health.json").read_text())
    assert (health["pid"], health["state"], health["next_run"]) == (os.getpid(), "stopped", None)
    assert health["last_run"]["exit_status"] == -signal.SIGTERM
    begun, ended = (datetime.fromisoformat(health["last_run"][key]) for key in ("start", "end"))
    assert begun <= ended
    assert begun.utcoffset() == ZoneInfo("Europe/Berlin").utcoffset(begun.replace(tzinfo=None))


@pytest.mark.ray
def test_stopped_in_the_middle_of_a_run(llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str) -> None:
    for task in llama_recipe["tasks"].values():
        del task["evaluation"]
    recipe, store = write_recipe(tmp_path, llama_recipe), tmp_path / "store"
    report = tmp_path / "report.json"
    words = [sys.executable, "-m", "pipeline", "refresh", recipe, "--store", store, "--report", report]
    schedule = subprocess.Popen([*map(str, words), "--cron", EVERY_SECOND], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (list(store.glob("statistics/*.partial")) and list(store.glob("download/*/manifest.json"))):
            assert schedule.poll() is None, "the schedule ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running = json.loads((store / "health.json").read_text())
        family = psutil.Process(schedule.pid).children(recursive=True)
        # Another schedule and another run are refused, and disturb nothing.
        assert command_line("refresh", recipe, "--store", store, "--cron", EVERY_SECOND) == 2
        assert command_line("refresh", recipe, "--store", store) == 2
    finally:
        schedule.send_signal(signal.SIGTERM)
        said, _ = schedule.communicate(timeout=60)
    assert schedule.returncode == 0
    assert running["pid"] == schedule.pid
    assert running["state"] == "running"
    assert running["last_run"]["end"] is None
    assert datetime.fromisoformat(running["next_run"]).utcoffset() == timedelta(0)
    stopped = json.loads((store / "health.json").read_text())
    assert (stopped["state"], stopped["last_run"]["exit_status"]) == ("stopped", 143)
    assert "refresh was stopped; the next one continues it (exit status 143)" in said
    assert len(family) > 3, "the run, and its Ray"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "nothing that the run started is left"
    assert not report.exists()

    done = {path.parent for path in store.glob("*/*/manifest.json") if path.parent.suffix != ".partial"}
    assert done, "some steps had ended"
    assert command_line(*words[3:], "--address", ray_address) == 0
    status = [stage["status"] for stage in json.loads(report.read_text())["stages"]]
    assert status.count("cached") == len(done)
    assert "run" in status
    assert not list(store.glob("*/*.partial"))
