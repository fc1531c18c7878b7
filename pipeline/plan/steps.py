"""The steps of a recipe: what each reads, its fingerprint, and the work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.plan.models import weight_bytes
from sensmerge.pipeline.plan.placement import PlacementChoice
from sensmerge.pipeline.plan.rows import TaskRows
from sensmerge.pipeline.plan.statistics import wanted_statistics
from sensmerge.pipeline.recipe.schema import Recipe, Stage, Variant
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.layers import block_names
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.coefficients import SensCoefficients
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.kinds.kind import RowSet, RowTask, Task
from sensmerge.tasks.methods.contract import Additive
from sensmerge.tasks.networks.networks import computation_digest
from sensmerge.tasks.networks.placement import Actors
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages import evaluate, evaluate_dynamic, route
from sensmerge.tasks.stages.calibration import CalibrationSet
from sensmerge.tasks.stages.cross_task import CrossTaskJob
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.stages.merge import MergeJob, plan_merged
from sensmerge.tasks.stages.merge_vectors import MergeVectorsJob
from sensmerge.tasks.stages.statistics import StatisticsJob
from sensmerge.tasks.stages.task_vectors import TaskVectorsJob
from sensmerge.tasks.stages.variant import VariantJob


@dataclass(frozen=True)
class Resolved:
    """A recipe with its models and data, from which steps are laid out."""

    recipe: Recipe
    store: Store
    inputs: Inputs
    placements: Mapping[Stage, PlacementChoice]
    """of the stages whose networks may run in several ways"""

    def rows(self, task: str, split: Literal["calibration", "evaluation"]) -> StoredRows:
        """Return the rows of a task as its steps read them."""
        return StoredRows.of(getattr(self.inputs.data[task], split), self.store.rows)

    def write_rows(self) -> None:
        """Write the rows of all tasks to the files that steps read."""
        for one in self.inputs.data.values():
            for rows in (one.calibration, one.evaluation):
                StoredRows.of(rows, self.store.rows).write(rows)


@dataclass(frozen=True)
class Step:
    """One unit of work of a stage."""

    name: str
    key: Key
    needs: tuple[str, ...]
    """titles of the steps that must be done before"""
    job: Job
    reads: int = 0
    """bytes read"""
    writes: int = 0
    """bytes written"""
    actors: int = 0
    """workers that it starts for itself, each with the resources of the stage; then it takes none of its own"""

    @property
    def stage(self) -> Stage:
        """The stage that it is a step of."""
        return cast(Stage, self.key.stage)

    @property
    def title(self) -> str:
        """The step as logs and errors name it."""
        return f"{self.stage} {self.name}"


def lay_out(resolved: Resolved) -> list[Step]:
    """Return all steps of a recipe, each after those it needs."""
    recipe = resolved.recipe
    downloads = {
        name: _download_step(name, listing, resolved.store) for name, listing in resolved.inputs.listings.items()
    }
    made: dict[Stage, Mapping[str, Step]] = {"download": downloads, "statistics": {}, "cross_task": {}}
    made["task_vectors"] = {name: _task_vectors_step(resolved, name, downloads) for name in recipe.experts}
    if wanted_statistics(recipe):
        made["statistics"] = {name: _statistics_step(resolved, name, downloads) for name in recipe.experts}
    if recipe.sens_variants():
        made["cross_task"] = {"all": _cross_task_step(resolved, downloads)}
    order: tuple[Stage, ...] = ("download", "task_vectors", "statistics", "cross_task")
    steps = [step for stage in order for step in made[stage].values()]
    merges = {name: _merge_step(resolved, name, made) for name in recipe.merges}
    dynamic = recipe.se_variants()
    routes = {name: _route_step(resolved, name, recipe.merges[name], merges[name]) for name in dynamic}
    steps += [*merges.values(), *routes.values()]
    static = {name: step for name, step in merges.items() if name not in dynamic}
    for model, step in (downloads | static).items():
        steps += [
            _evaluate_step(resolved, model, step, name, one, downloads)
            for name, one in resolved.inputs.data.items()
            if one.task.is_scored
        ]
    if any(one.evaluation for one in resolved.inputs.data.values()):
        steps += [_evaluate_dynamic_step(resolved, name, step) for name, step in routes.items()]
    return steps


def _download_step(name: str, listing: Listing, store: Store) -> Step:
    job = DownloadJob(listing, store.hub_cache)
    size, missing = (sum(file.size for file in files) for files in (listing.files, listing.missing()))
    return Step(name, Key.of(name, job), (), job, reads=size, writes=missing)


def _reads(steps: Mapping[str, Step], *names: str) -> dict[str, str]:
    return {name: steps[name].key.fingerprint for name in names}


def _as_run(resolved: Resolved, name: str, step: Step) -> str:
    """Return the fingerprint of a model as it runs: its files, and whose settings it runs with."""
    expert = resolved.inputs.experts.get(name)
    return step.key.fingerprint + (" with the base's config" if expert and expert.base_config else "")


def _titles(steps: Mapping[str, Step], *names: str) -> tuple[str, ...]:
    return tuple(steps[name].title for name in names)


def _device(resolved: Resolved, stage: Stage) -> str:
    return "cuda" if resolved.recipe.resources_of(stage).num_gpus else "cpu"


def _task_vectors_step(resolved: Resolved, name: str, downloads: Mapping[str, Step]) -> Step:
    base, experts = resolved.inputs.only_weights()
    job = TaskVectorsJob(
        base=downloads["base"].key.fingerprint,
        expert=downloads[name].key.fingerprint,
        untied=bool(resolved.inputs.base.untied),
        name=name,
        weights=experts[name],
        groups=layer_groups(base),
    )
    reads = weight_bytes(resolved.inputs.listings["base"]) + weight_bytes(resolved.inputs.listings[name])
    writes = len(resolved.inputs.base.weights) * 32_000
    return Step(name, Key.of(name, job), _titles(downloads, "base", name), job, reads, writes)


def _calibration_set(resolved: Resolved, name: str) -> CalibrationSet:
    task = resolved.inputs.data[name].task
    assert isinstance(task, RowTask), "the recipe's schema refuses statistics of other tasks"
    return CalibrationSet(task, resolved.rows(name, "calibration"))


def _statistics_step(resolved: Resolved, name: str, downloads: Mapping[str, Step]) -> Step:
    inputs = resolved.inputs
    job = StatisticsJob(
        base=Artifact(downloads["base"].key.fingerprint, inputs.base.folder),
        expert=Artifact(downloads[name].key.fingerprint, inputs.experts[name].folder),
        base_config=inputs.experts[name].base_config,
        statistics=wanted_statistics(resolved.recipe),
        calibration=_calibration_set(resolved, name),
        tokenizer=Artifact(inputs.tokenizer.digest, inputs.tokenizer.folder),
        dtype=resolved.recipe.dtype,
        name=name,
        device=_device(resolved, "statistics"),
        placement=resolved.placements["statistics"].placement,
    )
    return Step(
        name,
        Key.of(name, job),
        _titles(downloads, "base", name),
        job,
        reads=weight_bytes(inputs.listings["base"]) + weight_bytes(inputs.listings[name]),
        writes=_kept_bytes(resolved, "statistics", inputs.data[name].calibration_tokens),
        actors=_actors(resolved, "statistics"),
    )


def _actors(resolved: Resolved, stage: Stage) -> int:
    placement = resolved.placements[stage].placement
    return placement.count if isinstance(placement, Actors) else 0


def _kept_bytes(resolved: Resolved, stage: Stage, tokens: int) -> int:
    """Return how many bytes of hidden states a streamed network keeps on disk while it runs: both ways at most."""
    if resolved.placements[stage].placement != "streamed":
        return 0
    blocks = len(block_names(resolved.inputs.base.weights)) if stage == "statistics" else 1
    return 2 * (blocks + 1) * _state_bytes(resolved, tokens)


def _state_bytes(resolved: Resolved, tokens: int) -> int:
    width: int = resolved.inputs.base.config.get_text_config().hidden_size
    itemsize: int = getattr(torch, resolved.recipe.dtype).itemsize
    return tokens * width * itemsize


def _cross_task_step(resolved: Resolved, downloads: Mapping[str, Step]) -> Step:
    inputs, names = resolved.inputs, tuple(resolved.recipe.experts)
    job = CrossTaskJob(
        base=Artifact(downloads["base"].key.fingerprint, inputs.base.folder),
        experts={name: Artifact(downloads[name].key.fingerprint, inputs.experts[name].folder) for name in names},
        base_config={name for name in names if inputs.experts[name].base_config},
        calibration={name: _calibration_set(resolved, name) for name in names},
        tokenizer=Artifact(inputs.tokenizer.digest, inputs.tokenizer.folder),
        dtype=resolved.recipe.dtype,
        heads={name: computation_digest(inputs.experts[name].config) for name in names},
        device=_device(resolved, "cross_task"),
        placement=resolved.placements["cross_task"].placement,
    )
    # While it runs, the stage keeps what every expert's trunk gives for every calibration token.
    tokens = sum(one.calibration_tokens for one in inputs.data.values())
    return Step(
        "all",
        Key.of("all", job),
        _titles(downloads, "base", *names),
        job,
        reads=sum(weight_bytes(inputs.listings[name]) for name in ("base", *names)),
        writes=len(names) * _state_bytes(resolved, tokens) + _kept_bytes(resolved, "cross_task", tokens),
        actors=_actors(resolved, "cross_task"),
    )


def _merge_step(resolved: Resolved, name: str, made: Mapping[Stage, Mapping[str, Step]]) -> Step:
    """Return the merge of one variant.

    Args:
        resolved: the recipe.
        name: of the variant.
        made: steps of the stages before, by name.
    """
    variant = resolved.recipe.merges[name]
    sens = isinstance(variant.coefficients, SensCoefficients)
    used: dict[Stage, Mapping[str, Step]] = {"download": made["download"], "task_vectors": made["task_vectors"]}
    used["statistics"] = made["statistics"] if sens or variant.method.statistics else {}
    used["cross_task"] = made["cross_task"] if sens else {}
    fields = _variant_fields(resolved, variant, used)
    reads = sum(weight_bytes(listing) for listing in resolved.inputs.listings.values())
    job: VariantJob
    # Which weights a variant is made of does not depend on how samples are routed.
    if isinstance(variant.application, SeApplication):
        job = MergeVectorsJob(**fields)
        writes = _dynamic_bytes(resolved, job)
    else:
        job = MergeJob(**fields, out_dtype=variant.out_dtype)
        writes = sum(plan_merged(resolved.inputs.base, variant.out_dtype, variant.shard_size).sizes.values())
        reads += writes  # read back
    needs = tuple(step.title for steps in used.values() for step in steps.values())
    return Step(name, Key.of(name, job), needs, job, reads, writes)


def _variant_fields(resolved: Resolved, variant: Variant, used: Mapping[Stage, Mapping[str, Step]]) -> dict[str, Any]:
    """Return the fields of a `VariantJob`; `used` has the steps whose artifacts it reads, by stage and name."""
    inputs = resolved.inputs
    base, experts = inputs.only_weights()
    heads = {name: one for name, one in inputs.experts.items() if one.head}
    return {
        "models": _reads(used["download"], *used["download"]),
        "task_vectors": _artifacts(resolved, used["task_vectors"]),
        "method": variant.method,
        "weight": variant.weight,
        "coefficients": variant.coefficients,
        "statistics": _artifacts(resolved, used["statistics"]),
        "distances": _artifacts(resolved, used["cross_task"]).get("all"),
        "shard_size": variant.shard_size,
        "companions": inputs.tokenizer.companions_digest,
        "token_ids": inputs.tokenizer.token_ids,
        "classes": inputs.classes,
        "base_config": [name for name, one in heads.items() if one.base_config],
        "base": base,
        "experts": experts,
        "head_configs": {name: one.config.to_json_string() for name, one in heads.items()},
        "tokenizer": inputs.tokenizer.folder,
        "groups": layer_groups(base),
    }


def _artifacts(resolved: Resolved, steps: Mapping[str, Step]) -> dict[str, Artifact]:
    return {name: Artifact(step.key.fingerprint, resolved.store.folder(step.key)) for name, step in steps.items()}


def _dynamic_bytes(resolved: Resolved, job: MergeVectorsJob) -> int:
    """Return the size of base and task vectors at most: all whole but for the factors of adapters."""
    base, listings = resolved.inputs.base, resolved.inputs.listings
    size = weight_bytes(listings["base"])
    for name, expert in resolved.inputs.experts.items():
        if expert.is_adapter and job.method.keeps_whole(name):
            size += weight_bytes(listings[name])
        else:
            size += sum(base.info(tensor).nbytes for tensor in base.weights if expert.touches(tensor))
    return size


def _route_step(resolved: Resolved, name: str, variant: Variant, merged: Step) -> Step:
    assert isinstance(variant.application, SeApplication)
    calibration = _row_sets(resolved, "calibration")
    assert isinstance(variant.method, Additive), "the recipe's schema refuses other methods"
    job = route.RouteJob(
        model=_made(resolved, merged),
        calibration=calibration,
        application=variant.application,
        static=variant.method.static_coefficient(variant.weight, len(calibration)),
        dtype=resolved.recipe.dtype,
        device=_device(resolved, "route"),
    )
    # The model's files are linked, not written again.
    return Step(name, Key.of(name, job), (merged.title,), job, reads=merged.writes)


def _evaluate_dynamic_step(resolved: Resolved, name: str, routed: Step) -> Step:
    scored = [task for task, one in resolved.inputs.data.items() if one.evaluation]
    evaluation = {task: one for task, one in _row_sets(resolved, "evaluation").items() if task in scored}
    job = evaluate_dynamic.EvaluateDynamicJob(
        model=_made(resolved, routed),
        evaluation=evaluation,
        depends={task: one.task.depends_on() for task, one in evaluation.items()},
        device=_device(resolved, "evaluate"),
    )
    return Step(name, Key.of(name, job), (routed.title,), job, reads=routed.reads)


def _made(resolved: Resolved, step: Step) -> Artifact:
    """Return what a step makes."""
    return Artifact(step.key.fingerprint, resolved.store.folder(step.key))


def _row_sets(resolved: Resolved, split: Literal["calibration", "evaluation"]) -> dict[str, RowSet]:
    """Return the rows of every expert's task, in the order of the experts."""
    sets = {}
    for name in resolved.recipe.experts:
        one = resolved.inputs.data.get(name)
        if one is not None and isinstance(one.task, RowTask):
            sets[name] = RowSet(one.task, resolved.rows(name, split), _labels(resolved, name, one.task))
    return sets


