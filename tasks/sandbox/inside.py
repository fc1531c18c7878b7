"""What runs in the sandbox's own processes: three of them, for one program and its tests.

The first gives up what it may reach, starts the others and keeps the time. The second runs the tests, the third the
program, which has never held the tests, and can neither read the memory of the others nor stop them: the first is
outside the process namespace of the others, and the second is the first process in it.
"""

import ast
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from sensmerge.tasks.sandbox import isolation
from sensmerge.tasks.sandbox.programs import program_of
from sensmerge.tasks.sandbox.remote import Channel, Program, ProgramEndedError, UnsupportedError, serve

_TESTS_SHARE = 4
"""Tests have this many times the program's time and memory: they may hold copies of what it makes."""
_STDLIB = frozenset(sys.stdlib_module_names)


def main() -> None:
    """Read settings, program and tests from standard input, and write the verdict to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a namespace can be sent what it handles alone
    settings, program = _frame(), _frame()
    sys.path[:] = [name for name in sys.path if name not in settings["own_paths"]]
    try:
        if settings["isolate"]:
            isolation.isolate(Path(settings["root"]))
        else:
            _stay(Path(settings["root"]))
        os.environ.clear()
        isolation.end_with_parent()
        isolation.hide_memory()
    except OSError as error:
        print(json.dumps({"refused": str(error)}))
        return
    print(json.dumps({"outcome": _verdict(settings, program)}))


def _stay(folder: Path) -> None:
    """Work in a folder, with all that the machine lets an ordinary user reach."""
    if os.getuid() == 0:
        os.chown(folder, isolation.NOBODY, isolation.NOBODY)
    os.chdir(folder)
    isolation.become_nobody()


def _frame() -> Any:
    """Return the next part of standard input, read to the byte: what follows is for another process."""
    return json.loads(_take(int(_take(12))))


def _take(size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        more = os.read(0, size - len(found))
        if not more:
            raise EOFError
        found += more
    return bytes(found)


def _verdict(settings: dict[str, Any], program: dict[str, Any]) -> str:
    """Start tests and program, and return what became of them."""
    seconds = settings["seconds"]
    reading, writing = os.pipe()
    for_tests, for_program = socket.socketpair()
    tests_process = _start(lambda: _tests(settings, for_tests, writing), {0, for_tests.fileno(), writing})
    program_process = _start(lambda: _program(settings, program, for_program), {for_program.fileno()})
    for one in (writing, 0):
        os.close(one)
    for_tests.close()
    for_program.close()
    in_time = bool(select.select([reading], [], [], settings["wall"])[0])
    outcome = os.read(reading, 1000).decode() if in_time else "timeout"
    # The program first: where it is the first to end, all else of its namespace is still there to be waited for.
    for process in (program_process, tests_process):
        os.kill(process, signal.SIGKILL)
    used = os.wait4(program_process, 0)[2]
    os.waitpid(tests_process, 0)
    if outcome == "ended" and used.ru_utime + used.ru_stime >= seconds - 0.5:
        return "timeout"
    return outcome or "no verdict"


def _start(work: Callable[[], Any], keep: set[int]) -> int:
    """Start a process that does some work, holds no other files than it needs, and leaves; return its number."""
    child = os.fork()
    if child == 0:
        _leave(work, keep)
    return child


def _leave(work: Callable[[], Any], keep: set[int]) -> NoReturn:
    try:
        isolation.end_with_parent()
        null = isolation.null_device()
        for one in range(isolation.OPEN_FILES):
            if one < 3 and one not in keep:
                os.dup2(null, one)
            elif one not in keep:
                os.closerange(one, one + 1)
        work()
    finally:
        os._exit(0)


def _program(settings: dict[str, Any], program: dict[str, Any], end: socket.socket) -> None:
    """Be the process of the program."""

    def load() -> dict[str, Any]:
        text = program_of(program["context"], program["answer"], program["entry_point"])
        module = ModuleType("program")
        sys.modules["program"] = module
        exec(compile(text, "program", "exec"), module.__dict__)
        return module.__dict__

    isolation.limit(settings["seconds"], settings["memory"])
    serve(Channel(end), load)


def _tests(settings: dict[str, Any], end: socket.socket, verdict: int) -> None:
    """Be the process of the tests."""
    tests = _frame()
    isolation.limit(_TESTS_SHARE * settings["seconds"], _TESTS_SHARE * settings["memory"])
    os.write(verdict, _outcome(Program(Channel(end)), tests).encode()[:1000])


def _outcome(program: Program, tests: dict[str, Any]) -> str:
    """Return `passed`, or in a few words, which are the same each time, why not."""
    entry_point = tests["entry_point"]
    try:
        trees = [ast.parse(text) for text in tests["texts"]]
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} | {entry_point}
        names = {"__name__": "tests", **program.names(used, _STDLIB)}
        for tree in trees:
            exec(compile(tree, "tests", "exec"), names)
        if entry_point is not None:
            if entry_point not in names:
                return "undefined"
            names["check"](names[entry_point])
    except AssertionError:
        return "wrong"
    except ProgramEndedError:
        return "ended"
    except UnsupportedError as error:
        return f"unsupported: {error}"
    except BaseException as error:
        return f"raised {type(error).__name__}"
    return "passed"
