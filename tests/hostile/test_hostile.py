import subprocess
import sys
from pathlib import Path

from tests.hostile.cases import KINDS
from tests.hostile.sandbox import Outcome


def test_a_sample_of_every_kind_is_refused_in_one_line_or_accepted() -> None:
    """Of hundreds; in a process of its own, which has started no threads before it forks."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile", "--count", str(len(KINDS)), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" in done.stdout


def test_what_a_finding_is() -> None:
    assert Outcome(2, "error: no such file\n", []).finding is None
    assert Outcome(0, "a note\n", []).finding is None
    assert Outcome(1, "Traceback\nKeyError: 'x'\n", []).finding == "ended with status 1: KeyError: 'x'"
    assert Outcome(None, "\nended by SIGKILL", []).finding == "ended with status None: ended by SIGKILL"
    assert Outcome(2, "error: x\nmore\n", []).finding == "said 2 lines, 8 characters"
    assert Outcome(2, "error: " + "x" * 501, []).finding == "said 1 lines, 508 characters"
    assert Outcome(2, "error: x", ["os.system ls"]).finding == "did os.system ls"
