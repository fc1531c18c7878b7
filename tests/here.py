"""Runs a recipe with its steps in this process: for tests of what a run finds, and not of how Ray does it."""

from collections.abc import Callable
from unittest.mock import patch

from sensmerge.pipeline import start, workflow
from sensmerge.pipeline.execute.pieces import prepared
from sensmerge.pipeline.execute.worker import Done, Spent, run_finish, run_part
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Step
from tests.conftest import command_line


def steps_here(plan: Plan, *_: object, on_end: Callable[[Step, Done], None] | None = None, **__: object) -> None:
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


def run_here(*words: object) -> int:
    """Do what `command_line("run", …)` does, without Ray."""
    with patch.object(workflow, "execute", steps_here), patch.object(start, "_connect_ahead", lambda options: None):
        return command_line("run", *words)
