"""What MLflow is told of one execution; the only module that imports mlflow, itself imported when it is needed.

A recipe is an experiment, an execution a parent run, and every base, expert and variant a child run with the same
metric keys, so that any of them can be compared. A variant's child run also owns a LoggedModel, registered under the
recipe's name; both point at the merged folder, whose weights stay where they are, and load it from there.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_MODEL_IS_EXTERNAL,
    MLFLOW_MODEL_VERSIONS,
    MLFLOW_PARENT_RUN_ID,
)
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from sensmerge.pipeline.report.gate import Outcomes
from sensmerge.pipeline.report.pictures import (
    coefficient_heatmap,
    confusion_heatmap,
    distance_heatmap,
    representation_scatter,
    score_bars,
)
from sensmerge.pipeline.report.report import Report, RouteInfo, VariantInfo
from sensmerge.pipeline.report.results import TaskData
from sensmerge.pipeline.tracking.system_metrics import Load
from sensmerge.pipeline.tracking.uri import is_server
from sensmerge.tasks.errors import StepError
from sensmerge.tasks.kinds.scores import Score

WEIGHTS_GONE = "Its weights were freed by gc"
OUTCOMES = "outcomes.json"
"""Artifact of a variant's run: what it did with every evaluation sample, by task."""
EVALUATED_BY = "evaluated_by"
"""Tag of a model version: the run that has its outcomes."""
FREED = "weights"
"""Tag of a model version whose weights are no more in the store: when they were freed."""

# Metrics of a route by the field of RouteInfo that they come from.
ROUTE_SCORES = {
    "identification": "evaluation",
    "held_out": "calibration",
    "right_coefficient": "right_coefficient",
    "routed_normalised": "routed",
}
ROUTE_COSTS = ("passes", "milliseconds", "peak_memory", "bytes", "source_bytes")


@contextmanager
def connected(uri: str) -> Iterator[MlflowClient]:
    """A client of the tracking URI, which prints nothing; a failure of MLflow is a StepError."""
    with quiet(), explained(uri):
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)


def if_there(ask: Callable[[], Any]) -> Any:
    """What MLflow answers; None where the model, version or alias asked for does not exist."""
    try:
        return ask()
    except MlflowException as error:
        # An alias that is not there is an invalid parameter; a model or version that is not there does not exist.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def record(
    report: Report,
    outcomes: Mapping[str, Mapping[str, Outcomes]],
    recipe_yaml: str,
    plan_text: str,
    datasets: Sequence[TaskData],
    load: Sequence[Load],
    uri: str,
    store: Path,
) -> str:
    """Log one execution at the tracking URI `uri`; return the page of its parent run (server) or the run's id (SQLite).

    Metric keys are the same in all child runs: `eval/<task>/<metric>` and `eval/mean_normalised`, and the same names
    under `low/`, `high/` (95 % interval) and `n/` (samples); a score that was not taken is NaN. Where a variant has a
    route, `route/identification` (evaluation samples), `route/held_out` (calibration samples),
    `route/right_coefficient` and `route/routed_normalised` with their intervals, and the costs of `ROUTE_COSTS`. With
    SQLite, pictures and tables go into `mlartifacts` in `store`; a server keeps them where it was told to. The load of
    this machine meanwhile, where it was sampled, is `system/…` of the parent run.

    If anything raises, the runs that were open end as FAILED; a failure of MLflow is a StepError.
    """
    with connected(uri) as client:
        experiment = _experiment(client, report.recipe, None if is_server(uri) else store)
        name = f"{report.recipe} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        with _run(client, experiment, name, {"role": "recipe"}) as parent:
            client.log_text(parent, recipe_yaml, "recipe.yaml")
            client.log_text(parent, plan_text, "plan.txt")
            client.log_text(parent, report.model_dump_json(indent=2), "report.json")
            _log_datasets(client, parent, datasets)
            _log_load(client, parent, load)
            if report.scores:
                client.log_table(parent, _table(report), "scores.json")  # appends: once per run
                client.log_figure(parent, score_bars(report), "scores.png")
            if report.distances:
                client.log_figure(parent, distance_heatmap(report.distances), "distances.png")
            for model in report.models:
                _record_model(client, experiment, parent, report, model, outcomes.get(model, {}), datasets, uri)
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{parent}" if is_server(uri) else parent


