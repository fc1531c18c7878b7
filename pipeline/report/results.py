"""Reads the artifacts of a finished plan into a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sensmerge.pipeline.plan.kinship import other_bases
from sensmerge.pipeline.plan.models import model_digest, weight_bytes
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Split, Step
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.report.gate import Outcomes
from sensmerge.pipeline.report.report import Report, RouteInfo, StageRecord, SweepInfo, TuningInfo, VariantInfo
from sensmerge.tasks.artifacts import canonical, read_json, sha256_text
from sensmerge.tasks.coefficients import alpha
from sensmerge.tasks.identity import identity
from sensmerge.tasks.kinds import scores as scoring
from sensmerge.tasks.kinds.kind import RowTask, Task
from sensmerge.tasks.kinds.questions import kept_settings
from sensmerge.tasks.kinds.scores import Metric, Record, Score
from sensmerge.tasks.methods.settings import VariantSettings, beyond
from sensmerge.tasks.rows.source import DataSource, rows_digest
from sensmerge.tasks.stages.variant import TUNE, UNCHANGED

EQUAL = "all of its variants score the same"
"""What is said of a sweep over a setting that changes no score."""
STEP_FIELDS = ("seconds", "bytes", "peak_memory", "pieces", "pieces_run", "node")
"""Of a step's manifest, what its record in the report has too."""

TENSOR_FIELDS = ("tensors", "tensor_bytes", "taken_over", "taken_over_bytes")
"""Of what a merge returns, what its record has too."""


@dataclass(frozen=True)
class TaskData:
    """The rows that a split of a task used."""

    task: str  # name of the task
    context: Split
    source: DataSource  # where the rows come from, as the recipe says it
    digest: str  # sha256 over the rows that were used
    rows: int  # how many were used


def collect(plan: Plan) -> Report:
    """Return the report of a plan whose steps are all in the store."""
    recipe = plan.recipe
    variants = {name: _variant(plan, name) for name in recipe.merges}
    sens = recipe.sens_variants()
    experts = list(recipe.experts) if sens else []
    models = plan.models()
    scores, records = _scores(plan), records_of(plan)
    evaluated = {name: one.task for name, one in plan.inputs.data.items() if name in scores.get("base", {})}
    first, second = halved(records, evaluated, recipe.gate.metric, list(variants))
    means = _normalised(records, evaluated)
    strangers = other_bases(plan.inputs.experts, plan.inputs.listings)
    late = [line for line in strangers.values() if line not in plan.inputs.notes]  # their weights came with this run
    return Report(
        recipe=recipe.name,
        dtype=recipe.dtype,
        stages=[_stage(plan, step) for step in plan.steps],
        models={name: str(folder) for name, folder in models.items()},
        uris={name: _uri(plan, name, folder) for name, folder in models.items()},
        roles={name: role_of(plan, name) for name in models},
        digests={name: model_digest(listing) for name, listing in plan.inputs.listings.items()},
        tasks={name: task.metric for name, task in evaluated.items()},
        kinds={name: task.kind for name, task in evaluated.items()},
        prompts=kept_settings(
            {name: one.task for name, one in plan.inputs.data.items() if isinstance(one.task, RowTask)}
        ),
        notes=[*plan.inputs.notes, *late, *unchanged(plan), *remarks(plan), *uncalibrated(plan), *lacking(variants)],
        other_bases=strangers,
        scores=scores,
        mean_normalised=means,
        behind=_behind(records, evaluated, {name: means[name].value for name in variants if name in means}),
        sweeps=_sweeps(recipe, records, evaluated, {name: mean.value for name, mean in means.items()}),
        first_half=first,
        second_half=second,
        variants=variants,
        routes={name: _route(plan, name, records) for name in recipe.se_variants()},
        alpha={name: alpha(_read(plan, "statistics", name, "sensitivity.json")["sensitivity"]) for name in experts},
        distances=_read(plan, "cross_task", "all", "distances.json") if sens else {},
        tau=variants[sens[0]].tau if sens else {},
        sigma=variants[sens[0]].sigma if sens else {},
    )


