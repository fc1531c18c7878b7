"""Runs of MLflow: an experiment per recipe, a run per execution and model, and the data sets and load of each."""

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from sensmerge.pipeline.tracking.client import at_once, connected, if_there, once_more, unless_there
from sensmerge.pipeline.tracking.system_metrics import Load
from sensmerge.pipeline.tracking.uri import is_server
from sensmerge.pipeline.tracking.view import VIEW, VIEW_TAG
from sensmerge.tasks.urls import public

if TYPE_CHECKING:  # with plans it takes seconds to import
    from sensmerge.pipeline.report.results import TaskData


MLFLOW_EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""Tag of an experiment, and its value for what is about models: MLflow shows runs, not traces of language models."""
STORE, MACHINE = "store", "machine"
"""Tags of an execution's run: the folder of the artifacts, on the machine that recorded them; and that machine."""


@dataclass(frozen=True)
class OpenRun:
    """A run that is being recorded."""

    client: MlflowClient
    experiment: str
    id: str


def experiment_of(client: MlflowClient, name: str, store: Path | None) -> str:
    """Id of the experiment, made if need be; its artifacts go below `store`, or where the server wants them."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (store.resolve() / "mlartifacts").as_uri() if store else None
        unless_there(lambda: client.create_experiment(name, location, {MLFLOW_EXPERIMENT_KIND: TRAINING}))
        experiment = client.get_experiment_by_name(name)
    elif experiment.lifecycle_stage != LifecycleStage.ACTIVE:  # someone deleted it in the UI; its name is still taken
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def tags_of(store: Path) -> dict[str, str]:
    """Return the tags that tell which store, of which machine, an execution's run is of."""
    return {STORE: str(store), MACHINE: platform.node()}


def end_abandoned(client: MlflowClient, experiment: str, store: Path) -> None:
    """End the runs of an experiment that nobody records any more: killed processes of a store left them open."""
    found = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    parents = {run.info.run_id for run in found if tags_of(store).items() <= run.data.tags.items()}
    for run in found:
        if not parents.isdisjoint((run.info.run_id, run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""))):
            client.set_terminated(run.info.run_id, "KILLED")


def open_model(parent: OpenRun, name: str, role: str, begun: float) -> str:
    """Open the run of a model below an execution's, as begun so many seconds since the epoch, and return its id."""
    tags = {"role": role, MLFLOW_PARENT_RUN_ID: parent.id}
    run = parent.client.create_run(parent.experiment, round(1000 * begun), tags, name)
    return str(run.info.run_id)


@contextmanager
def ending(client: MlflowClient, experiment: str, run: str, seconds: float | None = None) -> Iterator[OpenRun]:
    """A run that is open; it ends as FINISHED, or as FAILED if the block raises.

    Args:
        client: that knows it.
        experiment: of it.
        run: its id.
        seconds: how long what it is of has taken; None: until now.
    """
    try:
        yield OpenRun(client, experiment, run)
    except BaseException:
        with at_once(), suppress(MlflowException):  # what is gone would be waited for again, run by run
            client.set_terminated(run, "FAILED")
        raise
    end = None if seconds is None else client.get_run(run).info.start_time + round(1000 * seconds)
    client.set_terminated(run, "FINISHED", end)


def end_models(client: MlflowClient, run: str, status: str) -> None:
    """End the runs of models below an execution's run that are open."""
    experiment = client.get_run(run).info.experiment_id
    wanted = f"attributes.status = 'RUNNING' AND tags.`{MLFLOW_PARENT_RUN_ID}` = '{run}'"
    for one in client.search_runs([experiment], wanted):
        client.set_terminated(one.info.run_id, status)


def where_recorded(uri: str, run: str) -> str | None:
    """Return how people find a run: its models in the table of runs on a server, or what shows a database's.

    None where it has not ended well, was deleted, or never was there.
    """
    with connected(uri) as client:
        found = if_there(lambda: client.get_run(run))
        if found is None or found.info.lifecycle_stage != LifecycleStage.ACTIVE or found.info.status != "FINISHED":
            return None
        experiment = client.get_experiment(found.info.experiment_id)
    # Without the type of workflow, MLflow's pages are those for traces of language models.
    table = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    if VIEW_TAG in experiment.tags:
        table += f"&viewStateShareKey={VIEW}"
    if is_server(uri):
        return f"{public(uri).rstrip('/')}/{table}"
    return f"mlflow ui --backend-store-uri {uri}, then http://localhost:5000/{table}"


def log_datasets(run: OpenRun, datasets: "Sequence[TaskData]") -> None:
    """Name the data sets of tasks as inputs of a run."""
    inputs = [_dataset_input(data) for data in datasets]
    once_more(lambda: run.client.log_inputs(run.id, inputs))


def _dataset_input(data: "TaskData") -> DatasetInput:
    files = data.source.data_files
    source = HuggingFaceDatasetSource(
        path=public(data.source.path),
        config_name=data.source.name,
        data_files=[public(file) for file in files] if isinstance(files, list) else files and public(files),
        split=data.source.split,
        revision=data.source.revision,
    )
    dataset = Dataset(
        name=f"{data.task}/{data.context}",
        digest=data.digest[:36],  # MLflow keeps no more
        source_type="hugging_face",
        source=source.to_json(),
        profile=json.dumps({"num_rows": data.rows}),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, data.context)])


def log_load(run: OpenRun, load: Sequence[Load]) -> None:
    """Log samples of this machine's load under the names that MLflow's page of system metrics shows."""
    metrics = [
        Metric(f"system/{name}", value, sample.time, step)
        for step, sample in enumerate(load)
        for name, value in sample.values.items()
    ]
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        run.client.log_batch(run.id, metrics[start : start + MAX_METRICS_PER_BATCH])
