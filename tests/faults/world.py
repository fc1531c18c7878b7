"""A folder with tiny models, a recipe and a store, and commands that work on it in a process of their own."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from blake3 import blake3
from rich.console import Console

from sensmerge.pipeline import start, workflow
from sensmerge.pipeline.cli import main
from sensmerge.pipeline.execute.pieces import prepared
from sensmerge.pipeline.execute.worker import Done, Spent, run_finish, run_part
from sensmerge.pipeline.plan.models import hash_models, list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.checkpoints import digests
from tests.conftest import make_llama, make_tokenizer, perturbed, tiny_recipe, write_recipe
from tests.faults.operations import Operations

LIMIT = 180
"""Seconds for one command."""
EXPERTS = ("math", "code")


@dataclass(frozen=True)
class Ended:
    """How a command has ended."""

    status: int
    """exit status; negative: the number of the signal that ended it"""
    said: str
    """what it has printed"""
    operations: Sequence[tuple[str, str]] = ()
    """what it did to files, if it was watched and came to its end"""


def make_world(folder: Path) -> None:
    """Write models and recipe to a new folder."""
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    networks = {"base": make_llama()}
    networks |= {name: perturbed(make_llama(), seed) for seed, name in enumerate(EXPERTS, 1)}
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    recipe = tiny_recipe({name: Path(name) for name in networks}, folder)
    dynamic = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}
    recipe["merges"] |= {"ta-se": dynamic}
    recipe["gate"] = {"metric": "math/perplexity"}  # these experts have no skill that others could be measured by
    write_recipe(folder, recipe)


def change_expert(folder: Path) -> None:
    """Train an expert of a world on, so to say."""
    perturbed(make_llama(), 7).save_pretrained(folder / "code")


def restore(template: Path, folder: Path) -> None:
    """Make a world what it was when it was saved."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)


def warm_up(folder: Path) -> None:
    """Import and compile in this process, in a folder of its own, what the commands in its copies then have.

    A copy of a process has no threads but one. So nothing may start any here that wait for work ever after, as hashing
    on all cores does.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    digests.compute = _in_one_thread
    for name in ("record", "champion", "load"):
        import_module(f"sensmerge.pipeline.tracking.{name}")
    make_world(folder)
    recipe, store = load_recipe(folder / "recipe.yaml", ()), Store(folder / "store")
    listings = hash_models(list_models(recipe, folder, store.hub_cache), store.hub_cache)
    steps_here(make_plan(recipe, folder, store, listings), None, Console(quiet=True))


_compute = digests.compute


def _in_one_thread(path: Path, kind: str) -> str:
    return f"blake3:{blake3(path.read_bytes()).hexdigest()}" if kind == "blake3" else _compute(path, kind)


def steps_here(
    plan: Plan,
    address: str | None,
    console: Console,
    count_steps: bool = False,
    wait: float = 0,
    on_end: Callable[[Step, Done], None] | None = None,
) -> None:
    """Do in this process, one after the other, what `execute` has Ray's workers do."""
    plan.write_rows()
    for step in plan.steps:
        if step.title in plan.todo:
            job, spent = prepared(step, plan.store), Spent()
            for part in job.parts():
                spent += run_part(job, part, plan.store.partial(step.key), 1, step.models).spent
            done = run_finish(job, plan.store, step.key, spent, 1, step.models)
            if on_end is not None:
                on_end(step, done)


def command(
    folder: Path, words: Sequence[str], operations: Operations | None = None, after: float | None = None
) -> Ended:
    """Run a command line in a copy of this process, which has imported all it needs; its steps run in there too.

    Args:
        folder: the world, which the command runs in.
        words: of the command line.
        operations: what watches it.
        after: seconds until it is killed.
    """
    words = [word.format(folder=folder) for word in words]
    log, trace = folder.with_suffix(".log"), folder.with_suffix(".operations")
    trace.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _become(folder, words, log)
        if after is not None:
            timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        if operations is not None:
            operations.watch()
        status = _status(main)
        sys.stdout.flush()
        sys.stderr.flush()
        if operations is not None:
            operations.first = None
            trace.write_text("".join(f"{name} {path}\n" for name, path in operations.done))
        os._exit(status)
    status = _wait(child)
    lines = trace.read_text().splitlines() if trace.exists() else []
    return Ended(status, log.read_text(), [(one.partition(" ")[0], one.partition(" ")[2]) for one in lines])


def _become(folder: Path, words: Sequence[str], log: Path) -> None:
    """Make this process one that was started in a world with a command line."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ["SENSMERGE_CACHE"] = str(folder / "cache")
    sys.argv = ["sensmerge", *words]
    workflow.execute = steps_here
    start._connect_ahead = lambda options: None


def _status(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _wait(child: int) -> int:
    """Return the exit status of a process, which is killed after `LIMIT`."""
    deadline = time.monotonic() + LIMIT
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


@dataclass(frozen=True)
class Scenario:
    """A command and the world that it begins in."""

    name: str
    words: Sequence[str]
    """`{folder}` stands for the world"""
    before: Sequence[Sequence[str] | Callable[[Path], None]] = ()
    """what has made the world: commands, and changes of files"""
    store: str = "store"
    """folder of the store, in the world"""

    def make(self, folder: Path) -> None:
        """Make the world that the command begins in."""
        make_world(folder)
        for one in self.before:
            if callable(one):
                one(folder)
            else:
                ended = command(folder, one)
                assert ended.status in (0, 3), ended.said


STORE = ("--store", "store")
RUN = ("run", "recipe.yaml", *STORE)
REFRESH = ("refresh", "recipe.yaml", *STORE)
REMOTE = ("--store", "file://{folder}/remote", "--tracking-uri", "sqlite:///{folder}/store/mlflow.db")
SCENARIOS = (
    Scenario("run", RUN),
    Scenario("refresh", REFRESH, (REFRESH, change_expert)),
    Scenario("gc", ("gc", *STORE, "--keep", "1", "--delete"), (REFRESH, RUN, change_expert, REFRESH, RUN)),
    Scenario("upload", ("run", "recipe.yaml", *REMOTE), store="remote"),
)