def unchanged(plan: Plan) -> list[str]:
    """Return a line for every expert that is the base itself."""
    found = _manifest(plan, "merge", next(iter(plan.recipe.merges)))["result"][UNCHANGED]
    return [
        f"experts.{name} changes nothing: all its weights are the base's"
        for name, expert in plan.inputs.experts.items()
        if not expert.head and name in found
    ]


def remarks(plan: Plan) -> list[str]:
    """Return a line for everything that the methods of static variants said of tensors."""
    return [
        f"merges.{name}: {text} (in {len(tensors)} tensors, such as {tensors[0]})"
        for name in plan.recipe.merges
        for text, tensors in _manifest(plan, "merge", name)["result"].get("remarks", {}).items()
    ]


def uncalibrated(plan: Plan) -> list[str]:
    """Return a line for every calibrated variant that has tensors in its blocks which keep the merged values."""
    found = {name: _manifest(plan, "calibrate", name)["result"] for name in plan.recipe.calibrated_variants()}
    return [
        f"merges.{name}.calibrate: {one['kept']} tensors in blocks, such as {one['first_kept'][0]}, keep the merged "
        "values: they are of no linear layer or norm that sees the same tokens in the merge as in the experts"
        for name, one in found.items()
        if one["kept"]
    ]


def lacking(variants: Mapping[str, VariantInfo]) -> list[str]:
    """Return a line for every variant that is an adapter: how much of the merge it lacks."""
    return [f"merges.{name}: {one.adapter}" for name, one in variants.items() if one.adapter is not None]


def _uri(plan: Plan, name: str, folder: Path) -> str:
    return plan.store.uri(folder) if name in plan.recipe.merges else folder.resolve().as_uri()


def outcomes(plan: Plan) -> dict[str, dict[str, Outcomes]]:
    """Return what every variant did with each evaluation sample, by task."""
    records = records_of(plan)
    return {
        name: {
            task: Outcomes(kind=one.kind, metric=one.metric, samples=_samples(plan, task), records=found)
            for task, found in records.get(name, {}).items()
            if (one := plan.inputs.data[task].task)
        }
        for name in plan.recipe.merges
    }


def _samples(plan: Plan, task: str) -> str:
    """Return a digest of a task's evaluation samples and of how they are scored."""
    one = plan.inputs.data[task]
    settings = {**identity(one.task, "evaluation"), **one.task.depends_on()}
    return sha256_text(canonical([settings, rows_digest(one.evaluation)]))


def _read(plan: Plan, stage: Stage, name: str, file: str) -> Any:
    return read_json(plan.artifact(stage, name) / file)


def _manifest(plan: Plan, stage: Stage, name: str) -> dict[str, Any]:
    manifest = plan.store.manifest(plan.step(stage, name).key)
    assert manifest is not None, f"{stage} {name} has run"
    return manifest


def role_of(plan: Plan, name: str) -> Literal["base", "expert", "variant"]:
    """Return what a model of a plan is."""
    if name == "base":
        return "base"
    return "expert" if name in plan.recipe.experts else "variant"


def _stage(plan: Plan, step: Step) -> StageRecord:
    manifest = _manifest(plan, step.stage, step.name)
    return StageRecord(
        stage=step.stage,
        name=step.name,
        status="run" if step.title in plan.todo else "cached",
        artifact=str(plan.store.folder(step.key)),
        **{key: manifest["result"].get(key, 0) for key in TENSOR_FIELDS if step.stage == "merge"},
        **{key: manifest[key] for key in (*STEP_FIELDS, "fingerprint")},
    )


def _variant(plan: Plan, name: str) -> VariantInfo:
    variant = plan.recipe.merges[name]
    manifest = _manifest(plan, variant.last_stage, name)
    table = _read(plan, "merge", name, "coefficients.json")
    tuning = None
    if variant.tune:
        tuning = TuningInfo.model_validate(_read(plan, "tune", name, TUNE) | {"split": variant.tuning_split})
        variant = variant.tuned(tuning.chosen)
    return VariantInfo(
        method=variant.method.name,
        params=variant.params(),
        digest=manifest["result"]["digest"],
        tuning=tuning,
        adapter=manifest["result"].get("adapter"),
        **table,
    )


