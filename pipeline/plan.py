"""From a recipe to steps: what each reads, its fingerprint, RUN or SKIP and why."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from pipeline.inputs import Inputs, TaskRows, gather_inputs
from pipeline.models import download_key, weight_bytes
from pipeline.placement import Choice, choose
from pipeline.recipe import Recipe, Stage, Variant
from pipeline.store import Key, Store
from pipeline.verify import damaged_files
from tasks import (
    cross_task,
    download,
    evaluate,
    evaluate_dynamic,
    merge,
    merge_vectors,
    route,
    sensitivity,
    task_vectors,
)
from tasks.artifacts import canonical, sha256_text
from tasks.coefficients import ExplicitCoefficients, SensCoefficients
from tasks.datasets import ClassificationTask, LmEvalTask, RowSet, Task, rows_digest
from tasks.download import Listing
from tasks.errors import InputError
from tasks.methods import keeps_low_rank, static_coefficient
from tasks.models.layers import block_names
from tasks.models.placement import Actors
from tasks.models.weights import layer_groups
from tasks.routing import SeApplication


@dataclass(frozen=True)
class Step:
    """One unit of work of a stage."""

    stage: Stage
    name: str
    key: Key
    needs: tuple[str, ...]
    """titles of the steps that must be done before"""
    finish: Callable[..., dict[str, Any]]
    """called with out=folder on a worker; what it returns is kept in the manifest"""
    parts: tuple[Callable[..., bool], ...] = ()
    """pieces that may run side by side before `finish`, each called with out=folder; doing one twice is harmless; they
    return whether there was something left to do"""
    reads: int = 0
    """bytes read"""
    writes: int = 0
    """bytes written"""
    actors: int = 0
    """workers that it starts for itself, each with the resources of the stage; then it takes none of its own"""

    @property
    def title(self) -> str:
        """The step as logs and errors name it."""
        return f"{self.stage} {self.name}"


@dataclass(frozen=True)
class Plan:
    """All steps of a recipe, in an order in which each comes after those it needs."""

    recipe: Recipe
    store: Store
    inputs: Inputs
    steps: tuple[Step, ...]
    todo: Mapping[str, str] = field(default_factory=dict)
    """title → why, of the steps that the store lacks; two steps may have one fingerprint, never one title"""
    placements: Mapping[Stage, Choice] = field(default_factory=dict)
    """of the stages whose networks may run in several ways"""

    def step(self, stage: Stage, name: str) -> Step:
        """Return one step."""
        return next(step for step in self.steps if step.stage == stage and step.name == name)

    def keys(self) -> list[Key]:
        """Return what names the artifacts of all steps."""
        return [step.key for step in self.steps]

    def artifact(self, stage: Stage, name: str) -> Path:
        """Return the folder of a step's artifact."""
        return self.store.folder(self.step(stage, name).key)

    def models(self) -> dict[str, Path]:
        """Return the folder of every model by name: base, experts, variants."""
        folders = {name: listing.folder for name, listing in self.inputs.listings.items()}
        dynamic = self.recipe.se_variants()
        return folders | {
            name: self.artifact("route" if name in dynamic else "merge", name) for name in self.recipe.merges
        }


def make_plan(recipe: Recipe, folder: Path, store: Store, listings: Mapping[str, Listing]) -> Plan:
    """Resolve the data of a recipe, check all that can be checked without work, and lay out the steps.

    Args:
        recipe: the recipe.
        folder: what its relative paths are relative to.
        store: where artifacts are looked for.
        listings: its models, from `list_models`.

    Raises:
        InputError: models that cannot be merged, data that does not fit its task, no room on the disk.
    """
    inputs = gather_inputs(recipe, listings, folder, store.hub_cache)
    plan = Plan(recipe, store, inputs, (), placements=_placements(recipe, inputs))
    steps = tuple(_steps(plan))
    todo = {step.title: store.why(step.key) for step in steps if store.manifest(step.key) is None}
    # A model whose files are gone from this machine is fetched again if a step that runs reads it.
    read = {title for step in steps if step.title in todo for title in step.needs}
    lost = {f"download {name}" for name, listing in plan.inputs.listings.items() if listing.missing()}
    todo |= dict.fromkeys(lost & read - todo.keys(), "files are gone")
    planned = replace(plan, steps=steps, todo=todo)
    _check_room(planned)
    return planned


