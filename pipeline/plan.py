"""From a recipe to steps: what each reads, its fingerprint, RUN or SKIP and why; finds what headers show is wrong."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.recipe import Recipe, Stage, Variant
from pipeline.store import Key, Store
from tasks import cross_task, download, evaluate, merge, sensitivity, task_vectors
from tasks.artifacts import canonical, sha256_text
from tasks.coefficients import ExplicitCoefficients, SensCoefficients, matches
from tasks.datasets import ClassificationTask, LmEvalTask, Row, Task, check_rows, encode, load_rows, rows_digest
from tasks.download import Listing, LocalModel, parse_model_id, resolve, safetensors_header, small_files
from tasks.errors import InputError
from tasks.methods import METHODS, Settings
from tasks.models.adapter import ADAPTER_WEIGHTS
from tasks.models.checkpoint import INDEX, WEIGHTS, Checkpoint, TensorInfo, check_index, index_files
from tasks.models.expert import Base, Expert, open_base, open_expert
from tasks.models.layers import group_by_layer
from tasks.models.networks import has_tokenizer, load_tokenizer

VERSION = 1
"""Of the download stage's artifact and of what all fingerprints have in common."""


@dataclass(frozen=True)
class Step:
    """One unit of work of a stage."""

    stage: Stage
    name: str
    key: Key
    needs: tuple[str, ...]
    """fingerprints of the steps that must be done before"""
    finish: Callable[..., dict[str, Any]]
    """called with out=folder on a worker; what it returns is kept in the manifest"""
    parts: tuple[Callable[..., None], ...] = ()
    """pieces that may run side by side before `finish`, each called with out=folder; doing one twice is harmless"""
    reads: int = 0
    """bytes read"""
    writes: int = 0
    """bytes written"""

    @property
    def title(self) -> str:
        """The step as logs and errors name it."""
        return f"{self.stage} {self.name}"


class StepError(RuntimeError):
    """A step failed for a reason that is not the user's input; the text names the step and where it ran."""


@dataclass(frozen=True)
class TaskRows:
    """A task with the rows that the recipe chose for it."""

    task: Task
    calibration: list[Row]
    evaluation: list[Row]


@dataclass(frozen=True)
class Plan:
    """All steps of a recipe, in an order in which each comes after those it needs."""

    recipe: Recipe
    store: Store
    base: Base
    experts: Mapping[str, Expert]
    listings: Mapping[str, Listing]
    """of base and experts by name"""
    data: Mapping[str, TaskRows]
    tokenizer: Path
    """folder of the model whose tokenizer all models use"""
    steps: tuple[Step, ...]
    todo: Mapping[str, str] = field(default_factory=dict)
    """fingerprint → why, of the steps that the store lacks"""

    def step(self, stage: Stage, name: str) -> Step:
        """Return one step."""
        return next(step for step in self.steps if step.stage == stage and step.name == name)

    def artifact(self, stage: Stage, name: str) -> Path:
        """Return the folder of a step's artifact."""
        return self.store.folder(self.step(stage, name).key)

    def models(self) -> dict[str, Path]:
        """Return the folder of every model by name: base, experts, variants."""
        folders = {name: listing.folder for name, listing in self.listings.items()}
        return folders | {name: self.artifact("merge", name) for name in self.recipe.merges}


def make_plan(recipe: Recipe, folder: Path, store: Store) -> Plan:
    """Resolve models and data of a recipe, check all that can be checked without work, and lay out the steps.

    Args:
        recipe: the recipe.
        folder: what its relative paths are relative to.
        store: where artifacts are looked for.

    Raises:
        InputError: models that cannot be merged, data that does not fit its task, no room on the disk.
    """
    cache = store.root / "hub"
    listings = {"base": _listing("base", recipe.base, folder, cache)}
    listings |= {name: _listing(f"experts.{name}", one.model, folder, cache) for name, one in recipe.experts.items()}
    _check_distinct(listings)
    with _about("base"):
        base = open_base(small_files(listings["base"], cache), _remote_headers(listings["base"], cache))
    experts = {name: _open_expert(f"experts.{name}", listings[name], base, cache) for name in recipe.experts}
    _check_layers(recipe, base)
    tokenizer = next(
        (listing.folder for listing in listings.values() if has_tokenizer(listing.folder)), listings["base"].folder
    )
    reader = load_tokenizer(tokenizer) if recipe.tasks else None
    data = {name: _task_rows(name, task, experts[name], reader, folder) for name, task in recipe.tasks.items()}
    plan = Plan(recipe, store, base, experts, listings, data, tokenizer, ())
    steps = tuple(_steps(plan))
    todo = {step.key.fingerprint: store.why(step.key) for step in steps if store.manifest(step.key) is None}
    planned = replace(plan, steps=steps, todo=todo)
    _check_room(planned)
    return planned