def _scores(plan: Plan) -> dict[str, dict[str, dict[str, Score]]]:
    """Return scores[model][task][metric]."""
    scores: dict[str, dict[str, dict[str, Score]]] = {}
    for step in plan.names("evaluate"):
        scores.setdefault(step.partition("/")[0], {}).update(scores_of(plan, step))
    return scores


def records_of(plan: Plan) -> dict[str, dict[str, list[Record]]]:
    """Return the per-sample records behind all scores, records[model][task]."""
    records: dict[str, dict[str, list[Record]]] = {}
    for step in plan.names("evaluate"):
        model, _, task = step.partition("/")
        kept = _read(plan, "evaluate", step, "records.json")
        records.setdefault(model, {}).update({task: kept} if task else kept)
    return records


def scores_of(plan: Plan, evaluation: str) -> dict[str, dict[str, Score]]:
    """Return scores[task][metric] of one step of stage evaluate; a dynamic model is scored on all tasks at once."""
    _, _, task = evaluation.partition("/")
    taken = _read(plan, "evaluate", evaluation, "scores.json")
    by_task = {task: taken} if task else taken
    return {name: {metric: Score(**score) for metric, score in one.items()} for name, one in by_task.items()}


def _route(plan: Plan, name: str, records: dict[str, dict[str, Any]]) -> RouteInfo:
    manifest = _manifest(plan, "route", name)
    chosen, found = manifest["result"], _read(plan, "route", name, "route.json")
    info = {
        "rule": chosen["rule"],
        "trust": chosen["trust"],
        "calibration": found["identification"],
        "candidates": found["candidates"],
        "projection": found["projection"],
        "bytes": chosen["bytes"],
        "source_bytes": sum(weight_bytes(listing) for listing in plan.inputs.listings.values()),
    }
    if name in records:
        seen = _read(plan, "evaluate", name, "routes.json")
        info |= {key: seen[key] for key in ("confusion", "right_coefficient", "passes", "milliseconds")}
        info |= {
            "evaluation": seen["identification"],
            "peak_memory": _manifest(plan, "evaluate", name)["peak_memory"],
            "routed": _routed(plan, name, records),
        }
    return RouteInfo.model_validate(info)


def _routed(plan: Plan, name: str, records: dict[str, dict[str, Any]]) -> Score | None:
    """Return the mean over tasks of routed accuracy ÷ the own expert's accuracy; None where nothing is classified.

    Tasks whose answers are not right or wrong are left out.
    """
    mine = {
        task: [{"right": record["routed"]} for record in found]
        for task, found in records[name].items()
        if all("routed" in record for record in found)
    }
    if not mine:
        return None
    own = {
        task: [{"right": int(bool(plan.inputs.data[task].task.is_right(record)))} for record in records[task][task]]
        for task in mine
    }
    return scoring.mean_ratio(mine, own, "right")


def _normalised(records: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]) -> dict[str, Score]:
    """Return, for every model, the mean over tasks of main metric ÷ that of the task's own expert, where it exists."""
    own = {task: records[task][task] for task in tasks}
    metrics = _main_metrics(records, tasks)
    means = {model: scoring.mean_normalised(metrics, found, own) for model, found in records.items()}
    return {model: mean for model, mean in means.items() if mean is not None}


def _behind(
    records: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task], means: Mapping[str, float]
) -> dict[str, Score]:
    """Return the best variant's mean − each other's, with an interval that is paired; `means` are those of variants."""
    if len(means) < 2:
        return {}
    best = max(means, key=means.__getitem__)
    own, metrics = {task: records[task][task] for task in tasks}, _main_metrics(records, tasks)
    others = {
        name: scoring.normalised_difference(metrics, records[best], records[name], own)
        for name in means
        if name != best
    }
    return {name: score for name, score in others.items() if score is not None}


