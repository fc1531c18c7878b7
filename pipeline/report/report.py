"""The result of one execution of a recipe: the JSON of `--report`, the final tables, and what MLflow records."""

import math
from typing import Any, Literal

from pydantic import BaseModel, Field
from rich.filesize import decimal
from rich.table import Table

from sensmerge.tasks.kinds.scores import Score


class StageRecord(BaseModel):
    """One step of the workflow, as it ran now or as its artifact remembers it."""

    stage: str = Field(description="stage of the step")
    name: str = Field(description="the model, variant or model/task the step is for")
    status: Literal["run", "cached"] = Field(description="run now, or found in the store")
    seconds: float = Field(description="time on the workers, when it ran, of all its pieces together")
    bytes: int = Field(description="bytes of the artifact")
    peak_memory: int = Field(description="largest resident memory of a worker process in the step, in bytes")
    pieces: int = Field(description="how many pieces the step was done in")
    pieces_run: int = Field(description="how many of them its last run did; the others an interrupted run had done")
    tensors: int = Field(0, description="merge: tensors of the merged model")
    tensor_bytes: int = Field(0, description="merge: their size")
    taken_over: int = Field(0, description="merge: how many of them were taken over from an earlier merge")
    taken_over_bytes: int = Field(0, description="merge: the size of these")
    node: str = Field(description="name of the machine that finished it")
    artifact: str = Field(description="folder of the artifact")
    fingerprint: str = Field(description="sha256 of everything the result depends on")


ROUTED = "routed_"
"""What the names of metrics begin with that are taken with the heads that a route chooses."""
MOST_COMPARED = 6
"""Variants of a sweep whose distances from the best one are printed; the report has those of all."""

Values = dict[str, float | dict[str, float] | None]
"""Settings by key."""


class TriedInfo(BaseModel):
    """Settings that were tried for a variant, and what came of them on the rows to tune on."""

    values: Values = Field(description="the settings that were tuned, by key")
    mean: Score = Field(description="mean over tasks of main metric / own expert's")
    behind: Score = Field(description="the best candidate's mean - this one's, with a paired interval")
    tasks: dict[str, Score] = Field(description="main metric / own expert's, by task")


class TuningInfo(BaseModel):
    """How settings of a variant were chosen."""

    split: Literal["tuning", "held_out"] = Field(
        description="the rows of each task: those to tune on, which may be its calibration rows; or held out of these"
    )
    tried: list[TriedInfo] = Field(description="all candidates")
    chosen: Values = Field(description="the settings that the variant has")
    best: Values = Field(description="those with the best mean")
    default: Values | None = Field(
        description="those of the recipe, which stay unless the best are clearly better; null if it gives none"
    )
    metrics: dict[str, str] = Field(description="metric of each task that candidates were scored by")
    notes: list[str] = Field(description="what was done, and is to be done, where the best was at the end of a grid")

    def of(self, values: Values) -> TriedInfo:
        """Return what came of some settings that were tried."""
        return next(one for one in self.tried if one.values == values)


class SweepInfo(BaseModel):
    """How the variants of a sweep compare with the best one of them."""

    members: dict[str, dict[str, Any]] = Field(description="the settings in which they differ, by variant")
    best: str = Field(description="the variant with the best mean_normalised")
    behind: dict[str, Score] = Field(
        description="its mean_normalised - that of each other variant, with a paired interval"
    )
    notes: list[str] = Field(description="what is to be done where the best is at the end of the values of a setting")


class AdapterInfo(BaseModel):
    """What a variant that is an adapter lacks of what its merge adds to the base; Frobenius norms."""

    rank: int = Field(description="rank of its largest factors")
    error: float = Field(description="norm of what it lacks / norm of what the merge adds, over all weights")
    worst: str = Field(description="the weight that it lacks most of")
    worst_error: float = Field(description="the same of that weight alone")

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"the adapter, of rank {self.rank}, lacks {self.error:.2g} of what the merge adds (relative norm), most of "
            f"{self.worst}: {self.worst_error:.2g}"
        )


