"""The metrics of a model's run, under keys that all models of a report share."""

import math
from collections.abc import Mapping

from sensmerge.pipeline.report.report import Report, RouteInfo
from sensmerge.tasks.kinds.scores import Score

# Metrics of a route by the field of RouteInfo that they come from.
ROUTE_SCORES = {
    "identification": "evaluation",
    "held_out": "calibration",
    "right_coefficient": "right_coefficient",
    "routed_normalised": "routed",
}
ADAPTER_ERRORS = ("error", "worst_error")
ROUTE_COSTS = ("passes", "milliseconds", "peak_memory", "bytes", "source_bytes")


def metrics_of(report: Report, model: str) -> dict[str, float]:
    """Return the metrics of a model's run, named so that what people look for first comes first in MLflow's tables.

    `eval/mean_normalised` and `eval/<task>/<main metric>` are of all models: MLflow compares equal keys only, so a
    score that was not taken is NaN. Behind them come, by their names, `more/<task>/<metric>` of all other metrics, and
    `high/…`, `low/…` (95 % interval) and `n/…` (samples) of all.

    What only some models have, only they have keys of: metrics of a task that others lack which were scored on it
    (`routed_accuracy`); a dynamic variant `route/identification` (evaluation samples),
    `route/held_out` (calibration samples), `route/right_coefficient` and `route/routed_normalised` with their
    intervals, and the costs of `ROUTE_COSTS`; a tuned variant `tune/mean_normalised` of the chosen settings on the rows
    to tune on; a variant that is an adapter `lacks/error` and `lacks/worst_error`.
    """
    metrics: dict[str, float] = {}
    if report.mean_normalised:
        metrics |= _score_metrics("eval/mean_normalised", "mean_normalised", report.mean_normalised.get(model))
    own = report.scores.get(model, {})
    for task, shared in _shared(report).items():
        taken = own.get(task, {})
        metrics |= _task_metrics(task, dict.fromkeys(shared) | taken, report.tasks.get(task, ""))
    variant, route = report.variants.get(model), report.routes.get(model)
    if variant is not None and variant.tuning is not None:
        mean = variant.tuning.of(variant.tuning.chosen).mean
        metrics |= _score_metrics("tune/mean_normalised", "tune/mean_normalised", mean)
    if variant is not None and variant.adapter is not None:
        metrics |= {f"lacks/{name}": getattr(variant.adapter, name) for name in ADAPTER_ERRORS}
    return metrics if route is None else metrics | _route_metrics(route)


def _shared(report: Report) -> dict[str, list[str]]:
    """Return, for each task, the metrics that all models have which were scored on it."""
    shared: dict[str, list[str]] = {}
    for scores in report.scores.values():
        for task, taken in scores.items():
            shared[task] = [name for name in shared.get(task, taken) if name in taken]
    return shared


def held_out_metrics(score: Score) -> dict[str, float]:
    """Return the metrics that tell what the best variant scores on samples that it was not chosen by."""
    return _score_metrics("eval/held_out", "held_out", score)


def main_metric(task: str, metric: str) -> str:
    """Return the name that the main metric of a task has in MLflow."""
    return f"eval/{task}/{metric}"


def _task_metrics(task: str, scores: Mapping[str, Score | None], main: str) -> dict[str, float]:
    """Return the metrics of a model's run that are its scores on a task, of which `main` is the main one."""
    metrics: dict[str, float] = {}
    for name, score in scores.items():
        key = main_metric(task, name) if name == main else f"more/{task}/{name}"
        metrics |= _score_metrics(key, f"{task}/{name}", score)
    return metrics


def _score_metrics(key: str, name: str, score: Score | None) -> dict[str, float]:
    """A score as metric `key`, and its interval and samples under `name`."""
    score = score or Score(value=math.nan, n=0, low=math.nan, high=math.nan)
    ends = {f"low/{name}": score.low, f"high/{name}": score.high, f"n/{name}": float(score.n)}
    return {key: score.value} | ends


def _route_metrics(route: RouteInfo) -> dict[str, float]:
    """How often a route is right and what it costs; what was not measured is left out."""
    metrics: dict[str, float] = {}
    for name, field in ROUTE_SCORES.items():
        if (score := getattr(route, field)) is not None:
            metrics |= _score_metrics(f"route/{name}", f"route/{name}", score)
    costs = {f"route/{name}": getattr(route, name) for name in ROUTE_COSTS}
    return metrics | {name: float(cost) for name, cost in costs.items() if cost is not None}


def score_columns(report: Report) -> dict[str, list[str | int | float]]:
    """Return all scores in long form, by column: a row per model, task and metric."""
    rows = [
        (model, report.roles[model], task, metric, score.value, score.low, score.high, score.n)
        for model, tasks in report.scores.items()
        for task, scores in tasks.items()
        for metric, score in scores.items()
    ]
    columns = ("model", "role", "task", "metric", "value", "low", "high", "n")
    return {column: list(values) for column, values in zip(columns, zip(*rows, strict=True), strict=True)}