def _sweeps(
    recipe: Recipe,
    records: Mapping[str, Mapping[str, list[Record]]],
    tasks: Mapping[str, Task],
    means: Mapping[str, float],
) -> dict[str, SweepInfo]:
    """Return the sweeps of which two variants or more have a mean."""
    found = {}
    for name, sweep in recipe.sweeps.items():
        members = sweep.members
        own = {member: means[member] for member in members if member in means}
        if len(own) > 1:
            best = max(own, key=own.__getitem__)
            found[name] = SweepInfo(
                members={member: dict(settings) for member, settings in members.items()},
                best=best,
                behind=_behind(records, tasks, own),
                notes=[EQUAL]
                if min(own.values()) == own[best]
                else at_ends(recipe.merges[best].settings, members, best),
            )
    return found


def at_ends(settings: VariantSettings, members: Mapping[str, Mapping[str, Any]], best: str) -> list[str]:
    """Return a line for each setting of which the best variant of a sweep has the smallest or largest number.

    Settings that are no numbers, or of which one is as good as another (seeds), have no ends.

    Args:
        settings: of the best variant.
        members: the settings in which the variants differ.
        best: name of the best one.
    """
    notes = []
    for key, value in members[best].items():
        values, short = [one.get(key) for one in members.values()], key.rpartition(".")[2]
        numbers = sorted({float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)})
        try:
            settings.value(short)
        except ValueError:
            continue
        if isinstance(value, int | float) and (more := beyond(settings, numbers, float(value), short)):
            further = ", ".join(f"{one:g}" for one in more)
            notes.append(f"{key} {value:g} leads and is at the end of the sweep; add values beyond it: {further}")
    return notes


def _main_metrics(records: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]) -> dict[str, Metric]:
    return {name: _main_metric(task, records[name][name]) for name, task in tasks.items()}


def _main_metric(task: Task, records: Sequence[Record]) -> Metric:
    metric = task.metric_of(task.metric, records)
    assert metric is not None, f"{task.metric} is a metric of {task.kind}"
    return metric


def halved(
    records: Mapping[str, Mapping[str, list[Record]]], tasks: Mapping[str, Task], metric: str, variants: Sequence[str]
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Return the gate's metric of every variant on each half of the evaluation samples.

    Both are empty where a task has too few samples to halve, or a half has no such score.

    Args:
        records: of every model by task.
        tasks: those that are evaluated, of which each expert has its own by name.
        metric: `mean_normalised` or `TASK/METRIC`.
        variants: their names.
    """
    task, _, name = metric.rpartition("/")
    used = {model: found for model, found in records.items() if model in variants or model in tasks}
    parts = {model: {key: scoring.halves(one) for key, one in found.items()} for model, found in used.items()}
    if any(not first for found in parts.values() for first, _ in found.values()):
        return {}, {}
    halves: list[dict[str, Score]] = []
    for half in (0, 1):
        split = {model: {key: both[half] for key, both in found.items()} for model, found in parts.items()}
        if task:
            found = {
                model: tasks[task].score_of(name, split[model][task])
                for model in variants
                if task in tasks and task in split.get(model, {})
            }
            scores = {model: score for model, score in found.items() if score is not None}
        else:
            scores = {model: score for model, score in _normalised(split, tasks).items() if model in variants}
        halves.append(scores)
    return (halves[0], halves[1]) if halves[0].keys() == halves[1].keys() else ({}, {})


def data_sets(plan: Plan) -> list[TaskData]:
    """Return which rows the recipe's tasks used, for tracking."""
    contexts: tuple[Split, ...] = ("calibration", "tuning", "held_out", "evaluation")
    return [
        TaskData(name, context, _source(one.task, context), rows_digest(rows), len(rows))
        for name, one in plan.inputs.data.items()
        for context in contexts
        if (rows := getattr(one, context))
    ]


def _source(task: Task, context: Split) -> DataSource:
    """Return where rows are from. Those to tune on that a recipe does not name are of those to calibrate on."""
    assert isinstance(task, RowTask)
    tuning = task.tuning or task.calibration
    source: DataSource | None = tuning if context in ("tuning", "held_out") else getattr(task, context)
    assert source is not None
    return source
