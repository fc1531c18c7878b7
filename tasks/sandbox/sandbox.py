"""Programs judged by tests, each in processes of its own that the machine keeps from everything else."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sensmerge

PASSED = "passed"
_OWN_PATH = str(Path(sensmerge.__file__).resolve().parents[1])
_START = "import sys; sys.path.append(sys.argv[1]); from sensmerge.tasks.sandbox.inside import main; main()"
"""Standard library first, and no package but our own."""
_GRACE = 10
"""Seconds more than the processes' own time before all are killed from outside."""
_WALL = 3
"""Seconds of the clock per second of CPU time: a program that waits ends, too."""


@dataclass(frozen=True)
class GeneratedProgram:
    """A program as a model wrote it; `programs.program_of` says what is run of it."""

    context: str
    """code that the answer goes on from, or repeats"""
    answer: str
    entry_point: str | None
    """the function that is asked for; None for any"""


@dataclass(frozen=True)
class ProgramTests:
    """What a program has to pass."""

    texts: tuple[str, ...]
    """Python code, run in turn, in which the program's names are known"""
    entry_point: str | None = None
    """a name of the program's that a function `check`, which the texts define, is called with at the end"""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: int
    """of CPU time; of the clock, three times as much"""
    memory: int
    """MiB"""


class NoSandboxError(RuntimeError):
    """The machine does not isolate processes; the text says why."""


def run_tests(program: GeneratedProgram, tests: ProgramTests, limits: Limits, isolate: bool = True) -> str:
    """Run tests on a program and return the outcome: `passed`, or in a few words why not.

    wrong: a test failed; timeout; ended: the program ended its process, or sent what is no value; undefined: it lacks
    the entry point; raised NAME: an exception; unsupported: …: a test does what needs the program in its own process;
    no verdict: the machine ended the tests.

    Args:
        program: the program.
        tests: what it has to pass.
        limits: what it may use.
        isolate: whether to refuse where the machine cannot isolate it; otherwise only the limits hold.

    Raises:
        NoSandboxError: the machine cannot isolate it.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-") as root:
        settings = {
            "isolate": isolate,
            "root": root,
            "own_paths": [_OWN_PATH],
            "seconds": limits.seconds,
            "memory": limits.memory,
            "wall": _WALL * limits.seconds,
        }
        frames = [
            settings,
            {"context": program.context, "answer": program.answer, "entry_point": program.entry_point},
            {"texts": list(tests.texts), "entry_point": tests.entry_point},
        ]
        found = _run(b"".join(_frame(one) for one in frames), _WALL * limits.seconds + _GRACE)
    if "refused" in found:
        raise NoSandboxError(found["refused"])
    outcome: str = found["outcome"]
    return outcome


@cache
def missing_isolation(isolate: bool = True) -> str | None:
    """Return why this machine cannot isolate programs, or run them with limits alone; None if it can."""
    try:
        run_tests(GeneratedProgram("", "", None), ProgramTests(()), Limits(5, 1024), isolate)
    except NoSandboxError as error:
        return str(error)
    return None


def _frame(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return f"{len(text):12d}".encode() + text


def _run(sent: bytes, seconds: int) -> dict[str, Any]:
    """Run the sandbox's processes on their input and return what they say."""
    command = [sys.executable, "-s", "-S", "-P", "-B", "-c", _START, _OWN_PATH]
    environment, pipe = {"PYTHONHASHSEED": "0"}, subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd="/", start_new_session=True
    ) as process:
        try:
            out, said = process.communicate(sent, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"outcome": "timeout"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    try:
        found: dict[str, Any] = json.loads(out)
    except ValueError:
        raise RuntimeError(f"the sandbox ended with {process.returncode}: {said.decode(errors='replace')}") from None
    return found
