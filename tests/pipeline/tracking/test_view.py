"""The view of MLflow's table of runs, whose keys its pages were seen to need."""

import json
from pathlib import Path

from sensmerge.pipeline.tracking.view import view_of
from tests.pipeline.tracking.test_record import make_report, score


def test_the_best_model_is_first_and_the_mean_beside_it(tmp_path: Path) -> None:
    view = json.loads(view_of(make_report(tmp_path), "a1b2"))
    mean, math, code = (f"metrics.`eval/{name}`" for name in ("mean_normalised", "math/accuracy", "code/accuracy"))
    assert view["selectedColumns"] == view["columnOrder"] == [mean, math, code, "attributes.`Models`"]
    assert (view["orderByKey"], view["orderByAsc"]) == (mean, False)
    assert view["searchFilter"] == "tags.`mlflow.parentRunId` = 'a1b2'"


def test_models_without_a_mean_stand_as_they_were_made(tmp_path: Path) -> None:
    view = json.loads(view_of(make_report(tmp_path, tasks={}, scores={}, mean_normalised={}), "a1b2"))
    assert view["selectedColumns"] == ["attributes.`Models`"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("attributes.start_time", True)


def test_a_view_of_many_tasks_is_as_large_as_a_database_keeps(tmp_path: Path) -> None:
    tasks = {f"task-{number:03}": "accuracy" for number in range(200)}
    report = make_report(tmp_path, tasks=tasks, scores={"ta": {task: {"accuracy": score(0.5)} for task in tasks}})
    view = view_of(report, "a1b2")
    assert len(view) <= 5000
    first = [
        "metrics.`eval/mean_normalised`",
        "metrics.`eval/task-000/accuracy`",
    ]
    assert json.loads(view)["selectedColumns"][:2] == first