class VariantInfo(BaseModel):
    """One merge of the recipe, with the coefficients it used."""

    method: str = Field(description="merge method")
    params: dict[str, str] = Field(
        description="settings of the variant, flat: method, weight, density, coefficients.kind …"
    )
    weights: dict[str, dict[str, float]] = Field(description="weight used: weights[layer][expert]")
    tau: dict[str, float] = Field({}, description="cross-task factor of each expert (sens only)")
    sigma: dict[str, dict[str, float]] = Field({}, description="coefficients sigma[layer][expert] (sens only)")
    tuning: TuningInfo | None = Field(None, description="how settings were chosen, if some were tuned")
    digest: str = Field(description="sha256 over the names and digests of the merged folder's files")
    adapter: AdapterInfo | None = Field(None, description="what an adapter lacks of the merge, if it is one")

    @property
    def is_calibrated(self) -> bool:
        """Whether its weights were fitted to the experts' features."""
        return any(key.startswith("calibrate.") for key in self.params)


class RouteInfo(BaseModel):
    """How a variant with application se told its samples apart."""

    rule: dict[str, str | int] = Field(description="score, layer, pool and metric that were chosen")
    trust: float = Field(description="how far the route is followed: 1 fully, 0 static coefficients")
    calibration: Score = Field(description="share of held-out calibration samples whose expert was found")
    candidates: list[dict[str, str | int | float]] = Field(description="every rule looked at, its accuracy and price")
    projection: dict[str, list[tuple[float, float]]] = Field(
        description="calibration samples of each task in the first two principal components of what the rule looks at"
    )
    evaluation: Score | None = Field(None, description="share of evaluation samples whose expert was found")
    confusion: dict[str, dict[str, int]] = Field({}, description="confusion[task][expert]: evaluation samples")
    right_coefficient: Score | None = Field(None, description="mean coefficient of the right expert")
    routed: Score | None = Field(
        None, description="mean over tasks of routed accuracy / own expert's accuracy (classification)"
    )
    passes: float | None = Field(None, description="forward passes per sample: the probes' share of the blocks, and 1")
    milliseconds: float | None = Field(None, description="time per sample")
    peak_memory: int | None = Field(None, description="largest resident memory of the evaluation, in bytes")
    bytes: int = Field(description="size of the dynamic model's weights: base, task vectors, heads")
    source_bytes: int = Field(description="size of the weights of base and experts they come from")


class Report(BaseModel):
    """Everything `run` found; `tau` and `sigma` are those of the first variant with sens coefficients."""

    recipe: str = Field(description="name of the recipe")
    dtype: str = Field("float32", description="torch name of the dtype in which models were scored")
    stages: list[StageRecord] = Field(description="every step, in order")
    models: dict[str, str] = Field(description="folder of base, experts and variants by name")
    uris: dict[str, str] = Field(description="where these folders are for all who may read the store")
    roles: dict[str, Literal["base", "expert", "variant"]] = Field(description="what each model is")
    digests: dict[str, str] = Field(description="content digest of base and experts by name")
    tasks: dict[str, str] = Field(description="main metric of each task")
    kinds: dict[str, str] = Field({}, description="kind of each task")
    prompts: dict[str, dict[str, Any]] = Field({}, description="how each task asks a model: its kind, its templates, …")
    notes: list[str] = Field([], description="what a user should know of the models and data: a line each")
    other_bases: dict[str, str] = Field(
        {}, description="what is said of experts that look as if they were made from another base; notes have it too"
    )
    scores: dict[str, dict[str, dict[str, Score]]] = Field(description="scores[model][task][metric]")
    mean_normalised: dict[str, Score] = Field(description="mean over tasks of main metric / own expert's, by model")
    behind: dict[str, Score] = Field(
        {}, description="the best variant's mean_normalised - that of each other variant, with a paired interval"
    )
    sweeps: dict[str, SweepInfo] = Field({}, description="the sweeps of the recipe, by entry of its merges")
    first_half: dict[str, Score] = Field(
        {}, description="the gate's metric on the half of the evaluation samples that the best variant is chosen by"
    )
    second_half: dict[str, Score] = Field({}, description="the same on the other half, which chooses nothing")
    variants: dict[str, VariantInfo] = Field(description="the merges")
    routes: dict[str, RouteInfo] = Field({}, description="routes of the variants with application se")
    alpha: dict[str, dict[str, float]] = Field({}, description="alpha[expert][layer]")
    distances: dict[str, dict[str, float]] = Field({}, description="distances[i][j]: expert i against j on j's samples")
    tau: dict[str, float] = Field({}, description="tau[expert]")
    sigma: dict[str, dict[str, float]] = Field({}, description="sigma[layer][expert]")

    def found_again(self) -> "Report":
        """Return what a run reports that finds all steps in the store."""
        return self.model_copy(update={"stages": [one.model_copy(update={"status": "cached"}) for one in self.stages]})