@contextmanager
def _about(key: str) -> Iterator[None]:
    """Name the recipe key in what is said of bad input."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(key):
            raise
        raise InputError(f"{key}: {error}") from error


def _listing(key: str, text: str, folder: Path, cache: Path) -> Listing:
    with _about(key):
        return resolve(parse_model_id(text, folder), cache)


def _open_expert(key: str, listing: Listing, base: Base, cache: Path) -> Expert:
    with _about(key):
        return open_expert(small_files(listing, cache), base, key, _remote_headers(listing, cache))


def _check_distinct(listings: Mapping[str, Listing]) -> None:
    seen: dict[str, str] = {}
    for name, listing in listings.items():
        digest = model_digest(listing)
        if digest in seen and "base" not in (name, seen[digest]):
            raise InputError(f"experts.{name}: the same files as experts.{seen[digest]}; expected every expert once")
        seen[digest] = name


def _remote_headers(listing: Listing, cache: Path) -> Checkpoint | None:
    """Return the headers of a hub model whose weights are not here yet; None where the folder has them."""
    names = {file.name for file in listing.files}
    if isinstance(listing.source, LocalModel) or not any(file.name in names for file in listing.missing()):
        return None
    if ADAPTER_WEIGHTS in names or WEIGHTS in names:
        file = ADAPTER_WEIGHTS if ADAPTER_WEIGHTS in names else WEIGHTS
        return Checkpoint(listing.folder, safetensors_header(listing, file, cache))
    index = listing.folder / INDEX
    tensors: dict[str, TensorInfo] = {}
    for file in index_files(index):
        tensors |= safetensors_header(listing, file, cache)
    check_index(index, tensors)
    return Checkpoint(listing.folder, tensors)


def _check_layers(recipe: Recipe, base: Base) -> None:
    layers = list(group_by_layer(base.weights))
    for name, variant in recipe.merges.items():
        if not isinstance(variant.coefficients, ExplicitCoefficients):
            continue
        for expert, setting in variant.coefficients.weights.items():
            for pattern in setting if isinstance(setting, dict) else ():
                if not any(matches(pattern, layer) for layer in layers):
                    raise InputError(
                        f"merges.{name}.coefficients.weights.{expert}: no layer matches {pattern!r}; "
                        f"the base has {layers[0]} … {layers[-1]}"
                    )
            for layer in layers:
                if isinstance(setting, dict) and not any(matches(pattern, layer) for pattern in setting):
                    raise InputError(
                        f"merges.{name}.coefficients.weights.{expert}: no pattern matches layer {layer}; "
                        'add one for all others first: "*": NUMBER'
                    )


def _task_rows(name: str, task: Task, expert: Expert, tokenizer: Any, folder: Path) -> TaskRows:
    if isinstance(task, LmEvalTask):
        evaluate.check_lm_eval(task, f"tasks.{name}")
        return TaskRows(task, [], [])
    if isinstance(task, ClassificationTask) and not _classifies(expert):
        raise InputError(
            f"tasks.{name}.kind: classification, but {expert.folder} has no classification head; "
            "expected an expert with one (its own classifier, or modules_to_save)"
        )
    label2id = expert.config.label2id
    positions = getattr(expert.config.get_text_config(), "max_position_embeddings", None) or task.max_length
    rows = {}
    for split in ("calibration", "evaluation"):
        source, key = getattr(task, split), f"tasks.{name}.{split}"
        rows[split] = [] if source is None else load_rows(source, key, folder)
        if source is not None:
            check_rows(task, rows[split], key, label2id if isinstance(task, ClassificationTask) else None)
        for number, row in enumerate(rows[split]):
            length = len(encode(task, row, tokenizer, f"row {number} of {key}", label2id).input_ids)
            if length > positions:
                raise InputError(
                    f"tasks.{name}.max_length: row {number} of {key} has {length} tokens, the model takes {positions}; "
                    f"set max_length to at most {positions}"
                )
    return TaskRows(task, rows["calibration"], rows["evaluation"])


def _classifies(expert: Expert) -> bool:
    architectures = expert.config.architectures or []
    return bool(expert.head) or any("SequenceClassification" in name for name in architectures)


def _check_room(plan: Plan) -> None:
    needed = sum(step.writes for step in plan.steps if step.key.fingerprint in plan.todo)
    existing = next(path for path in (plan.store.root, *plan.store.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{plan.store.root}: no room on the disk: the run writes {human_bytes(needed)}, "
            f"{human_bytes(free)} are free; free some or choose another --store"
        )


def plan_summary(plan: Plan) -> str:
    """Return the plan in a line: how many steps run, and the bytes they read and write."""
    run = [step for step in plan.steps if step.key.fingerprint in plan.todo]
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
        why = plan.todo.get(step.key.fingerprint)
        table.add_row(
            step.stage,
            step.name,
            "SKIP" if why is None else "RUN",
            "in the store" if why is None else why,
            "" if why is None else human_bytes(step.reads),
            "" if why is None else human_bytes(step.writes),
        )
    return table


def human_bytes(count: int) -> str:
    """Return a byte count with a decimal unit, as disks are sold: 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def model_digest(listing: Listing) -> str:
    """Return the content digest of a model: its files' names, sizes and digests, and no path or revision."""
    return sha256_text(canonical([[file.name, file.size, file.digest] for file in listing.files]))


