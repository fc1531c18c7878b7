"""The steps of a recipe: what each reads, its fingerprint, and the work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.plan.models import weight_bytes
from sensmerge.pipeline.plan.placement import Choice
from sensmerge.pipeline.plan.rows import TaskRows
from sensmerge.pipeline.recipe.schema import Recipe, Stage, Variant
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.store.verify import damaged_files, is_intact
from sensmerge.tasks.artifacts import Artifact, canonical, sha256_text
from sensmerge.tasks.checkpoints.layers import block_names
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.coefficients import SensCoefficients
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.kinds import lm_eval as evaluate_lm_eval
from sensmerge.tasks.kinds.datasets import ClassificationTask, LmEvalTask, RowSet, Task
from sensmerge.tasks.methods.contract import Additive
from sensmerge.tasks.networks.networks import computation_digest
from sensmerge.tasks.networks.placement import Actors
from sensmerge.tasks.rows.source import rows_digest
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages import (
    cross_task,
    evaluate,
    evaluate_dynamic,
    route,
    sensitivity,
)
from sensmerge.tasks.stages.download import DownloadJob, Listing
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.stages.merge import MergeJob, plan_merged
from sensmerge.tasks.stages.merge_vectors import MergeVectorsJob
from sensmerge.tasks.stages.task_vectors import TaskVectorsJob
from sensmerge.tasks.stages.variant import VariantJob


@dataclass(frozen=True)
class Resolved:
    """A recipe with its models and data, from which steps are laid out."""

    recipe: Recipe
    store: Store
    inputs: Inputs
    placements: Mapping[Stage, Choice]
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


@dataclass(frozen=True)
class Callables(Job):
    """The work of a stage that has no job of its own yet."""

    inputs: Mapping[str, Any]
    finishing: Callable[..., dict[str, Any]]
    pieces: tuple[Callable[..., bool], ...] = ()

    def identity(self) -> dict[str, Any]:
        """See `Job`."""
        return dict(self.inputs)

    def parts(self) -> Sequence[int]:
        """See `Job`."""
        return range(len(self.pieces))

    def run(self, part: int | str, out: Path) -> bool:
        """See `Job`."""
        return self.pieces[int(part)](out=out)

    def finish(self, out: Path) -> dict[str, Any]:
        """See `Job`."""
        return self.finishing(out=out)


def _key(stage: str, name: str, version: int, settings: Mapping[str, Any], reads: Mapping[str, str]) -> Key:
    return Key(stage, name, {"stage": stage, "version": version, "settings": dict(settings), "reads": dict(reads)})


def _step(
    key: Key,
    needs: tuple[str, ...],
    finish: Callable[..., dict[str, Any]],
    parts: tuple[Callable[..., bool], ...] = (),
    reads: int = 0,
    writes: int = 0,
    actors: int = 0,
) -> Step:
    return Step(key.name, key, needs, Callables(key.inputs, finish, parts), reads, writes, actors)


def lay_out(resolved: Resolved) -> list[Step]:
    """Return all steps of a recipe, each after those it needs."""
    recipe = resolved.recipe
    downloads = {
        name: _download_step(name, listing, resolved.store) for name, listing in resolved.inputs.listings.items()
    }
    made: dict[Stage, Mapping[str, Step]] = {"download": downloads}
    made["task_vectors"] = {name: _task_vectors_step(resolved, name, downloads) for name in recipe.experts}
    if recipe.statistics():
        made["sensitivity"] = {name: _sensitivity_step(resolved, name, downloads) for name in recipe.experts}
    if recipe.sens_variants():
        made["cross_task"] = {"all": _cross_task_step(resolved, downloads)}
    steps = [step for by_name in made.values() for step in by_name.values()]
    merges = {name: _merge_step(resolved, name, made) for name in recipe.merges}
    dynamic = recipe.se_variants()
    routes = {name: _route_step(resolved, name, recipe.merges[name], merges[name]) for name in dynamic}
    steps += [*merges.values(), *routes.values()]
    static = {name: step for name, step in merges.items() if name not in dynamic}
    for model, step in (downloads | static).items():
        steps += [
            _evaluate_step(resolved, model, step, name, one, downloads)
            for name, one in resolved.inputs.data.items()
            if one.evaluation or isinstance(one.task, LmEvalTask)
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


def _calibration_settings(task: Task) -> dict[str, Any]:
    """Return what a task says of its samples: not where rows come from, nor how they are batched or scored."""
    scoring = {"calibration", "evaluation", "batch_size", "metric", "generate"}
    # A multiple-choice task's `answer` names the right choice, a completion's only what is compared in exact match.
    dump: dict[str, Any] = task.model_dump(exclude=scoring | ({"answer"} if task.kind == "completion" else set()))
    return dump


def _sensitivity_step(resolved: Resolved, name: str, downloads: Mapping[str, Step]) -> Step:
    one = resolved.inputs.data[name]
    assert not isinstance(one.task, LmEvalTask), "the recipe's schema refuses sens coefficients for it"
    reads = {one: _as_run(resolved, one, downloads[one]) for one in ("base", name)} | {
        "calibration": rows_digest(one.calibration),
        "tokenizer": resolved.inputs.tokenizer.digest,
    }
    settings = {"dtype": resolved.recipe.dtype} | {"task": _calibration_settings(one.task)}
    finish = partial(
        sensitivity.sensitivity,
        resolved.inputs.base.folder,
        resolved.inputs.experts[name].folder,
        name,
        one.task,
        one.calibration,
        resolved.inputs.tokenizer.folder,
        resolved.recipe.dtype,
        _device(resolved, "sensitivity"),
        resolved.placements["sensitivity"].placement,
        base_config=resolved.inputs.experts[name].base_config,
    )
    return _step(
        _key("sensitivity", name, sensitivity.VERSION, settings, reads),
        _titles(downloads, "base", name),
        finish,
        reads=weight_bytes(resolved.inputs.listings["base"]) + weight_bytes(resolved.inputs.listings[name]),
        writes=_kept_bytes(resolved, "sensitivity", one.calibration_tokens),
        actors=_actors(resolved, "sensitivity"),
    )


def _actors(resolved: Resolved, stage: Stage) -> int:
    placement = resolved.placements[stage].placement
    return placement.count if isinstance(placement, Actors) else 0


def _kept_bytes(resolved: Resolved, stage: Stage, tokens: int) -> int:
    """Return how many bytes of hidden states a streamed network keeps on disk while it runs: both ways at most."""
    if resolved.placements[stage].placement != "streamed":
        return 0
    blocks = len(block_names(resolved.inputs.base.weights)) if stage == "sensitivity" else 1
    return 2 * (blocks + 1) * _state_bytes(resolved, tokens)


def _state_bytes(resolved: Resolved, tokens: int) -> int:
    width: int = resolved.inputs.base.config.get_text_config().hidden_size
    itemsize: int = getattr(torch, resolved.recipe.dtype).itemsize
    return tokens * width * itemsize


def _cross_task_step(resolved: Resolved, downloads: Mapping[str, Step]) -> Step:
    names = tuple(resolved.recipe.experts)
    reads = {one: _as_run(resolved, one, downloads[one]) for one in ("base", *names)} | {
        f"calibration {name}": rows_digest(resolved.inputs.data[name].calibration) for name in names
    }
    tokenizer = {"tokenizer": resolved.inputs.tokenizer.digest}
    settings = {"dtype": resolved.recipe.dtype} | {
        "tasks": {name: _calibration_settings(resolved.inputs.data[name].task) for name in names},
    }
    about = (
        reads | tokenizer | {f"head {name}": computation_digest(resolved.inputs.experts[name].config) for name in names}
    )
    # What the head of task j reads of a trunk depends on the head's config, a distance on all of expert j.
    trunks = _pair_prints(resolved, about, lambda i, j: ("base", i, f"head {j}", f"calibration {j}", "tokenizer"))
    pairs = _pair_prints(resolved, about, lambda i, j: ("base", i, j, f"calibration {j}", "tokenizer"))
    key = _key("cross_task", "all", cross_task.VERSION, settings, reads | tokenizer)
    known: dict[str, float] = {}
    kept: dict[str, Path] = {}
    for folder in () if resolved.store.manifest(key) else resolved.store.artifacts("cross_task"):
        if all(is_intact(folder, name) for name in (cross_task.PAIRS, cross_task.DISTANCES)):
            known |= cross_task.known_distances(folder)
        for print_, file in cross_task.kept_trunks(folder, trunks).items():
            if is_intact(folder, str(file.relative_to(folder))):
                kept[print_] = file
    wanted = {print_ for prints in (pairs, trunks) for row in prints.values() for print_ in row.values()}
    known = {print_: distance for print_, distance in known.items() if print_ in wanted}
    kept = {print_: file for print_, file in kept.items() if print_ in wanted}
    job = cross_task.CrossTaskJob(
        base=resolved.inputs.base.folder,
        experts={name: resolved.inputs.experts[name].folder for name in names},
        calibration=_row_sets(resolved, "calibration"),
        tokenizer=resolved.inputs.tokenizer.folder,
        dtype=resolved.recipe.dtype,
        device=_device(resolved, "cross_task"),
        placement=resolved.placements["cross_task"].placement,
        pairs=pairs,
        trunks=trunks,
        known=known,
        kept=kept,
        base_config=frozenset(name for name in names if resolved.inputs.experts[name].base_config),
    )
    total = sum(weight_bytes(resolved.inputs.listings[name]) for name in ("base", *names))
    # While it runs, the stage keeps what every expert's trunk gives for every calibration token.
    tokens = sum(one.calibration_tokens for one in resolved.inputs.data.values())
    scratch = len(names) * _state_bytes(resolved, tokens) + _kept_bytes(resolved, "cross_task", tokens)
    return _step(
        key,
        _titles(downloads, "base", *names),
        partial(cross_task.finish_distances, job),
        tuple(partial(cross_task.run_trunk, job, name) for name in names if job.looked_at(name)),
        reads=total,
        writes=scratch,
        actors=_actors(resolved, "cross_task"),
    )


def _pair_prints(
    resolved: Resolved, reads: Mapping[str, str], keys: Callable[[str, str], tuple[str, ...]]
) -> dict[str, dict[str, str]]:
    """Return fingerprints of something of expert i and task j, which depends on what `keys(i, j)` of `reads` names."""

    def fingerprint(i: str, j: str) -> str:
        about = {
            "version": cross_task.VERSION,
            "dtype": resolved.recipe.dtype,
            "task": _calibration_settings(resolved.inputs.data[j].task),
            "reads": [reads[key] for key in keys(i, j)],
        }
        return sha256_text(canonical(about))

    names = resolved.recipe.experts
    return {i: {j: fingerprint(i, j) for j in names} for i in names}


def _merge_step(resolved: Resolved, name: str, made: Mapping[Stage, Mapping[str, Step]]) -> Step:
    """Return the merge of one variant.

    Args:
        resolved: the recipe.
        name: of the variant.
        made: steps of the stages before, by name.
    """
    variant = resolved.recipe.merges[name]
    sens = isinstance(variant.coefficients, SensCoefficients)
    used = {"download": made["download"], "task_vectors": made["task_vectors"]}
    used |= {"sensitivity": made["sensitivity"]} if sens or variant.method.statistics else {}
    used |= {"cross_task": made["cross_task"]} if sens else {}
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


def _variant_fields(resolved: Resolved, variant: Variant, used: Mapping[str, Mapping[str, Step]]) -> dict[str, Any]:
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
        "statistics": _artifacts(resolved, used.get("sensitivity", {})),
        "distances": _artifacts(resolved, used.get("cross_task", {})).get("all"),
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
    static = variant.method.static_coefficient(variant.weight, len(calibration))
    settings = {
        "dtype": resolved.recipe.dtype,
        "application": variant.application.model_dump(),
        "static": static,
        "tasks": {key: _calibration_settings(one.task) | {"labels": one.label2id} for key, one in calibration.items()},
    }
    reads = {"model": merged.key.fingerprint} | {
        f"calibration {key}": rows_digest(one.rows) for key, one in calibration.items()
    }
    device = _device(resolved, "route")
    finish = partial(
        route.route,
        resolved.store.folder(merged.key),
        calibration,
        variant.application,
        static,
        resolved.recipe.dtype,
        device,
    )
    # The model's files are linked, not written again.
    key = _key("route", name, route.VERSION, settings, reads)
    return _step(key, (merged.title,), finish, reads=merged.writes)


def _evaluate_dynamic_step(resolved: Resolved, name: str, routed: Step) -> Step:
    evaluation = {key: one for key, one in _row_sets(resolved, "evaluation").items() if one.rows}
    settings = {
        "tasks": {key: scoring_settings(one.task) | {"labels": one.label2id} for key, one in evaluation.items()}
    }
    reads = {"model": routed.key.fingerprint} | {
        f"evaluation {key}": rows_digest(one.rows) for key, one in evaluation.items()
    }
    device = _device(resolved, "evaluate")
    finish = partial(evaluate_dynamic.evaluate_dynamic, resolved.store.folder(routed.key), evaluation, device)
    key = _key("evaluate", name, evaluate_dynamic.VERSION, settings, reads)
    return _step(key, (routed.title,), finish, reads=routed.reads)


def _row_sets(resolved: Resolved, split: Literal["calibration", "evaluation"]) -> dict[str, RowSet]:
    """Return the rows of every expert's task, in the order of the experts."""
    sets = {}
    for name in resolved.recipe.experts:
        one = resolved.inputs.data.get(name)
        if one is not None and not isinstance(one.task, LmEvalTask):
            sets[name] = RowSet(one.task, getattr(one, split), _labels(resolved, name, one.task))
    return sets


