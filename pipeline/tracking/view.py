"""How MLflow's table of runs shows the models of an execution: sorted by their means, with these and main metrics."""

import json

from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.tracking.metrics import main_metric

VIEW = "models"
"""Key of the view."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Tag of an experiment in which MLflow's pages look for a view that somebody shares, by its key."""
WIDTH = 190
"""Of a column, in pixels: so that names of metrics are whole."""
MOST_OF_A_VIEW = 4900
"""Characters, of the 5000 of such a tag that databases keep."""
MODELS = "attributes.`Models`"
"""Column of registered versions."""


def view_of(report: Report, run: str) -> str:
    """Return the view of an execution's models, as JSON; columns that are too many for the tag are left out.

    Without a view, MLflow 3.17 shows executions only, and none of their metrics.

    Args:
        report: of the execution.
        run: its run in MLflow.
    """
    columns = ["metrics.`eval/mean_normalised`"] if report.mean_normalised else []
    order = {"orderByKey": columns[0], "orderByAsc": False} if columns else {}
    columns += [f"metrics.`{main_metric(task, metric)}`" for task, metric in report.tasks.items()]
    while len(text := _state(run, [*columns, MODELS], order)) > MOST_OF_A_VIEW:
        columns.pop()
    return text


def _state(run: str, columns: list[str], order: dict[str, object]) -> str:
    # MLflow takes a view with all of these keys, or not at all.
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, WIDTH),
    }
    return json.dumps(state | order)