def merge_summary(report: Report) -> str | None:
    """Return in a line how much was merged now and how much taken over; None where no static variant was merged."""
    merged = [stage for stage in report.stages if stage.stage == "merge" and stage.status == "run" and stage.tensors]
    if not merged:
        return None
    tensors, taken = sum(stage.tensors for stage in merged), sum(stage.taken_over for stage in merged)
    size, taken_size = sum(stage.tensor_bytes for stage in merged), sum(stage.taken_over_bytes for stage in merged)
    return (
        f"{tensors - taken} of {tensors} tensors merged ({decimal(size - taken_size)}), "
        f"{taken} taken over from earlier merges ({decimal(taken_size)})"
    )


def score_table(report: Report) -> Table:
    """The final table: a row per model, a column per task (main metric, n, 95 % interval), and the normalised mean.

    Variants stand by their means over all samples, with how far the others are behind the first. A dynamic one whose
    head the route chooses has a second row: the scores by these heads, where they are not those by the heads given.
    """
    table = Table(title=f"{report.recipe}: main metric on each task, with its 95 % interval", show_lines=True)
    table.add_column("model", overflow="fold")
    for task, metric in report.tasks.items():
        table.add_column(f"{task}\n{metric}", justify="right", overflow="fold")
    table.add_column("mean\nnormalised", justify="right", overflow="fold")
    if report.behind:
        table.add_column("behind\nthe first", justify="right", overflow="fold")
    for model in _by_mean(report):
        given, routed = (_main_scores(report, model, prefix) for prefix in ("", ROUTED))
        behind = [cell(report.behind.get(model))] if report.behind else []
        table.add_row(model, *map(cell, given), cell(report.mean_normalised.get(model)), *behind)
        if any(routed) and routed != given:
            mean = report.routes[model].routed if all(routed) else None
            table.add_row(f"{model},\nrouted heads", *map(cell, routed), cell(mean), *(["–"] if report.behind else []))
    return table


def _main_scores(report: Report, model: str, prefix: str) -> list[Score | None]:
    """Return a model's main metric on each task, or the one that is called so with a prefix."""
    scores = report.scores.get(model, {})
    return [scores.get(task, {}).get(f"{prefix}{metric}") for task, metric in report.tasks.items()]


def _by_mean(report: Report) -> list[str]:
    """Return all models: base and experts, and then variants by their means."""
    variants = [name for name, role in report.roles.items() if role == "variant"]
    means = {name: score.value for name, score in report.mean_normalised.items()}
    variants.sort(key=lambda name: means.get(name, -math.inf), reverse=True)
    return [*(name for name in report.models if name not in variants), *variants]


def first_of(report: Report) -> str:
    """Return the variant that has the highest mean over all samples, or is the first of equal ones."""
    return next(name for name in _by_mean(report) if report.roles[name] == "variant")


def equals(report: Report) -> str | None:
    """Return in a line which variants cannot be told from the first; None where there are none."""
    near = [name for name, score in report.behind.items() if score.low <= 0]
    if not near:
        return None
    return (
        f"not clearly worse than the first, {first_of(report)} (the 95 % interval of the difference includes 0): "
        f"{', '.join(near)}"
    )


