"""What MLflow is told of one execution; importing mlflow takes seconds, so this module is imported when it is needed.

A recipe is an experiment, an execution a parent run, and every base, expert and variant a child run with the same
metric keys, so that any of them can be compared. A variant's child run also owns a LoggedModel, registered under the
recipe's name; both point at the merged folder, whose weights stay where they are, and load it from there.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from sensmerge.pipeline.report.answers import Answers
from sensmerge.pipeline.report.card import CARD
from sensmerge.pipeline.report.gate import Best, Outcomes
from sensmerge.pipeline.report.pictures import (
    coefficient_heatmap,
    confusion_heatmap,
    distance_heatmap,
    representation_scatter,
    score_bars,
    tuning_curves,
)
from sensmerge.pipeline.report.report import Report, RouteInfo, VariantInfo
from sensmerge.pipeline.report.results import TaskData
from sensmerge.pipeline.tracking.client import at_once, connected, once_more
from sensmerge.pipeline.tracking.metrics import held_out_metrics, metrics_of, score_columns
from sensmerge.pipeline.tracking.models import OUTCOMES, log_model
from sensmerge.pipeline.tracking.runs import (
    OpenRun,
    end_abandoned,
    end_models,
    ending,
    experiment_of,
    log_datasets,
    log_load,
    open_model,
    tags_of,
)
from sensmerge.pipeline.tracking.system_metrics import Load
from sensmerge.pipeline.tracking.uri import is_server
from sensmerge.pipeline.tracking.view import VIEW_TAG, view_of
from sensmerge.tasks.errors import StepError
from sensmerge.tasks.methods.contract import METHODS

MOST_OF_A_TAG = 4000
"""Characters; some databases of MLflow refuse longer ones."""


@dataclass(frozen=True)
class Execution:
    """What there is to record of one execution of a recipe."""

    report: Report
    outcomes: Mapping[str, Mapping[str, Outcomes]]
    """model → task → what it did with every evaluation sample"""
    recipe_yaml: str
    plan_text: str
    datasets: Sequence[TaskData]
    load: Sequence[Load] = ()
    """of this machine meanwhile, where it was sampled"""
    answers: Mapping[str, Mapping[str, Answers]] = field(default_factory=dict)
    """model → task → what people read of the evaluation samples"""
    best: Best | None = None
    """the variant that the gate chooses, if there is one"""

    def metrics(self, model: str) -> dict[str, float]:
        """Return the metrics of a model's run."""
        held_out = None if self.best is None or self.best.name != model else self.best.held_out
        return metrics_of(self.report, model) | ({} if held_out is None else held_out_metrics(held_out))


def begin(recipe: str, recipe_yaml: str, plan_text: str, uri: str, store: Path) -> str:
    """Open the parent run of an execution whose steps begin, and return its id.

    Runs of this store that a process left open which was killed end as KILLED: `store` is locked, so nobody else
    records what comes of them. So does the one that is opened here, if this process is killed.
    """
    with connected(uri) as client:
        experiment = experiment_of(client, recipe, None if is_server(uri) else store)
        end_abandoned(client, experiment, store)
        name = f"{recipe} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        run = client.create_run(experiment, tags={"role": "recipe"} | tags_of(store), run_name=name).info.run_id
        client.log_text(run, recipe_yaml, "recipe.yaml")
        client.log_text(run, plan_text, "plan.txt")
    return str(run)


def end(uri: str, run: str, status: Literal["FAILED", "KILLED"], reason: str) -> None:
    """End the runs of an execution that failed (FAILED) or was stopped (KILLED); its own has the reason as a tag.

    A server that does not answer is asked once: there is an error to be told of already.
    """
    with at_once(), suppress(StepError), connected(uri) as client:
        client.set_tag(run, "reason", reason[:MOST_OF_A_TAG])
        client.set_terminated(run, status)
        end_models(client, run, status)


def log_verdict(uri: str, run: str, passed: bool, said: Sequence[str]) -> None:
    """Tell the parent run of a refresh whether its best variant has passed the gate, and what came of it."""
    with connected(uri) as client:
        client.set_tag(run, "gate", "passed" if passed else "refused")
        client.set_tag(run, MLFLOW_RUN_NOTE, "\n\n".join(said)[:MOST_OF_A_TAG])
        client.log_metric(run, "gate/passed", float(passed))


def record(
    execution: Execution, uri: str, store: Path, run: str | None = None, models: Mapping[str, str] | None = None
) -> str:
    """Log one execution at the tracking URI `uri`; return the id of its parent run.

    Metrics are those of `metrics_of`: every model's run has its own, and the parent run those of the best variant. A
    model's run lasts as long as the steps on it took, whenever they ran. The load of this machine is `system/…` of the
    parent run. With SQLite, pictures and tables go into `mlartifacts` in `store`; a server keeps them where it was told
    to.

    If anything raises, the runs that were open end as FAILED; a failure of MLflow is a StepError.

    Args:
        execution: what there is to record.
        uri: where.
        store: folder of the artifacts.
        run: the parent run, from `begin`; None where none could be opened when the steps began.
        models: model → its run, of those that `steps.tell` has opened.
    """
    report = execution.report
    run = run or begin(report.recipe, execution.recipe_yaml, execution.plan_text, uri, store)
    with connected(uri) as client:
        experiment = client.get_run(run).info.experiment_id
        with ending(client, experiment, run) as parent:
            client.log_text(parent.id, report.model_dump_json(indent=2), "report.json")
            log_datasets(parent, execution.datasets)
            log_load(parent, execution.load)
            if report.scores:
                client.log_table(parent.id, score_columns(report), "scores.json")  # appends: once per run
                client.log_figure(parent.id, score_bars(report), "scores.png")
            if report.distances:
                client.log_figure(parent.id, distance_heatmap(report.distances), "distances.png")
            if execution.best is not None:
                client.set_tag(parent.id, "best", execution.best.name)
                if execution.best.said is not None:
                    client.set_tag(parent.id, "choice", execution.best.said)
                _log_metrics(parent, execution.metrics(execution.best.name))
            for model in report.models:
                _record_model(parent, execution, model, (models or {}).get(model))
            client.set_experiment_tag(experiment, VIEW_TAG, view_of(report, run))
    return run