def _record_model(
    client: MlflowClient,
    experiment: str,
    parent: str,
    report: Report,
    model: str,
    outcomes: Mapping[str, Outcomes],
    datasets: Sequence[TaskData],
    uri: str,
) -> None:
    """The child run of one model."""
    variant, route = report.variants.get(model), report.routes.get(model)
    # Where a model lies and what its bytes are tells nothing when runs are compared: tags, not params.
    where = {
        "folder": report.uris[model],
        "digest": report.digests[model] if variant is None else variant.digest,
    }
    params = {"role": report.roles[model]} | ({} if variant is None else _variant_params(variant))
    if route is not None:
        params |= {f"route.{key}": str(value) for key, value in route.rule.items()}
        params["route.trust"] = f"{route.trust:.6g}"
    tags = {"role": report.roles[model], MLFLOW_PARENT_RUN_ID: parent} | where
    # Only estimated coefficients, and routes, have seen the calibration sets.
    calibrated = route is not None or (variant is not None and bool(variant.sigma))
    used = [data for data in datasets if calibrated or data.context == "evaluation"]
    with _run(client, experiment, model, tags) as run:
        _log_datasets(client, run, used)
        model_id = None
        if variant is not None:
            client.log_figure(run, coefficient_heatmap(variant.weights, f"{model}: weights"), "coefficients.png")
            if outcomes:
                client.log_text(run, json.dumps({task: one.model_dump() for task, one in outcomes.items()}), OUTCOMES)
            named = {"variant": model, "kind": "static" if route is None else "dynamic"}
            model_id = _log_model(client, experiment, run, report, named | where, params, uri)
        if route is not None:
            _log_route(client, run, model, route)
        now = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, 0, model_id) for key, value in _metrics(report, model).items()]
        parameters = [Param(key, value) for key, value in params.items()]
        _once_more(lambda: client.log_batch(run, metrics, parameters))


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
        metrics |= _score_metrics(f"eval/{name}", name, score)
    return metrics | (_route_metrics(report.routes.get(model)) if report.routes else {})


def _score_metrics(key: str, name: str, score: Score | None) -> dict[str, float]:
    """A score as metric `key`, and its interval and samples under `name`."""
    score = score or Score(value=math.nan, n=0, low=math.nan, high=math.nan)
    ends = {f"low/{name}": score.low, f"high/{name}": score.high, f"n/{name}": float(score.n)}
    return {key: score.value} | ends


def _route_metrics(route: RouteInfo | None) -> dict[str, float]:
    """How often a route is right and what it costs; what was not measured is NaN."""
    metrics: dict[str, float] = {}
    for name, field in ROUTE_SCORES.items():
        metrics |= _score_metrics(f"route/{name}", f"route/{name}", getattr(route, field) if route else None)
    for name in ROUTE_COSTS:
        cost = getattr(route, name) if route else None
        metrics[f"route/{name}"] = math.nan if cost is None else float(cost)
    return metrics


def _log_route(client: MlflowClient, run: str, model: str, route: RouteInfo) -> None:
    """Pictures of a route, and the rules it was chosen from."""
    columns = ("score", "layer", "pool", "metric", "accuracy", "passes")
    table = {column: [candidate[column] for candidate in route.candidates] for column in columns}
    client.log_table(run, table, "candidates.json")  # appends: once per run
    looked_at = "{score}, layer {layer}, {pool}".format(**route.rule)
    figure = representation_scatter(route.projection, f"{model}: calibration samples ({looked_at})")
    client.log_figure(run, figure, "representations.png")
    if route.confusion:
        client.log_figure(run, confusion_heatmap(route.confusion, f"{model}: task identification"), "confusion.png")


def _log_load(client: MlflowClient, run: str, load: Sequence[Load]) -> None:
    """The samples under the names that MLflow's page of system metrics shows."""
    metrics = [
        Metric(f"system/{name}", value, sample.time, step)
        for step, sample in enumerate(load)
        for name, value in sample.values.items()
    ]
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        client.log_batch(run, metrics[start : start + MAX_METRICS_PER_BATCH])


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


def _log_datasets(client: MlflowClient, run: str, datasets: Sequence[TaskData]) -> None:
    inputs = [_dataset_input(data) for data in datasets]
    _once_more(lambda: client.log_inputs(run, inputs))