def tuning_table(name: str, tuning: TuningInfo) -> Table:
    """A row per candidate of a variant: settings, mean over tasks, how far behind the best that is, and each task."""
    samples = tuning.tried[0].mean.n
    table = Table(title=f"{name}: main metric ÷ own expert's on {samples} rows to tune on, with 95 % intervals")
    for column in (*tuning.chosen, "mean", "behind", *tuning.metrics):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for one in tuning.tried:
        table.add_row(
            *(shown(value) for value in one.values.values()),
            *(f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" for score in (one.mean, one.behind)),
            *(f"{score.value:.3f}" for score in one.tasks.values()),
            "chosen" if one.values == tuning.chosen else "",
        )
    return table


def tuning_lines(name: str, tuning: TuningInfo) -> list[str]:
    """Return lines for people: what was chosen and why, and what there is to know of the grid."""
    chosen, best, count = _said(tuning.chosen), _said(tuning.best), len(tuning.tried)
    why = f"is the best of {count} candidates"
    if tuning.chosen not in (tuning.best, tuning.default):
        why = f"is the best of its grid: {best} lies beyond it and is not clearly better"
    if tuning.default is not None:
        behind = tuning.of(tuning.default).behind
        by = f"by {behind}"
        if tuning.best == tuning.default:
            why = f"is the recipe's, and the best of {count} candidates"
        elif tuning.chosen == tuning.default:
            why = f"is the recipe's and stays: {best}, the best of {count}, is not clearly better: {by}"
        elif tuning.chosen == tuning.best:
            why += f", better than the recipe's {_said(tuning.default)} {by}"
    return [f"{name}: {chosen} {why}", *(f"{name}: {note}" for note in tuning.notes)]


def sweep_lines(name: str, sweep: SweepInfo) -> list[str]:
    """Return lines for people: which variant of a sweep leads, how far others are behind, and what to do next."""
    near = [other for other, score in sweep.behind.items() if score.low <= 0]
    line = f"sweep {name}: {sweep.best} has the highest mean of {len(sweep.members)}"
    if len(sweep.behind) <= MOST_COMPARED:
        line += "; behind it: " + "; ".join(f"{other} {score}" for other, score in sweep.behind.items())
    elif near:
        line += f"; {len(near)} are not clearly worse (the report has all differences, with their 95 % intervals)"
    return [line, *(f"sweep {name}: {note}" for note in sweep.notes)]


def _said(values: Values) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())


def shown(value: float | dict[str, float] | None) -> str:
    """Return a setting as people read it."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def route_table(report: Report) -> Table:
    """A row per variant with application se: its route, how often that is right, and what it costs.

    Columns: right experts on held-out calibration samples and on evaluation samples, the right expert's mean
    coefficient, mean normalised accuracy with routed heads (classification), forward passes per sample, and size ÷
    that of base and experts.
    """
    classifies = any(route.routed for route in report.routes.values())
    table = Table(title=f"{report.recipe}: routes of the variants with application se", show_lines=True)
    table.add_column("variant", overflow="fold")
    table.add_column("route", overflow="fold")
    for column in ("held\nout", "tasks\nfound", "right\nexpert's λ", *(["routed\nnormalised"] if classifies else [])):
        table.add_column(column, justify="right", overflow="fold")
    for column in ("passes", "size"):
        table.add_column(column, justify="right", overflow="fold")
    for name, route in report.routes.items():
        rule = "{score}\nlayer {layer}\n{pool}, {metric}".format(**route.rule)
        trust = "" if route.trust == 1 else f"\nfollowed {route.trust:.0%}"
        scores = (route.calibration, route.evaluation, route.right_coefficient, *([route.routed] if classifies else []))
        table.add_row(
            name,
            rule + trust,
            *(cell(score) for score in scores),
            "–" if route.passes is None else f"{route.passes:.1f}",
            f"{route.bytes / route.source_bytes:.2f}",
        )
    return table


def route_warnings(report: Report) -> list[str]:
    """Return a line for every route that the calibration samples do not bear out."""
    return [
        f"{name}: the route ({route.rule['score']}) finds the right expert for {route.calibration.value:.0%} of "
        f"{route.calibration.n} held-out calibration samples (95 % interval from {route.calibration.low:.0%}), so "
        f"{route.trust:.0%} of each coefficient comes from the route and the rest from the static merge; add "
        "calibration samples or choose another score, or take a static variant if inputs do not show their task"
        for name, route in report.routes.items()
        if route.trust < 1
    ]


def cell(score: Score | None) -> str:
    """Return a score as tables have it, in three lines."""
    return "–" if score is None else f"{score.value:.3f}\n[{score.low:.3f}, {score.high:.3f}]\nn = {score.n}"