def _labels(resolved: Resolved, name: str, task: Task) -> Mapping[str, int] | None:
    """Return the classes of a task's own expert."""
    return dict(resolved.inputs.experts[name].config.label2id) if task.has_own_head else None


def _evaluate_step(
    resolved: Resolved, model: str, model_step: Step, task_name: str, one: TaskRows, downloads: Mapping[str, Step]
) -> Step:
    experts, listing = resolved.inputs.experts, resolved.inputs.listings.get(model)
    head = task_name if one.task.has_own_head and experts[task_name].head else None
    needed = [model_step, downloads["base"], *([downloads[head]] if head else [])]
    config = None
    if head and listing and model != head and not experts[head].has_trunk_in_head():
        # This model stays what it is when the task's expert changes, of which it only takes the head.
        config = computation_digest(experts[head].config)
    job = evaluate.EvaluateJob(
        base=Artifact(downloads["base"].key.fingerprint, resolved.inputs.base.folder),
        model=Artifact(
            _as_run(resolved, model, model_step), listing.folder if listing else resolved.store.folder(model_step.key)
        ),
        head=Artifact(_as_run(resolved, head, downloads[head]), experts[head].folder) if head else None,
        tokenizer=Artifact(resolved.inputs.tokenizer.digest, resolved.inputs.tokenizer.folder),
        task=one.task,
        rows=resolved.rows(task_name, "evaluation"),
        labels=_labels(resolved, task_name, one.task),
        dtype=resolved.recipe.dtype,
        depends=one.task.depends_on(),
        name=task_name,
        is_expert=model in experts,
        device=_device(resolved, "evaluate"),
        head_config=config,
        base_config=tuple(expert.folder for expert in experts.values() if expert.base_config),
    )
    reads = weight_bytes(resolved.inputs.listings["base"])
    if model in experts and experts[model].is_adapter:
        reads += weight_bytes(resolved.inputs.listings[model])
    name = f"{model}/{task_name}"
    return Step(name, Key.of(name, job), tuple(step.title for step in needed), job, reads=reads)