def _log_metrics(
    run: OpenRun, metrics: Mapping[str, float], params: Mapping[str, str] | None = None, model_id: str | None = None
) -> None:
    now = time.time_ns() // 1_000_000
    # In their order, which is that of their names, MLflow lists them on a run's page.
    found = [Metric(key, value, now, 0, model_id) for key, value in sorted(metrics.items())]
    parameters = [Param(key, value) for key, value in (params or {}).items()]
    once_more(lambda: run.client.log_batch(run.id, found, parameters))


def _record_model(parent: OpenRun, execution: Execution, model: str, open_run: str | None) -> None:
    """Record one model as a child run, in the one that is open if there is one."""
    client, report = parent.client, execution.report
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
    # Only estimated coefficients, methods with statistics, routes, and weights fitted to features have seen the
    # calibration sets, and only tuned variants the rows to tune on.
    calibrated = route is not None or (variant is not None and _reads_calibration(variant))
    seen = {"evaluation"} | ({"calibration"} if calibrated else set())
    seen |= {variant.tuning.split} if variant is not None and variant.tuning else set()
    used = [data for data in execution.datasets if data.context in seen]
    seconds = sum(step.seconds for step in report.stages if step.name.partition("/")[0] == model)
    child = open_run or open_model(parent, model, report.roles[model], time.time() - seconds)
    with ending(client, parent.experiment, child, seconds) as run:
        client.log_batch(run.id, tags=[RunTag(key, value) for key, value in where.items()])
        log_datasets(run, used)
        for task, one in execution.answers.get(model, {}).items():
            table = {column: [row[column] for row in one.rows] for column in one.rows[0]}
            client.log_table(run.id, table, f"answers/{task}.json")  # appends: once per run
            if one.cut is not None:
                client.set_tag(run.id, f"answers.{task}", one.cut)
        model_id = None
        if variant is not None:
            _log_card(run, Path(report.models[model]))
            client.log_figure(run.id, coefficient_heatmap(variant.weights, f"{model}: weights"), "coefficients.png")
            if variant.tuning is not None:
                client.log_figure(run.id, tuning_curves(variant.tuning, f"{model}: what was tried"), "tuning.png")
            if outcomes := execution.outcomes.get(model):
                found = {task: one.model_dump() for task, one in outcomes.items()}
                client.log_text(run.id, json.dumps(found), OUTCOMES)
            named = {"variant": model, "kind": "static" if route is None else "dynamic"}
            model_id = log_model(run, report, named | where, params)
        if route is not None:
            _log_route(run, model, route)
        _log_metrics(run, execution.metrics(model), params, model_id)


def _log_card(run: OpenRun, folder: Path) -> None:
    """Have a run show the model card beside the weights, without its header, which only the hub reads.

    All of it is a file; what comes before the recipe is the description of the run.
    """
    card = folder / CARD
    if card.is_file():
        _, _, text = card.read_text().removeprefix("---\n").partition("\n---\n")
        run.client.log_text(run.id, text, CARD)
        run.client.set_tag(run.id, MLFLOW_RUN_NOTE, text.partition("\n## Recipe\n")[0][:MOST_OF_A_TAG])


def _reads_calibration(variant: VariantInfo) -> bool:
    return bool(variant.sigma) or variant.is_calibrated or bool(METHODS[variant.method].statistics)


def _variant_params(variant: VariantInfo) -> dict[str, str]:
    """Return the settings of a variant, and for each expert its τ and the range of its weights over the layers."""
    params = dict(variant.params)
    params |= {f"tau.{expert}": f"{tau:.6g}" for expert, tau in variant.tau.items()}
    for expert in next(iter(variant.weights.values()), {}):
        weights = [row[expert] for row in variant.weights.values()]
        ends = dict.fromkeys(f"{end:.6g}" for end in (min(weights), max(weights)))
        params[f"weights.{expert}"] = " … ".join(ends)
    return params


def _log_route(run: OpenRun, model: str, route: RouteInfo) -> None:
    """Pictures of a route, and the rules it was chosen from."""
    columns = ("score", "layer", "pool", "metric", "accuracy", "passes")
    table = {column: [candidate[column] for candidate in route.candidates] for column in columns}
    run.client.log_table(run.id, table, "candidates.json")  # appends: once per run
    looked_at = "{score}, layer {layer}, {pool}".format(**route.rule)
    figure = representation_scatter(route.projection, f"{model}: calibration samples ({looked_at})")
    run.client.log_figure(run.id, figure, "representations.png")
    if route.confusion:
        figure = confusion_heatmap(route.confusion, f"{model}: task identification")
        run.client.log_figure(run.id, figure, "confusion.png")
