"""An execution in MLflow while it runs: its run is there from the start, and is told of steps as they end.

MLflow takes seconds to import and a server may be slow, so all of that is done beside the work.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sensmerge.pipeline.execute.stop import Stopped
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.report.results import role_of, scores_of
from sensmerge.pipeline.tracking.metrics import main_metric
from sensmerge.tasks.errors import StepError
from sensmerge.tasks.urls import public_text

if TYPE_CHECKING:
    from sensmerge.pipeline.execute.worker import Done

LOWEST = 19
"""Niceness of what may always wait."""


@dataclass(frozen=True)
class EndedStep:
    """What MLflow is told of a step that has ended well."""

    number: int
    """how many have ended, this one included"""
    at: float
    """when, in seconds since the epoch"""
    seconds: float
    """what it took"""
    metrics: Mapping[str, float]
    """of the execution"""
    scores: Mapping[str, Mapping[str, float]]
    """model → metrics of its run"""


class LiveRun:
    """The run of an execution, for the time that its steps run.

    One thread tells MLflow of all steps that have ended since it did so last; nobody waits for it before `opened`.
    Where MLflow fails, that is said once, and it is told again when the next step ends.
    """

    def __init__(self, uri: str, plan: Plan, texts: tuple[str, str], say: Callable[[str], None]) -> None:
        """Get ready.

        Args:
            uri: where runs are recorded.
            plan: whose steps are about to run.
            texts: the recipe and the plan, for people.
            say: what is told of a failure.
        """
        self._uri, self._plan, self._texts, self._say = uri, plan, texts, say
        self._beside = ThreadPoolExecutor(1, initializer=_give_way)
        self._told: list[Future[None]] = []
        self._news: deque[EndedStep] = deque()
        self._run: str | None = None
        self._models: dict[str, str] = {}
        self._number, self._seconds = 0, dict[str, float]()
        self._has_failed = False

    def __enter__(self) -> Self:
        """Open the run."""
        self._told.append(self._beside.submit(self._tell))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as the work did, if that was not well."""
        self._beside.shutdown(cancel_futures=True)
        if error is not None and self._run is not None:
            from sensmerge.pipeline.tracking import record

            is_stopped = isinstance(error, Stopped | KeyboardInterrupt)
            reason = public_text(str(error) or type(error).__name__)
            record.end(self._uri, self._run, "KILLED" if is_stopped else "FAILED", reason)

    def step_ended(self, step: Step, done: "Done") -> None:
        """Have MLflow told of a step that has ended well."""
        self._number += 1
        self._seconds[step.stage] = self._seconds.get(step.stage, 0.0) + done.spent.seconds
        metrics = {
            "steps/done": self._number,
            "steps/planned": len(self._plan.todo),
            f"seconds/{step.stage}": self._seconds[step.stage],
        }
        self._news.append(EndedStep(self._number, time.time(), done.spent.seconds, metrics, self._scores(step)))
        self._told.append(self._beside.submit(self._tell))

    def opened(self) -> tuple[str | None, Mapping[str, str]]:
        """Return the execution's run, None if it could not be opened, and the runs of models that have scores.

        Waits until MLflow was told of all steps; none may end after this.
        """
        self._beside.shutdown()
        for told in self._told:
            told.result()
        return self._run, self._models

    def _tell(self) -> None:
        """Tell of all steps that nobody has told of yet."""
        from sensmerge.pipeline.tracking import record, steps
        from sensmerge.pipeline.tracking.client import at_once

        news = [self._news.popleft() for _ in range(len(self._news))]
        try:
            with at_once():  # again with the next step, and patiently at the end
                if self._run is None:
                    recipe, plan = self._texts
                    self._run = record.begin(self._plan.recipe.name, recipe, plan, self._uri, self._plan.store.root)
                if news:
                    roles = {name: role_of(self._plan, name) for name in self._plan.models()}
                    steps.tell(self._uri, self._run, news, roles, self._models)
        except StepError as error:
            self._news.extendleft(reversed(news))
            if not self._has_failed:
                self._has_failed = True
                self._say(f"{error}; the steps go on, and are recorded when all have ended")

    def _scores(self, step: Step) -> dict[str, dict[str, float]]:
        """Return main metrics of models that a step has scored; at a URL, they are seen when all steps have ended."""
        if step.stage != "evaluate" or self._plan.store.remote is not None:
            return {}
        found: dict[str, dict[str, float]] = {}
        for title, maker in self._plan.makers.items():
            if maker == step.title and title.startswith("evaluate "):
                name = title.removeprefix("evaluate ")
                model = found.setdefault(name.partition("/")[0], {})
                for task, scores in scores_of(self._plan, name).items():
                    main = self._plan.inputs.data[task].task.metric
                    model[main_metric(task, main)] = scores[main].value
        return found


def _give_way() -> None:
    """Let this thread have the processor when no worker on this machine wants it: Ray starts those with niceness 15."""
    with suppress(OSError):  # some sandboxes give threads none; then it is as busy as the workers
        if sys.platform == "linux":  # elsewhere a whole process has one niceness
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
