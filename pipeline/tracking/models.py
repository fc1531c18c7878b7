"""Merged models in MLflow: logged as the output of a run, registered as versions, and marked when weights are freed."""

import json
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_MODEL_VERSIONS

from sensmerge.pipeline.report.card import CARD, own_scores
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.tracking.client import once_more, unless_there
from sensmerge.pipeline.tracking.runs import OpenRun
from sensmerge.pipeline.tracking.uri import is_server

MOST_OF_A_DESCRIPTION = 4900
"""Characters, of the 5000 that MLflow keeps."""
WEIGHTS_GONE = "Its weights were freed"
OUTCOMES = "outcomes.json"
"""Artifact of a variant's run: what it did with every evaluation sample, by task."""
EVALUATED_BY = "evaluated_by"
"""Tag of a model version: the run that has its outcomes."""
FREED = "weights"
"""Tag of a model version whose weights are no more in the store: when they were freed."""


def log_model(run: OpenRun, report: Report, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
    """Log a merged folder as a run's output, a LoggedModel whose weights stay outside MLflow, and return its id.

    All variants of a recipe are versions of one registered model, so that an alias of it (`champion`) can name the best
    merge of the recipe. A variant that is registered already, of this folder and digest, gets no second version. `tags`
    name the variant, its kind, its folder and its digest. MLflow has files by which it loads the model from there.
    """
    from sensmerge.pipeline.tracking.load import Merged, description, log_files  # transformers takes seconds

    client, recipe, merged = run.client, report.recipe, Merged.of(report, tags["variant"])
    name = merged.variant.replace(".", "_")  # MLflow allows no dot here
    tags = {**tags, "loaders": ", ".join(merged.loaders)}
    external = {} if merged.answers else {MLFLOW_MODEL_IS_EXTERNAL: "true"}
    model = client.create_logged_model(run.experiment, name, run.id, tags | external, params)
    try:
        if merged.answers:
            log_files(client, model, merged)
    except BaseException:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])

    versions = client.search_model_versions(same_version(recipe, tags), max_results=1)
    if versions:
        registered = versions[0]
        if FREED in registered.tags:
            mark_weights(client, recipe, str(registered.version), tags["folder"], None)
    else:
        _ensure_registered_model(client, recipe)
        # A server takes no local folder as source, but it takes a LoggedModel, whose tags name the folder.
        local = model.artifact_location if merged.answers else merged.uri
        inside = f"models:/{model.model_id}" if is_server(client.tracking_uri) else local
        source = merged.uri if merged.is_read_by_mlflow else inside
        registered = client.create_model_version(recipe, source, run.id, tags, model_id=model.model_id)
        said = _described(run, report, merged.variant, description(merged, str(registered.version)))
        client.update_model_version(recipe, registered.version, said)
    link = json.dumps([{"name": recipe, "version": str(registered.version)}])
    once_more(lambda: client.set_model_version_tag(recipe, registered.version, EVALUATED_BY, run.id))
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})
    return str(model.model_id)


def _described(run: OpenRun, report: Report, variant: str, use: str) -> str:
    """Return what the page of a version says: what it is, how it is used and was made, its scores, and where more is.

    Scores are left to the run where they would be too many.
    """
    settings = ", ".join(f"{key} {value}" for key, value in report.variants[variant].params.items())
    page = f"#/experiments/{run.experiment}/runs/{run.id}"
    links = f"Its [run]({page}) has more, such as its [model card]({page}/artifacts/{CARD})."
    parts = [use.rstrip(), f"Merged by {settings}.", *([own_scores(report, variant)] if report.tasks else []), links]
    return "\n\n".join(parts if sum(map(len, parts)) < MOST_OF_A_DESCRIPTION else [*parts[:2], links])


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
    way = "Run the same recipe again, without keep: best, to restore them."
    first = [] if freed is None else [f"{WEIGHTS_GONE} on {freed}. {way}"]
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
        unless_there(lambda: client.create_registered_model(name, description=description))
