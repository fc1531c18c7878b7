"""What MLflow is told of one execution; the only module that imports mlflow.

A recipe is an experiment, an execution a parent run, and every base, expert and variant a child run with the same
metric keys, so that any of them can be compared. A variant's child run also owns a LoggedModel, registered under the
recipe's name; both point at the merged folder, whose weights stay where they are.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LifecycleStage,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
)
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_MODEL_IS_EXTERNAL,
    MLFLOW_MODEL_VERSIONS,
    MLFLOW_PARENT_RUN_ID,
)
from mlflow.utils.rest_utils import http_request

from pipeline.pictures import coefficient_heatmap, distance_heatmap, score_bars
from pipeline.plan import StepError
from pipeline.report import Report, Score, VariantInfo
from tasks.datasets import DataSource
from tasks.errors import InputError

SQLITE = "sqlite:///"


@dataclass(frozen=True)
class TaskData:
    """The rows that a task's calibration or evaluation used."""

    task: str  # name of the task
    context: Literal["calibration", "evaluation"]
    source: DataSource  # where the rows come from, as the recipe says it
    digest: str  # sha256 over the rows that were used
    rows: int  # how many were used


def default_uri(store: Path) -> str:
    """The tracking URI if the user names none: the SQLite database `mlflow.db` in the artifact store."""
    return f"{SQLITE}{store.resolve() / 'mlflow.db'}"


def check_server(uri: str) -> None:
    """Raise InputError unless runs can be recorded at `uri`; nothing is written, and a dead server costs about 5 s.

    A server is asked for one experiment, as `record` will do: so wrong credentials are found here too.
    """
    if _is_server(uri):
        _check_http(uri)
    elif uri.startswith(SQLITE) and uri != SQLITE:
        _check_sqlite(Path(uri.removeprefix(SQLITE)))
    else:
        raise InputError(
            f"--tracking-uri {uri}: expected a server (http://… or https://…) or a database file "
            "(sqlite:///FOLDER/mlflow.db); MLflow 3 no longer writes runs into plain folders such as ./mlruns"
        )


def record(
    report: Report, recipe_yaml: str, plan_text: str, datasets: Sequence[TaskData], uri: str, store: Path
) -> str:
    """Log one execution at the tracking URI `uri`; return the page of its parent run (server) or the run's id (SQLite).

    Metric keys are the same in all child runs: `eval/<task>/<metric>` and `eval/mean_normalised`, and the same names
    under `low/`, `high/` (95 % interval) and `n/` (samples); a score that was not taken is NaN. With SQLite, pictures
    and tables go into `mlartifacts` in `store`; a server keeps them where it was told to.

    If anything raises, the runs that were open end as FAILED; a failure of MLflow is a StepError.
    """
    with _quiet(), _explained(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = _experiment(client, report.recipe, None if _is_server(uri) else store)
        name = f"{report.recipe} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        with _run(client, experiment, name, {"role": "recipe"}) as parent:
            client.log_text(parent, recipe_yaml, "recipe.yaml")
            client.log_text(parent, plan_text, "plan.txt")
            client.log_text(parent, report.model_dump_json(indent=2), "report.json")
            client.log_inputs(parent, [_dataset_input(data) for data in datasets])
            if report.scores:
                client.log_table(parent, _table(report), "scores.json")  # appends: once per run
                client.log_figure(parent, score_bars(report), "scores.png")
            if report.distances:
                client.log_figure(parent, distance_heatmap(report.distances), "distances.png")
            for model in report.models:
                _record_model(client, experiment, parent, report, model, datasets, uri)
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{parent}" if _is_server(uri) else parent


def _record_model(
    client: MlflowClient,
    experiment: str,
    parent: str,
    report: Report,
    model: str,
    datasets: Sequence[TaskData],
    uri: str,
) -> None:
    """The child run of one model."""
    variant = report.variants.get(model)
    # Where a model lies and what its bytes are tells nothing when runs are compared: tags, not params.
    where = {
        "folder": Path(report.models[model]).resolve().as_uri(),
        "digest": report.digests[model] if variant is None else variant.digest,
    }
    params = {"role": report.roles[model]} | ({} if variant is None else _variant_params(variant))
    tags = {"role": report.roles[model], MLFLOW_PARENT_RUN_ID: parent} | where
    # Only coefficients that were estimated have seen the calibration sets.
    used = [data for data in datasets if data.context == "evaluation" or (variant and variant.sigma)]
    with _run(client, experiment, model, tags) as run:
        client.log_inputs(run, [_dataset_input(data) for data in used])
        model_id = None
        if variant is not None:
            client.log_figure(run, coefficient_heatmap(variant.weights, f"{model}: weights"), "coefficients.png")
            model_id = _log_model(client, experiment, run, report.recipe, {"variant": model} | where, params, uri)
        now = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, 0, model_id) for key, value in _metrics(report, model).items()]
        client.log_batch(run, metrics, [Param(key, value) for key, value in params.items()])


def _variant_params(variant: VariantInfo) -> dict[str, str]:
    """Settings of a variant, and for each expert its τ and the range of its weights over the layers."""
    params = dict(variant.params)
    params |= {f"tau.{expert}": f"{tau:.6g}" for expert, tau in variant.tau.items()}
    for expert in next(iter(variant.weights.values()), {}):
        weights = [row[expert] for row in variant.weights.values()]
        ends = dict.fromkeys(f"{end:.6g}" for end in (min(weights), max(weights)))
        params[f"weights.{expert}"] = " … ".join(ends)
    return params


