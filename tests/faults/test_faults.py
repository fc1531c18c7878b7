"""A few faults of the campaign; `python -m tests.faults` has them all."""

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.kills import Outcome
from tests.faults.report import table


def test_killed_and_refused_commands_do_no_harm(tmp_path: Path) -> None:
    """In a process of its own, which has no threads when it is copied."""
    words = ["--only", "upload", "--points", "8", "--jobs", "1", "--folder", tmp_path / "w"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *map(str, words)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| killed at a file operation | 2, none |" in done.stdout, done.stdout
    assert "| disk full from a file operation on | 1, none |" in done.stdout, done.stdout


def test_harm_is_told() -> None:
    told = table([Outcome("killed", "run", "open x", 1.0, ["x is missing"]), Outcome("killed", "run", "open y", 1.0)])
    assert "| killed | 2, 1 |" in told
    assert "- run, killed, open x: x is missing" in told
