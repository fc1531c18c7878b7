"""Runs of MLflow: an experiment per recipe, a run per execution and model, and the data sets and load of each."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
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
from sensmerge.tasks.urls import public

if TYPE_CHECKING:  # with plans it takes seconds to import
    from sensmerge.pipeline.report.results import TaskData


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
        unless_there(lambda: client.create_experiment(name, location))
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


@contextmanager
def started(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> Iterator[OpenRun]:
    """A new run that ends as FINISHED, or as FAILED if the block raises."""
    with ending(client, experiment, client.create_run(experiment, tags=tags, run_name=name).info.run_id) as run:
        yield run


@contextmanager
def ending(client: MlflowClient, experiment: str, run: str) -> Iterator[OpenRun]:
    """A run that is open; it ends as FINISHED, or as FAILED if the block raises."""
    try:
        yield OpenRun(client, experiment, run)
    except BaseException:
        with at_once(), suppress(MlflowException):  # what is gone would be waited for again, run by run
            client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED")


def where_recorded(uri: str, run: str) -> str | None:
    """Return how people find a run: its page on a server, or a command that shows the database.

    None where it has not ended well, was deleted, or never was there.
    """
    with connected(uri) as client:
        found = if_there(lambda: client.get_run(run))
    if found is None or found.info.lifecycle_stage != LifecycleStage.ACTIVE or found.info.status != "FINISHED":
        return None
    page = f"{public(uri).rstrip('/')}/#/experiments/{found.info.experiment_id}/runs/{run}"
    return page if is_server(uri) else f"mlflow ui --backend-store-uri {uri}"


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
