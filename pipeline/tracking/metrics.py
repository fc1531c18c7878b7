"""The metrics of a model's run, under keys that all models of a report share."""

import math

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
    """Return the metrics of a model's run. The keys are those of all models together: MLflow compares equal keys only.

    They are `eval/<task>/<metric>` and `eval/mean_normalised`, and the same names under `low/`, `high/` (95 % interval)
    and `n/` (samples); a score that was not taken is NaN. Where a variant has a route, `route/identification`
    (evaluation samples), `route/held_out` (calibration samples), `route/right_coefficient` and
    `route/routed_normalised` with their intervals, and the costs of `ROUTE_COSTS`. Where a variant is tuned,
    `tune/mean_normalised` of the chosen settings on the rows to tune on. Where a variant is an adapter,
    `adapter/error` and `adapter/worst_error`.
    """
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
    if any(variant.tuning for variant in report.variants.values()):
        info = report.variants[model].tuning if model in report.variants else None
        mean = None if info is None else info.of(info.chosen).mean
        metrics |= _score_metrics("tune/mean_normalised", "tune/mean_normalised", mean)
    if any(variant.adapter for variant in report.variants.values()):
        adapter = report.variants[model].adapter if model in report.variants else None
        for name in ADAPTER_ERRORS:
            metrics[f"adapter/{name}"] = math.nan if adapter is None else getattr(adapter, name)
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