def _placements(recipe: Recipe, inputs: Inputs) -> dict[Stage, Choice]:
    if not recipe.sens_variants():
        return {}
    longest = max(one.longest_calibration for one in inputs.data.values())
    tokens: dict[Stage, int] = {"sensitivity": longest, "cross_task": max(longest, cross_task.CHUNK_TOKENS)}
    return {stage: choose(recipe, stage, inputs.base, count, human_bytes) for stage, count in tokens.items()}


def _check_room(plan: Plan) -> None:
    needed = sum(step.writes for step in plan.steps if step.title in plan.todo)
    existing = next(path for path in (plan.store.root, *plan.store.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{plan.store.root}: no room on the disk: the run writes {human_bytes(needed)}, "
            f"{human_bytes(free)} are free; free some or choose another --store"
        )


def plan_summary(plan: Plan) -> str:
    """Return the plan in a line: how many steps run, and the bytes they read and write."""
    run = [step for step in plan.steps if step.title in plan.todo]
    if not run:
        return f"{plan.recipe.name}: all {len(plan.steps)} steps are in the store"
    reads, writes = sum(step.reads for step in run), sum(step.writes for step in run)
    return (
        f"{plan.recipe.name}: {len(run)} of {len(plan.steps)} steps to run, "
        f"{human_bytes(reads)} to read, {human_bytes(writes)} to write"
    )


def plan_table(plan: Plan) -> Table:
    """Return the plan for people: a row per step, RUN or SKIP and why, and what it reads and writes."""
    table = Table(title=plan_summary(plan), title_justify="left")
    for column in ("stage", "step", "", "why"):
        table.add_column(column)
    table.add_column("read", justify="right")
    table.add_column("write", justify="right")
    for step in plan.steps:
        why = plan.todo.get(step.title)
        table.add_row(
            step.stage,
            step.name,
            "SKIP" if why is None else "RUN",
            "in the store" if why is None else why,
            "" if why is None else human_bytes(step.reads),
            "" if why is None else human_bytes(step.writes),
        )
    running = {step.stage for step in plan.steps if step.title in plan.todo}
    placed = [f"{stage} runs {one.name} ({one.why})" for stage, one in plan.placements.items() if stage in running]
    if placed:
        table.caption, table.caption_justify = "\n".join(placed), "left"
    return table


def human_bytes(count: int) -> str:
    """Return a byte count with a decimal unit, as disks are sold: 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _key(stage: Stage, name: str, version: int, settings: Mapping[str, Any], reads: Mapping[str, str]) -> Key:
    return Key(stage, name, {"stage": stage, "version": version, "settings": dict(settings), "reads": dict(reads)})


def _steps(plan: Plan) -> list[Step]:
    """Lay out all steps of a recipe."""
    recipe = plan.recipe
    downloads = {name: _download_step(name, listing, plan.store) for name, listing in plan.inputs.listings.items()}
    vectors = {name: _task_vectors_step(plan, name, downloads) for name in recipe.experts}
    steps = [*downloads.values(), *vectors.values()]
    sensitivities: dict[str, Step] = {}
    cross: Step | None = None
    if recipe.sens_variants():
        sensitivities = {name: _sensitivity_step(plan, name, downloads) for name in recipe.experts}
        cross = _cross_task_step(plan, downloads)
        steps += [*sensitivities.values(), cross]
    merges = {
        name: _merge_step(plan, name, variant, downloads, vectors, sensitivities, cross)
        for name, variant in recipe.merges.items()
    }
    dynamic = recipe.se_variants()
    routes = {name: _route_step(plan, name, recipe.merges[name], merges[name]) for name in dynamic}
    steps += [*merges.values(), *routes.values()]
    static = {name: step for name, step in merges.items() if name not in dynamic}
    for model, step in (downloads | static).items():
        steps += [
            _evaluate_step(plan, model, step, name, one, downloads)
            for name, one in plan.inputs.data.items()
            if one.evaluation or isinstance(one.task, LmEvalTask)
        ]
    if any(one.evaluation for one in plan.inputs.data.values()):
        steps += [_evaluate_dynamic_step(plan, name, step) for name, step in routes.items()]
    return steps


def _download_step(name: str, listing: Listing, store: Store) -> Step:
    key = download_key(name, listing)
    missing = sum(file.size for file in listing.missing())
    finish = partial(download.download, listing, store.hub_cache)
    return Step("download", name, key, (), finish, reads=sum(file.size for file in listing.files), writes=missing)


def _reads(steps: Mapping[str, Step], *names: str) -> dict[str, str]:
    return {name: steps[name].key.fingerprint for name in names}


def _titles(steps: Mapping[str, Step], *names: str) -> tuple[str, ...]:
    return tuple(steps[name].title for name in names)


def _device(plan: Plan, stage: Stage) -> str:
    return "cuda" if plan.recipe.resources_of(stage).num_gpus else "cpu"


def _task_vectors_step(plan: Plan, name: str, downloads: Mapping[str, Step]) -> Step:
    key = _key("task_vectors", name, task_vectors.VERSION, {}, _reads(downloads, "base", name))
    base, experts = plan.inputs.only_weights()
    groups = layer_groups(base)
    finish = partial(task_vectors.finish_task_vector, experts[name], name, groups)
    return Step(
        "task_vectors",
        name,
        key,
        _titles(downloads, "base", name),
        finish,
        tuple(partial(task_vectors.measure_group, experts[name], name, groups, group) for group in range(len(groups))),
        reads=weight_bytes(plan.inputs.listings["base"]) + weight_bytes(plan.inputs.listings[name]),
        writes=len(plan.inputs.base.weights) * 32_000,
    )


def _calibration_settings(task: Task) -> dict[str, Any]:
    """Return what a task says of its samples: not where rows come from, nor how they are batched or scored."""
    scoring = {"calibration", "evaluation", "batch_size", "metric", "generate"}
    # A multiple-choice task's `answer` names the right choice, a completion's only what is compared in exact match.
    dump: dict[str, Any] = task.model_dump(exclude=scoring | ({"answer"} if task.kind == "completion" else set()))
    return dump


def _sensitivity_step(plan: Plan, name: str, downloads: Mapping[str, Step]) -> Step:
    one = plan.inputs.data[name]
    assert not isinstance(one.task, LmEvalTask), "the recipe's schema refuses sens coefficients for it"
    reads = _reads(downloads, "base", name) | {
        "calibration": rows_digest(one.calibration),
        "tokenizer": plan.inputs.tokenizer_digest(),
    }
    settings = {"dtype": plan.recipe.dtype} | {"task": _calibration_settings(one.task)}
    finish = partial(
        sensitivity.sensitivity,
        plan.inputs.base.folder,
        plan.inputs.experts[name].folder,
        name,
        one.task,
        one.calibration,
        plan.inputs.tokenizer,
        plan.recipe.dtype,
        _device(plan, "sensitivity"),
        plan.placements["sensitivity"].placement,
    )
    return Step(
        "sensitivity",
        name,
        _key("sensitivity", name, sensitivity.VERSION, settings, reads),
        _titles(downloads, "base", name),
        finish,
        reads=weight_bytes(plan.inputs.listings["base"]) + weight_bytes(plan.inputs.listings[name]),
        writes=_kept_bytes(plan, "sensitivity", one.calibration_tokens),
        actors=_actors(plan, "sensitivity"),
    )


def _actors(plan: Plan, stage: Stage) -> int:
    placement = plan.placements[stage].placement
    return placement.count if isinstance(placement, Actors) else 0


def _kept_bytes(plan: Plan, stage: Stage, tokens: int) -> int:
    """Return how many bytes of hidden states a streamed network keeps on disk while it runs: both ways at most."""
    if plan.placements[stage].placement != "streamed":
        return 0
    blocks = len(block_names(plan.inputs.base.weights)) if stage == "sensitivity" else 1
    return 2 * (blocks + 1) * _state_bytes(plan, tokens)


def _state_bytes(plan: Plan, tokens: int) -> int:
    width: int = plan.inputs.base.config.get_text_config().hidden_size
    itemsize: int = getattr(torch, plan.recipe.dtype).itemsize
    return tokens * width * itemsize


def _cross_task_step(plan: Plan, downloads: Mapping[str, Step]) -> Step:
    names = tuple(plan.recipe.experts)
    reads = _reads(downloads, "base", *names) | {
        f"calibration {name}": rows_digest(plan.inputs.data[name].calibration) for name in names
    }
    tokenizer = {"tokenizer": plan.inputs.tokenizer_digest()}
    settings = {"dtype": plan.recipe.dtype} | {
        "tasks": {name: _calibration_settings(plan.inputs.data[name].task) for name in names},
    }
    # What a trunk gives for a calibration set depends on no other expert; a distance also on the set's own.
    trunks = _pair_prints(plan, reads | tokenizer, lambda i, j: ("base", i, f"calibration {j}", "tokenizer"))
    pairs = _pair_prints(plan, reads | tokenizer, lambda i, j: ("base", i, j, f"calibration {j}", "tokenizer"))
    intact = [folder for folder in plan.store.artifacts("cross_task") if not any(damaged_files(folder))]
    wanted = {print_ for prints in (pairs, trunks) for row in prints.values() for print_ in row.values()}
    known = {one: distance for one, distance in cross_task.known_distances(intact).items() if one in wanted}
    kept = {one: file for one, file in cross_task.kept_trunks(intact).items() if one in wanted}
    job = cross_task.CrossTaskJob(
        base=plan.inputs.base.folder,
        experts={name: plan.inputs.experts[name].folder for name in names},
        calibration=_row_sets(plan, "calibration"),
        tokenizer=plan.inputs.tokenizer,
        dtype=plan.recipe.dtype,
        device=_device(plan, "cross_task"),
        placement=plan.placements["cross_task"].placement,
        pairs=pairs,
        trunks=trunks,
        known=known,
        kept=kept,
    )
    key = _key("cross_task", "all", cross_task.VERSION, settings, reads | tokenizer)
    total = sum(weight_bytes(plan.inputs.listings[name]) for name in ("base", *names))
    # While it runs, the stage keeps what every expert's trunk gives for every calibration token.
    tokens = sum(one.calibration_tokens for one in plan.inputs.data.values())
    scratch = len(names) * _state_bytes(plan, tokens) + _kept_bytes(plan, "cross_task", tokens)
    return Step(
        "cross_task",
        "all",
        key,
        _titles(downloads, "base", *names),
        partial(cross_task.finish_distances, job),
        tuple(partial(cross_task.run_trunk, job, name) for name in names if job.looked_at(name)),
        reads=total,
        writes=scratch,
        actors=_actors(plan, "cross_task"),
    )


def _pair_prints(
    plan: Plan, reads: Mapping[str, str], keys: Callable[[str, str], tuple[str, ...]]
) -> dict[str, dict[str, str]]:
    """Return fingerprints of something of expert i and task j, which depends on what `keys(i, j)` of `reads` names."""

    def fingerprint(i: str, j: str) -> str:
        about = {
            "version": cross_task.VERSION,
            "dtype": plan.recipe.dtype,
            "task": _calibration_settings(plan.inputs.data[j].task),
            "reads": [reads[key] for key in keys(i, j)],
        }
        return sha256_text(canonical(about))

    names = plan.recipe.experts
    return {i: {j: fingerprint(i, j) for j in names} for i in names}


def _merge_step(
    plan: Plan,
    name: str,
    variant: Variant,
    downloads: Mapping[str, Step],
    vectors: Mapping[str, Step],
    sensitivities: Mapping[str, Step],
    cross: Step | None,
) -> Step:
    experts = tuple(plan.recipe.experts)
    settings = variant.settings()
    sens = isinstance(variant.coefficients, SensCoefficients)
    needed = [*downloads.values(), *vectors.values()]
    if sens and cross is not None:
        needed += [*sensitivities.values(), cross]
    base, opened = plan.inputs.only_weights()
    job = merge.MergeJob(
        base=base,
        experts=opened,
        head_configs={n: one.config.to_json_string() for n, one in plan.inputs.experts.items() if one.head},
        task_vectors={n: plan.store.folder(vectors[n].key) for n in experts},
        settings=settings,
        weight=variant.weight,
        densities=variant.densities(experts),
        seed=variant.seed,
        coefficients=variant.coefficients,
        sensitivities={n: plan.store.folder(s.key) for n, s in sensitivities.items()} if sens else {},
        distances=plan.store.folder(cross.key) if sens and cross is not None else None,
        out_dtype=variant.out_dtype,
        shard_size=variant.shard_size,
        groups=layer_groups(base),
    )
    semantic: dict[str, Any] = {
        "method": variant.method,
        "normalize": settings.normalize,
        "rescale": settings.rescale,
        "lambda": settings.lambda_,
        "weight": variant.weight,
        "density": job.densities,
        "seed": variant.seed,
        "coefficients": _coefficient_settings(variant),
        "out_dtype": variant.out_dtype,
        "shard_size": variant.shard_size,
        "experts": experts,
    }
    reads = sum(weight_bytes(listing) for listing in plan.inputs.listings.values())
    if isinstance(variant.application, SeApplication):
        # Which weights a variant is made of does not depend on how samples are routed.
        semantic |= {"application": "se"}
        version, writes = merge_vectors.VERSION, _dynamic_bytes(plan, job)
        part, finish = merge_vectors.merge_group_vectors, merge_vectors.finish_vectors
    else:
        writes = sum(merge.plan_merged(plan.inputs.base, variant.out_dtype, variant.shard_size).sizes.values())
        reads += writes  # read back
        version, part, finish = merge.VERSION, merge.merge_group, merge.finish_merge
    key = _key("merge", name, version, semantic, {step.title: step.key.fingerprint for step in needed})
    job = replace(job, previous=plan.store.last(key))
    return Step(
        "merge",
        name,
        key,
        tuple(step.title for step in needed),
        partial(finish, job, plan.inputs.tokenizer),
        tuple(partial(part, job, group) for group in range(len(job.groups))),
        reads=reads,
        writes=writes,
    )


def _dynamic_bytes(plan: Plan, job: merge.MergeJob) -> int:
    """Return the size of base and task vectors at most: all whole but for the factors of adapters."""
    base, listings = plan.inputs.base, plan.inputs.listings
    size = weight_bytes(listings["base"])
    for name, expert in plan.inputs.experts.items():
        if expert.is_adapter and keeps_low_rank(job.settings, job.densities[name]):
            size += weight_bytes(listings[name])
        else:
            size += sum(base.info(tensor).nbytes for tensor in base.weights if expert.touches(tensor))
    return size


def _route_step(plan: Plan, name: str, variant: Variant, merged: Step) -> Step:
    assert isinstance(variant.application, SeApplication)
    calibration = _row_sets(plan, "calibration")
    static = static_coefficient(variant.settings(), variant.weight, len(calibration))
    settings = {
        "dtype": plan.recipe.dtype,
        "application": variant.application.model_dump(),
        "static": static,
        "tasks": {key: _calibration_settings(one.task) | {"labels": one.label2id} for key, one in calibration.items()},
    }
    reads = {"model": merged.key.fingerprint} | {
        f"calibration {key}": rows_digest(one.rows) for key, one in calibration.items()
    }
    device = _device(plan, "route")
    finish = partial(
        route.route,
        plan.store.folder(merged.key),
        calibration,
        variant.application,
        static,
        plan.recipe.dtype,
        device,
    )
    # The model's files are linked, not written again.
    key = _key("route", name, route.VERSION, settings, reads)
    return Step("route", name, key, (merged.title,), finish, reads=merged.writes)


def _evaluate_dynamic_step(plan: Plan, name: str, routed: Step) -> Step:
    evaluation = {key: one for key, one in _row_sets(plan, "evaluation").items() if one.rows}
    settings = {
        "tasks": {key: scoring_settings(one.task) | {"labels": one.label2id} for key, one in evaluation.items()}
    }
    reads = {"model": routed.key.fingerprint} | {
        f"evaluation {key}": rows_digest(one.rows) for key, one in evaluation.items()
    }
    device = _device(plan, "evaluate")
    finish = partial(evaluate_dynamic.evaluate_dynamic, plan.store.folder(routed.key), evaluation, device)
    key = _key("evaluate", name, evaluate_dynamic.VERSION, settings, reads)
    return Step("evaluate", name, key, (routed.title,), finish, reads=routed.reads)


def _row_sets(plan: Plan, split: Literal["calibration", "evaluation"]) -> dict[str, RowSet]:
    """Return the rows of every expert's task, in the order of the experts."""
    sets = {}
    for name in plan.recipe.experts:
        one = plan.inputs.data.get(name)
        if one is not None and not isinstance(one.task, LmEvalTask):
            sets[name] = RowSet(one.task, getattr(one, split), _labels(plan, name, one.task))
    return sets


def _labels(plan: Plan, name: str, task: Task) -> Mapping[str, int] | None:
    """Return the classes of a task's own expert."""
    return dict(plan.inputs.experts[name].config.label2id) if isinstance(task, ClassificationTask) else None


def scoring_settings(task: Task) -> dict[str, Any]:
    """Return what a task says of how a model is scored: not where rows come from, nor how they are batched."""
    dump: dict[str, Any] = task.model_dump(exclude={"calibration", "evaluation", "batch_size", "metric", "loss_on"})
    return dump | (evaluate.lm_eval_settings(task) if isinstance(task, LmEvalTask) else {})


def _coefficient_settings(variant: Variant) -> dict[str, Any]:
    """Return the coefficients' settings; layer patterns as lists, for the last match counts and JSON has no order."""
    settings: dict[str, Any] = variant.coefficients.model_dump()
    if isinstance(variant.coefficients, ExplicitCoefficients):
        weights = variant.coefficients.weights.items()
        settings["weights"] = {name: list(one.items()) if isinstance(one, dict) else one for name, one in weights}
    return settings


def _evaluate_step(
    plan: Plan, model: str, model_step: Step, task_name: str, one: TaskRows, downloads: Mapping[str, Step]
) -> Step:
    adapter = model in plan.inputs.experts and plan.inputs.experts[model].is_adapter
    head = task_name if isinstance(one.task, ClassificationTask) and plan.inputs.experts[task_name].head else None
    needed = {"model": model_step, "base": downloads["base"]} | ({"head": downloads[head]} if head else {})
    reads = {role: step.key.fingerprint for role, step in needed.items()} | {
        "evaluation": rows_digest(one.evaluation),
        "tokenizer": plan.inputs.tokenizer_digest(),
    }
    labels = _labels(plan, task_name, one.task)
    folder = plan.inputs.listings[model].folder if model in plan.inputs.listings else plan.store.folder(model_step.key)
    settings = {"dtype": plan.recipe.dtype, "task": scoring_settings(one.task), "labels": labels}
    key = _key("evaluate", f"{model}/{task_name}", evaluate.VERSION, settings, reads)
    trunk = {key: value for key, value in reads.items() if key != "head"} | {"batch_size": one.task.batch_size}
    earlier = None if plan.store.manifest(key) or not head else plan.store.last(key)
    finish = partial(
        evaluate.evaluate,
        evaluate.Subject(
            base=plan.inputs.base.folder,
            model=folder,
            is_expert=model in plan.inputs.experts,
            head_of=plan.inputs.experts[head].folder if head else None,
            label2id=labels,
            trunk=sha256_text(canonical(settings | trunk)),
            earlier=None if earlier is None or any(damaged_files(earlier)) else earlier,
        ),
        task_name,
        one.task,
        one.evaluation,
        plan.inputs.tokenizer,
        plan.recipe.dtype,
        _device(plan, "evaluate"),
    )
    size = weight_bytes(plan.inputs.listings["base"])
    return Step(
        "evaluate",
        f"{model}/{task_name}",
        key,
        tuple(step.title for step in needed.values()),
        finish,
        reads=size + (weight_bytes(plan.inputs.listings[model]) if adapter else 0),
    )