def _weight_bytes(listing: Listing) -> int:
    return sum(file.size for file in listing.files if file.name.endswith(".safetensors"))


def _key(stage: Stage, name: str, version: int, settings: Mapping[str, Any], reads: Mapping[str, str]) -> Key:
    return Key(stage, name, {"stage": stage, "version": version, "settings": dict(settings), "reads": dict(reads)})


def _steps(plan: Plan) -> list[Step]:
    """Lay out all steps of a recipe."""
    recipe = plan.recipe
    downloads = {name: _download_step(name, listing, plan.store) for name, listing in plan.listings.items()}
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
    steps += merges.values()
    for model, step in (downloads | merges).items():
        steps += [
            _evaluate_step(plan, model, step, name, one, downloads)
            for name, one in plan.data.items()
            if one.evaluation or isinstance(one.task, LmEvalTask)
        ]
    return steps


def _download_step(name: str, listing: Listing, store: Store) -> Step:
    key = _key("download", name, VERSION, {}, {"files": model_digest(listing)})
    missing = sum(file.size for file in listing.missing())
    finish = partial(download.download, listing, store.root / "hub")
    return Step("download", name, key, (), finish, reads=sum(file.size for file in listing.files), writes=missing)


def _reads(steps: Mapping[str, Step], *names: str) -> dict[str, str]:
    return {name: steps[name].key.fingerprint for name in names}


def _device(plan: Plan, stage: Stage) -> str:
    return "cuda" if plan.recipe.resources_of(stage).num_gpus else "cpu"


def _tokenizer_digest(plan: Plan) -> str:
    listing = next(listing for listing in plan.listings.values() if listing.folder == plan.tokenizer)
    files = [file for file in listing.files if not file.name.endswith((".safetensors", "config.json"))]
    tokenizer_config = [file for file in listing.files if file.name == "tokenizer_config.json"]
    return sha256_text(canonical([[file.name, file.digest] for file in (*files, *tokenizer_config)]))


def _task_vectors_step(plan: Plan, name: str, downloads: Mapping[str, Step]) -> Step:
    key = _key("task_vectors", name, task_vectors.VERSION, {}, _reads(downloads, "base", name))
    finish = partial(task_vectors.task_vectors, plan.base.folder, plan.experts[name].folder, name)
    return Step(
        "task_vectors",
        name,
        key,
        tuple(key.inputs["reads"].values()),
        finish,
        reads=_weight_bytes(plan.listings["base"]) + _weight_bytes(plan.listings[name]),
        writes=len(plan.base.weights) * 32_000,
    )


def _calibration_settings(task: Task) -> dict[str, Any]:
    """Return what a task says of its samples: not where rows come from, nor how they are batched or scored."""
    dump: dict[str, Any] = task.model_dump(
        exclude={"calibration", "evaluation", "batch_size", "metric", "generate", "answer"}
    )
    return dump


def _sensitivity_step(plan: Plan, name: str, downloads: Mapping[str, Step]) -> Step:
    one = plan.data[name]
    assert not isinstance(one.task, LmEvalTask), "the recipe's schema refuses sens coefficients for it"
    reads = _reads(downloads, "base", name) | {
        "calibration": rows_digest(one.calibration),
        "tokenizer": _tokenizer_digest(plan),
    }
    settings = {"dtype": plan.recipe.dtype} | {"task": _calibration_settings(one.task)}
    finish = partial(
        sensitivity.sensitivity,
        plan.base.folder,
        plan.experts[name].folder,
        name,
        one.task,
        one.calibration,
        plan.tokenizer,
        plan.recipe.dtype,
        _device(plan, "sensitivity"),
    )
    return Step(
        "sensitivity",
        name,
        _key("sensitivity", name, sensitivity.VERSION, settings, reads),
        tuple(_reads(downloads, "base", name).values()),
        finish,
        reads=_weight_bytes(plan.listings["base"]) + _weight_bytes(plan.listings[name]),
    )


