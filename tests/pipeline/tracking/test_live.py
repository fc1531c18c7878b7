"""What MLflow is told of an execution while its steps run."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sensmerge.pipeline.execute.stop import Stopped
from sensmerge.pipeline.execute.worker import Done, Spent
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.gate import Best
from sensmerge.pipeline.report.results import collect, data_sets, outcomes
from sensmerge.pipeline.tracking import record as tracking
from sensmerge.pipeline.tracking.live import LiveRun
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.errors import StepError
from tests.conftest import do_steps, plan_of, tiny_recipe
from tests.pipeline.tracking.test_record import children, free_port

TEXTS = ("name: tiny\n", "merge ta RUN\n")


@pytest.fixture(scope="module")
def done(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan whose steps are all in the store; they were to run when it was made."""
    folder = tmp_path_factory.mktemp("live")
    plan = plan_of(folder, tiny_recipe(llamas, folder))
    do_steps(plan)
    return plan


@pytest.fixture(scope="module")
def uri(done: Plan) -> str:
    return f"sqlite:///{done.store.root / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri, uri)


def took(seconds: float) -> Done:
    return Done({}, Spent(seconds=seconds))


def test_steps_and_scores_are_there_before_the_run_ends(done: Plan, uri: str, client: MlflowClient) -> None:
    said: list[str] = []
    with LiveRun(uri, done, TEXTS, said.append) as live:
        live.step_ended(done.step("merge", "ta"), took(2.5))
        live.step_ended(done.step("merge", "ties-sens"), took(1.5))
        live.step_ended(done.step("evaluate", "ta/math"), took(600))
        run, models = live.opened()
        assert run is not None
        found = client.get_run(run)
        assert found.info.status == "RUNNING"
        steps = {"steps/done": 3, "steps/planned": len(done.todo), "seconds/merge": 4, "seconds/evaluate": 600}
        assert found.data.metrics == steps
        history = client.get_metric_history(run, "steps/done")
        assert [(one.step, one.value) for one in history] == [(1, 1), (2, 2), (3, 3)]

        assert list(models) == ["ta"]
        model = client.get_run(models["ta"])
        assert (model.info.status, model.info.run_name, model.data.tags["role"]) == ("RUNNING", "ta", "variant")
        assert history[-1].timestamp - model.info.start_time == 600_000
        scores = read_json(done.artifact("evaluate", "ta/math") / "scores.json")
        assert model.data.metrics == {"eval/math/token_accuracy": scores["token_accuracy"]["value"]}
    assert not said

    # What is recorded at the end goes into the same runs.
    execution = tracking.Execution(collect(done), outcomes(done), *TEXTS, data_sets(done), best=Best("ta"))
    assert tracking.record(execution, uri, done.store.root, run, models) == run
    every = children(client, run)
    assert every["ta"].info.run_id == models["ta"]
    assert set(every) == set(done.models())
    assert len(client.search_runs([model.info.experiment_id])) == 1 + len(every)
    assert {one.info.status for one in every.values()} == {client.get_run(run).info.status} == {"FINISHED"}
    assert every["ta"].data.metrics["eval/math/token_accuracy"] == scores["token_accuracy"]["value"]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(lambda: StepError("broken on purpose"), "FAILED"), (lambda: Stopped(signal.SIGTERM), "KILLED")],
)
def test_runs_end_as_the_work_does(
    raised: Callable[[], BaseException], status: str, done: Plan, uri: str, client: MlflowClient
) -> None:
    error = raised()

    def work() -> tuple[str | None, str]:
        with LiveRun(uri, done, TEXTS, pytest.fail) as live:
            live.step_ended(done.step("evaluate", "ta/code"), took(1))
            run, models = live.opened()
            found.append((run, models["ta"]))
            raise error

    found: list[tuple[str | None, str]] = []
    with pytest.raises(type(error)):
        work()
    ((run, model),) = found
    assert [client.get_run(one).info.status for one in (run, model)] == [status, status]
    assert client.get_run(run).data.tags["reason"] == str(error)


def test_a_server_that_is_gone_is_told_of_once_and_stops_nothing(done: Plan) -> None:
    said: list[str] = []
    uri = f"http://127.0.0.1:{free_port()}"
    with LiveRun(uri, done, TEXTS, said.append) as live:
        for _ in range(3):
            live.step_ended(done.step("merge", "ta"), took(1))
        assert live.opened() == (None, {})
    (line,) = said
    assert line.startswith(f"MLflow at {uri} failed: ")
    assert line.endswith("; the steps go on, and are recorded when all have ended")
    assert "\n" not in line