def _labels(resolved: Resolved, name: str, task: Task) -> Mapping[str, int] | None:
    """Return the classes of a task's own expert."""
    return dict(resolved.inputs.experts[name].config.label2id) if isinstance(task, ClassificationTask) else None


def scoring_settings(task: Task) -> dict[str, Any]:
    """Return what a task says of how a model is scored: not where rows come from, nor how they are batched."""
    dump: dict[str, Any] = task.model_dump(exclude={"calibration", "evaluation", "batch_size", "metric", "loss_on"})
    return dump | (evaluate_lm_eval.lm_eval_settings(task) if isinstance(task, LmEvalTask) else {})


def _evaluate_step(
    resolved: Resolved, model: str, model_step: Step, task_name: str, one: TaskRows, downloads: Mapping[str, Step]
) -> Step:
    adapter = model in resolved.inputs.experts and resolved.inputs.experts[model].is_adapter
    head = task_name if isinstance(one.task, ClassificationTask) and resolved.inputs.experts[task_name].head else None
    needed = {"model": (model, model_step), "base": ("base", downloads["base"])}
    needed |= {"head": (head, downloads[head])} if head else {}
    reads = {role: _as_run(resolved, name, step) for role, (name, step) in needed.items()} | {
        "evaluation": rows_digest(one.evaluation),
        "tokenizer": resolved.inputs.tokenizer.digest,
    }
    labels = _labels(resolved, task_name, one.task)
    listing = resolved.inputs.listings.get(model)
    settings = {"dtype": resolved.recipe.dtype, "task": scoring_settings(one.task), "labels": labels}
    key = _key("evaluate", f"{model}/{task_name}", evaluate.VERSION, settings, reads)
    trunk = None
    if head and listing and model != head and not resolved.inputs.experts[head].has_trunk_in_head():
        # This model stays what it is when the task's expert changes, of which it only takes the head.
        version = {"version": evaluate.VERSION, "batch_size": one.task.batch_size}
        trunk = sha256_text(
            canonical(settings | reads | version | {"head": computation_digest(resolved.inputs.experts[head].config)})
        )
    finish = partial(
        evaluate.evaluate,
        evaluate.Subject(
            base=resolved.inputs.base.folder,
            model=listing.folder if listing else resolved.store.folder(model_step.key),
            is_expert=model in resolved.inputs.experts,
            head_of=resolved.inputs.experts[head].folder if head else None,
            label2id=labels,
            trunk=trunk,
            earlier=_earlier(resolved.store, key) if trunk else None,
            base_config=tuple(one.folder for one in resolved.inputs.experts.values() if one.base_config),
        ),
        task_name,
        one.task,
        one.evaluation,
        resolved.inputs.tokenizer.folder,
        resolved.recipe.dtype,
        _device(resolved, "evaluate"),
    )
    size = weight_bytes(resolved.inputs.listings["base"])
    return _step(
        key,
        tuple(step.title for _, step in needed.values()),
        finish,
        reads=size + (weight_bytes(resolved.inputs.listings[model]) if adapter else 0),
    )


def _earlier(store: Store, key: Key) -> Path | None:
    """Return the last artifact of a step that is to run again, if all of it is as it was written."""
    last = None if store.manifest(key) else store.last(key)
    return None if last is None or any(damaged_files(last)) else last