def _metrics(report: Report, model: str) -> dict[str, float]:
    """Metrics of a child run. The keys are those of all models together: MLflow compares equal keys only."""
    every = dict.fromkeys(
        (task, metric) for scores in report.scores.values() for task, taken in scores.items() for metric in taken
    )
    own = report.scores.get(model, {})
    scores = {f"{task}/{metric}": own.get(task, {}).get(metric) for task, metric in every}
    if report.mean_normalised:
        scores["mean_normalised"] = report.mean_normalised.get(model)
    metrics: dict[str, float] = {}
    for name, score in scores.items():
        score = score or Score(value=float("nan"), n=0, low=float("nan"), high=float("nan"))
        metrics |= {f"eval/{name}": score.value, f"low/{name}": score.low, f"high/{name}": score.high}
        metrics[f"n/{name}"] = float(score.n)
    return metrics


def _table(report: Report) -> dict[str, list[str | int | float]]:
    """All scores in long form, by column: a row per model, task and metric."""
    rows = [
        (model, report.roles[model], task, metric, score.value, score.low, score.high, score.n)
        for model, tasks in report.scores.items()
        for task, scores in tasks.items()
        for metric, score in scores.items()
    ]
    columns = ("model", "role", "task", "metric", "value", "low", "high", "n")
    return {column: list(values) for column, values in zip(columns, zip(*rows, strict=True), strict=True)}


def _dataset_input(data: TaskData) -> DatasetInput:
    source = HuggingFaceDatasetSource(
        path=data.source.path,
        config_name=data.source.name,
        data_files=data.source.data_files,
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


def _log_model(
    client: MlflowClient,
    experiment: str,
    run: str,
    recipe: str,
    tags: dict[str, str],
    params: dict[str, str],
    uri: str,
) -> str:
    """The merged folder as the run's output: a LoggedModel whose files stay outside MLflow; return its id.

    All variants of a recipe are versions of one registered model, so that an alias of it (`champion`) can name the best
    merge of the recipe. A variant whose digest is registered already gets no second version. `tags` name the variant,
    its folder and its digest.
    """
    name = tags["variant"].replace(".", "_")  # MLflow allows no dot here
    model = client.create_logged_model(experiment, name, run, tags | {MLFLOW_MODEL_IS_EXTERNAL: "true"}, params)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])

    same = f"name = '{recipe}' AND tags.variant = '{tags['variant']}' AND tags.digest = '{tags['digest']}'"
    versions = client.search_model_versions(same, max_results=1)
    if versions:
        version = versions[0]
    else:
        _ensure_registered_model(client, recipe)
        # A server takes no local folder as source, but it takes a LoggedModel, whose tags name the folder.
        source = f"models:/{model.model_id}" if _is_server(uri) else tags["folder"]
        version = client.create_model_version(recipe, source, run, tags, model_id=model.model_id)
    link = json.dumps([{"name": recipe, "version": str(version.version)}])
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})
    return str(model.model_id)


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description=f"Merges made by the recipe {name}, a version per result")


def _experiment(client: MlflowClient, name: str, store: Path | None) -> str:
    """Id of the experiment, made if need be; its artifacts go below `store`, or where the server wants them."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (store.resolve() / "mlartifacts").as_uri() if store else None
        return str(client.create_experiment(name, location))
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:  # someone deleted it in the UI; its name is still taken
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


@contextmanager
def _run(client: MlflowClient, experiment: str, name: str, tags: dict[str, str]) -> Iterator[str]:
    """A run that ends as FINISHED, or as FAILED if the block raises; yields its id."""
    run = client.create_run(experiment, tags=tags, run_name=name).info.run_id
    try:
        yield run
    except BaseException:
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED")


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Say of a server that failed after the work that nothing is lost."""
    try:
        yield
    except MlflowException as error:
        raise StepError(
            f"MLflow at {uri} failed: {error}; the results are in the store, run again to record them"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's progress lines off the terminal: what it logs below a warning, and the links it prints."""
    logger = logging.getLogger("mlflow")
    level, suppressed = logger.level, os.environ.get(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.name)
    logger.setLevel(logging.WARNING)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    try:
        yield
    finally:
        logger.setLevel(level)
        if suppressed is None:
            MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.unset()
        else:
            os.environ[MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.name] = suppressed


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _check_http(uri: str) -> None:
    remedy = "start it (mlflow server …) or pass --tracking-uri"
    try:
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            max_retries=0,
            timeout=5,
            raise_on_status=False,
            params={"max_results": 1},
        )
    except MlflowException as error:
        raise InputError(f"MLflow server unreachable at {uri}: {remedy}") from error
    if response.status_code != 200:
        raise InputError(
            f"MLflow server unreachable at {uri}: it answered {response.status_code} {response.reason}; "
            f"check the address and MLFLOW_TRACKING_USERNAME, or {remedy}"
        )


def _check_sqlite(database: Path) -> None:
    if database.is_dir():
        raise InputError(
            f"--tracking-uri: {database} is a folder: name the database file, {SQLITE}{database}/mlflow.db"
        )
    # MLflow makes missing folders, so the nearest existing one decides.
    nearest = next(folder for folder in database.resolve().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--tracking-uri: {database} cannot be made: {nearest} is not a folder that can be written to")