def _once_more(write: Callable[[], object]) -> None:
    """Write something, once more where MLflow 3.17 fails and need not; doing so twice is harmless.

    That is where another run wrote the same row just then, and where the server stopped in the middle of its answer:
    MLflow asks again by itself only where there was none.
    """
    try:
        write()
    except MlflowException as error:
        # What MLflow passes on is the database's own message: PostgreSQL's, SQLite's or MySQL's; or urllib3's.
        if not re.search("UniqueViolation|UNIQUE constraint|Duplicate entry|Connection broken", str(error)):
            raise
        write()


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
    report: Report,
    tags: dict[str, str],
    params: dict[str, str],
    uri: str,
) -> str:
    """The merged folder as the run's output: a LoggedModel whose weights stay outside MLflow; return its id.

    All variants of a recipe are versions of one registered model, so that an alias of it (`champion`) can name the best
    merge of the recipe. A variant that is registered already, of this folder and digest, gets no second version. `tags`
    name the variant, its kind, its folder and its digest. MLflow has files by which it loads the model from there.
    """
    from sensmerge.pipeline.tracking.load import Merged, description, log_files

    recipe, merged = report.recipe, Merged.of(report, tags["variant"])
    name = merged.variant.replace(".", "_")  # MLflow allows no dot here
    tags = tags | {"loaders": ", ".join(merged.loaders)}
    external = {} if merged.answers else {MLFLOW_MODEL_IS_EXTERNAL: "true"}
    model = client.create_logged_model(experiment, name, run, tags | external, params)
    try:
        if merged.answers:
            log_files(client, model, merged)
    except BaseException:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])

    versions = client.search_model_versions(same_version(recipe, tags), max_results=1)
    if versions:
        registered = versions[0]
        if FREED in registered.tags:
            mark_weights(client, recipe, str(registered.version), tags["folder"], None)
    else:
        _ensure_registered_model(client, recipe)
        # A server takes no local folder as source, but it takes a LoggedModel, whose tags name the folder.
        local = model.artifact_location if merged.answers else merged.uri
        inside = f"models:/{model.model_id}" if is_server(uri) else local
        source = merged.uri if merged.is_read_by_mlflow else inside
        registered = client.create_model_version(recipe, source, run, tags, model_id=model.model_id)
        client.update_model_version(recipe, registered.version, description(merged, str(registered.version)))
    link = json.dumps([{"name": recipe, "version": str(registered.version)}])
    _once_more(lambda: client.set_model_version_tag(recipe, registered.version, EVALUATED_BY, run))
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})
    return str(model.model_id)


def same_version(recipe: str, tags: Mapping[str, str]) -> str:
    """Return the search for the version of a variant with the weights, the kind and the folder that the tags name."""
    wanted = " AND ".join(f"tags.{key} = '{tags[key]}'" for key in ("variant", "kind", "digest", "folder"))
    return f"name = '{recipe}' AND {wanted}"


def mark_weights(client: MlflowClient, recipe: str, number: str, folder: str, freed: str | None) -> None:
    """Say of a version, and of the LoggedModels of its folder, that its weights were freed, or are there again.

    Args:
        client: of the tracking server and the registry.
        recipe: name of the registered model.
        number: of the version.
        folder: its tag `folder`.
        freed: when; None if the weights are there again.
    """
    if freed is None:
        client.delete_model_version_tag(recipe, number, FREED)
    else:
        client.set_model_version_tag(recipe, number, FREED, f"freed {freed}")
    said = client.get_model_version(recipe, number).description or ""
    kept = [line for line in said.split("\n\n") if not line.startswith(WEIGHTS_GONE)]
    first = [] if freed is None else [f"{WEIGHTS_GONE} on {freed}. Run the same recipe again to restore them."]
    client.update_model_version(recipe, number, "\n\n".join([*first, *kept]))
    experiment = client.get_experiment_by_name(recipe)
    if experiment is not None:
        status = LoggedModelStatus.READY if freed is None else LoggedModelStatus.FAILED
        for model in client.search_logged_models([experiment.experiment_id], f"tags.folder = '{folder}'"):
            client.finalize_logged_model(model.model_id, status)


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        description = f"Merges made by the recipe {name}, a version per result"
        _unless_there(lambda: client.create_registered_model(name, description=description))


def _experiment(client: MlflowClient, name: str, store: Path | None) -> str:
    """Id of the experiment, made if need be; its artifacts go below `store`, or where the server wants them."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (store.resolve() / "mlartifacts").as_uri() if store else None
        _unless_there(lambda: client.create_experiment(name, location))
        experiment = client.get_experiment_by_name(name)
    elif experiment.lifecycle_stage != LifecycleStage.ACTIVE:  # someone deleted it in the UI; its name is still taken
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _unless_there(create: Callable[[], object]) -> None:
    """Create something, unless another run has done so meanwhile."""
    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


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
def explained(uri: str) -> Iterator[None]:
    """Say of a server that failed after the work that nothing is lost."""
    try:
        yield
    except MlflowException as error:
        raise StepError(
            f"MLflow at {uri} failed: {error}; the results are in the store; run again to record them"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep MLflow's progress off the terminal: what it logs below a warning, the links it prints, its bars."""
    logger = logging.getLogger("mlflow")
    settings = {MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.name: "true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.name: "false"}
    level, before = logger.level, {name: os.environ.get(name) for name in settings}
    logger.setLevel(logging.WARNING)
    os.environ |= settings
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