def _cross_task_step(plan: Plan, downloads: Mapping[str, Step]) -> Step:
    names = tuple(plan.recipe.experts)
    reads = _reads(downloads, "base", *names) | {
        f"calibration {name}": rows_digest(plan.data[name].calibration) for name in names
    }
    settings = {"dtype": plan.recipe.dtype} | {
        "tasks": {name: _calibration_settings(plan.data[name].task) for name in names},
    }
    calibration = {
        name: cross_task.CalibrationSet(one.task, one.calibration)
        for name, one in plan.data.items()
        if not isinstance(one.task, LmEvalTask)
    }
    finish = partial(
        cross_task.cross_task,
        plan.base.folder,
        {name: plan.experts[name].folder for name in names},
        calibration,
        plan.tokenizer,
        plan.recipe.dtype,
        _device(plan, "cross_task"),
    )
    key = _key("cross_task", "all", cross_task.VERSION, settings, reads | {"tokenizer": _tokenizer_digest(plan)})
    total = sum(_weight_bytes(plan.listings[name]) for name in ("base", *names))
    return Step("cross_task", "all", key, tuple(_reads(downloads, "base", *names).values()), finish, reads=total)


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
    method = METHODS.get(variant.method)
    settings = Settings(
        variant.method,
        normalize=variant.normalize if variant.normalize is not None else (method.normalize if method else True),
        rescale=variant.rescale if variant.rescale is not None else bool(method and method.rescale),
        lambda_=variant.lambda_,
    )
    sens = isinstance(variant.coefficients, SensCoefficients)
    needs = _reads(downloads, "base", *experts) | {f"task_vectors {n}": s.key.fingerprint for n, s in vectors.items()}
    if sens and cross is not None:
        needs |= {f"sensitivity {n}": s.key.fingerprint for n, s in sensitivities.items()}
        needs["cross_task"] = cross.key.fingerprint
    job = merge.MergeJob(
        base=plan.base.folder,
        experts={n: plan.experts[n].folder for n in experts},
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
        groups=merge.layer_groups(plan.base),
    )
    semantic = {
        "method": variant.method,
        "normalize": settings.normalize,
        "rescale": settings.rescale,
        "lambda": settings.lambda_,
        "weight": variant.weight,
        "density": job.densities,
        "seed": variant.seed,
        "coefficients": variant.coefficients.model_dump(),
        "out_dtype": variant.out_dtype,
        "shard_size": variant.shard_size,
        "experts": experts,
    }
    size = sum(merge.plan_merged(plan.base, variant.out_dtype, variant.shard_size).sizes.values())
    return Step(
        "merge",
        name,
        _key("merge", name, merge.VERSION, semantic, needs),
        tuple(needs.values()),
        partial(merge.finish_merge, job, plan.tokenizer),
        tuple(partial(merge.merge_group, job, group) for group in range(len(job.groups))),
        reads=sum(_weight_bytes(listing) for listing in plan.listings.values()) + size,
        writes=size,
    )


def _evaluate_step(
    plan: Plan, model: str, model_step: Step, task_name: str, one: TaskRows, downloads: Mapping[str, Step]
) -> Step:
    adapter = model in plan.experts and plan.experts[model].adapter is not None
    head = task_name if isinstance(one.task, ClassificationTask) and plan.experts[task_name].head else None
    needs = {"model": model_step.key.fingerprint, "base": downloads["base"].key.fingerprint}
    if head:
        needs["head"] = downloads[head].key.fingerprint
    reads = needs | {"evaluation": rows_digest(one.evaluation), "tokenizer": _tokenizer_digest(plan)}
    task_settings = one.task.model_dump(exclude={"calibration", "evaluation", "batch_size", "metric", "loss_on"})
    folder = plan.listings[model].folder if model in plan.listings else plan.store.folder(model_step.key)
    finish = partial(
        evaluate.evaluate,
        evaluate.Subject(
            base=plan.base.folder,
            model=folder,
            is_expert=model in plan.experts,
            head_of=plan.experts[head].folder if head else None,
        ),
        task_name,
        one.task,
        one.evaluation,
        plan.tokenizer,
        plan.recipe.dtype,
        _device(plan, "evaluate"),
    )
    size = _weight_bytes(plan.listings["base"])
    return Step(
        "evaluate",
        f"{model}/{task_name}",
        _key(
            "evaluate",
            f"{model}/{task_name}",
            evaluate.VERSION,
            {"dtype": plan.recipe.dtype} | {"task": task_settings},
            reads,
        ),
        tuple(needs.values()),
        finish,
        reads=size + (_weight_bytes(plan.listings[model]) if adapter else 0),
    )
