"""The steps of a recipe: which there are, what each reads, and the job that it does."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sensmerge.pipeline.plan import sizes
from sensmerge.pipeline.plan.adapters import adapter_job, written_bytes
from sensmerge.pipeline.plan.idle import without_idle
from sensmerge.pipeline.plan.models import weight_bytes
from sensmerge.pipeline.plan.rows import Split
from sensmerge.pipeline.plan.statistics import wanted_statistics
from sensmerge.pipeline.plan.step import Resolved, Step
from sensmerge.pipeline.plan.vocabulary import fingerprint
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.pipeline.store.store import Key
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.coefficients import SensCoefficients
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.methods.contract import Additive
from sensmerge.tasks.networks.networks import computation_digest
from sensmerge.tasks.networks.placement import Actors
from sensmerge.tasks.stages.calibrate import CalibrateJob
from sensmerge.tasks.stages.cross_task import CrossTaskJob
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.evaluate_dynamic import EvaluateDynamicJob
from sensmerge.tasks.stages.heads import HeadsJob
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.merge_adapter import MergeAdapterJob
from sensmerge.tasks.stages.merge_vectors import MergeVectorsJob
from sensmerge.tasks.stages.route import RouteJob
from sensmerge.tasks.stages.statistics import StatisticsJob
from sensmerge.tasks.stages.task_vectors import TaskVectorsJob
from sensmerge.tasks.stages.tune import TuneJob, TuningScoresJob
from sensmerge.tasks.stages.vectors import VectorsJob
from sensmerge.tasks.stages.written import laid_out


def lay_out(resolved: Resolved) -> tuple[list[Step], dict[str, str]]:
    """Return all steps of a recipe, each after those it needs, and which of them makes what, by title.

    Steps of two variants that would make the same, such as the merge of a static variant and that of a dynamic one on
    top of it, are one step. One that the store has done for a variant of another name is not done again.
    """
    recipe, layout = resolved.recipe, _Layout(resolved)
    for name in resolved.inputs.listings:
        layout.download(name)
    for name, job in resolved.inputs.tokenizer.made_heads.items():
        layout.heads(name, job)
    if any(one.reads_histograms for one in recipe.merges.values()):
        for name in recipe.experts:
            layout.task_vectors(name)
    if wanted_statistics(recipe):
        for name in recipe.experts:
            layout.statistics(name)
    if recipe.sens_variants():
        layout.cross_task()
    for name in recipe.tuned_variants():
        layout.tune(name)
    for name in recipe.merges:
        layout.merge(name)
    for name in recipe.calibrated_variants():
        layout.calibrate(name)
    for name in recipe.se_variants():
        if recipe.merges[name].origin == "static":
            layout.vectors(name)
        layout.route(name)
    static = [name for name in recipe.merges if name not in recipe.se_variants()]
    scored = [name for name, one in resolved.inputs.data.items() if one.task.is_scored]
    for model in (*resolved.inputs.listings, *static):
        for task in scored:
            layout.evaluate(model, task)
    if any(one.evaluation for one in resolved.inputs.data.values()):
        for name in recipe.se_variants():
            layout.evaluate_dynamic(name)
    return without_idle(layout.steps, resolved.store), layout.makers


class _Layout:
    """Lays steps out, one stage after the other."""

    def __init__(self, resolved: Resolved) -> None:
        self.steps: list[Step] = []
        self.makers: dict[str, str] = {}
        self._by_fingerprint: dict[str, Step] = {}
        self._resolved, self._recipe, self._inputs = resolved, resolved.recipe, resolved.inputs
        self._made: dict[str, dict[str, Step]] = defaultdict(dict)
        self._base, self._experts = self._inputs.only_weights()

    def download(self, name: str) -> None:
        """Add the download of a model."""
        listing = self._inputs.listings[name]
        size, missing = (sum(file.size for file in files) for files in (listing.files, listing.missing()))
        self._add(name, DownloadJob(listing, self._resolved.store.hub_cache), (), size, missing)

    def heads(self, name: str, job: HeadsJob) -> None:
        """Add the head of an expert that has none."""
        tower, writes = self._made["download"][job.tower], sizes.made_head(self._inputs, name)
        self._add(name, job, [tower], self._weights(job.tower), writes)

    def task_vectors(self, name: str) -> None:
        """Add what is counted of the task vector of an expert."""
        job = TaskVectorsJob(
            base=self._model("base").fingerprint,
            expert=self._model(name).fingerprint,
            untied=bool(self._inputs.base.untied),
            name=name,
            weights=self._experts[name],
            groups=layer_groups(self._base),
        )
        self._add(name, job, self._downloads("base", name), self._weights("base", name), sizes.task_vector(self._base))

    def statistics(self, name: str) -> None:
        """Add what is measured on an expert's calibration set."""
        measured = wanted_statistics(self._recipe)
        job = StatisticsJob(
            base=self._model("base"),
            expert=self._model(name),
            base_config=self._inputs.networks.experts[name].base_config,
            statistics=measured,
            calibration=self._resolved.calibration(name),
            tokenizer=self._inputs.tokenizer.of(name),
            dtype=self._recipe.dtype,
            name=name,
            device=self._device("statistics"),
            placement=self._resolved.placements["statistics"].placement,
        )
        writes = sizes.statistics(self._resolved, measured, self._inputs.data[name].calibration_tokens)
        self._add(name, job, self._downloads("base", name), sizes.networks(self._inputs, name), writes)

    def cross_task(self) -> None:
        """Add the distances of all experts."""
        experts = self._inputs.networks.experts
        job = CrossTaskJob(
            base=self._model("base"),
            experts={name: self._model(name) for name in experts},
            base_config={name for name, one in experts.items() if one.base_config},
            calibration={name: self._resolved.calibration(name) for name in experts},
            tokenizer=self._inputs.tokenizer.of_all(experts),
            dtype=self._recipe.dtype,
            heads={name: computation_digest(one.config) for name, one in experts.items()},
            device=self._device("cross_task"),
            placement=self._resolved.placements["cross_task"].placement,
        )
        reads = sizes.networks(self._inputs, *experts)
        self._add("all", job, self._downloads("base", *experts), reads, sizes.kept_trunks(self._resolved))

    def tune(self, name: str) -> None:
        """Add the choice of a variant's settings, and the scores of the experts on the same rows."""
        variant = self._recipe.merges[name]
        used, fields = self._read_by(variant)
        tuning = self._resolved.row_sets(variant.tuning_split)
        scores = {task: self._tuning_scores(task, variant.tuning_split) for task in tuning}
        job = TuneJob(
            **fields | {"shard_size": 0, "layout": None},
            grid=variant.grid(),
            default=variant.default(),
            tuning=tuning,
            unanswered=[task for task in tuning if self._inputs.data[task].unanswered],
            metrics={task: one.task.metric for task, one in tuning.items()},
            depends={task: one.task.depends_on() for task, one in tuning.items()},
            own={task: step.artifact(self._resolved.store) for task, step in scores.items()},
            dtype=self._recipe.dtype,
            device=self._device("tune"),
        )
        self._add(name, job, [*used, *scores.values()], self._weights(*self._inputs.listings))

    def _tuning_scores(self, task: str, split: Split) -> Step:
        """Return the scores of a task's own expert on the rows that variants are tuned on; added once."""
        one, made = self._inputs.data[task], self._made["tune"]
        name = task if split == "tuning" or one.held_out == one.tuning else f"{task}/{split}"
        if name not in made:
            self._add(name, *self._scoring(TuningScoresJob, task, task, split))
        return made[name]

    def merge(self, name: str) -> None:
        """Add the merge of a variant."""
        variant = self._recipe.merges[name]
        used, fields = self._read_by(variant)
        if variant.tune:
            used.append(self._made["tune"][name])
            fields["tuned"] = used[-1].artifact(self._resolved.store)
        reads = self._weights(*self._inputs.listings)
        job: MergeJob | MergeVectorsJob | MergeAdapterJob
        # Which weights a variant is made of does not depend on how samples are routed.
        if variant.origin == "base":
            job = MergeVectorsJob(**fields)
            writes = sizes.dynamic_model(self._inputs, job)
        elif variant.adapter is not None:
            job = adapter_job(f"merges.{name}", variant, self._inputs, fields)
            writes = written_bytes(self._inputs, job)
        else:
            job = MergeJob(**fields, out_dtype=variant.out_dtype, device=self._device("merge"))
            writes = sizes.merged_model(self._inputs, variant)
            reads += writes  # read back
        try:
            job.check_settings()
            if not isinstance(variant.coefficients, SensCoefficients):  # those come of what earlier stages find
                job.having(job.settings).weights()
        except InputError as error:
            raise InputError(f"merges.{name}: {error}") from None
        self._add(name, job, used, reads, writes)

    def _read_by(self, variant: Variant) -> tuple[list[Step], dict[str, Any]]:
        """Return the steps that a variant's weights are made from, and the fields of its `VariantJob`."""
        used: dict[str, Mapping[str, Step]] = {"download": self._made["download"], "heads": self._made["heads"]}
        used["task_vectors"] = self._made["task_vectors"] if variant.reads_histograms else {}
        sens = isinstance(variant.coefficients, SensCoefficients)
        used["statistics"] = self._made["statistics"] if sens or variant.method.statistics else {}
        used["cross_task"] = self._made["cross_task"] if sens else {}
        store = self._resolved.store
        artifacts = {stage: {one: step.artifact(store) for one, step in steps.items()} for stage, steps in used.items()}
        return [step for steps in used.values() for step in steps.values()], self._variant_fields(variant, artifacts)

    def _variant_fields(self, variant: Variant, artifacts: Mapping[str, Mapping[str, Artifact]]) -> dict[str, Any]:
        """Return the fields of a `VariantJob`; `artifacts` are those that it reads, by stage and name."""
        inputs, heads = self._inputs, self._inputs.heads
        return {
            "models": {name: one.fingerprint for name, one in artifacts["download"].items()},
            "task_vectors": artifacts["task_vectors"],
            "method": variant.method,
            "weight": variant.weight,
            "coefficients": variant.coefficients,
            "lines": variant.lines,
            "varying": variant.varying,
            "statistics": artifacts["statistics"],
            "distances": artifacts["cross_task"].get("all"),
            "companions": inputs.tokenizer.companions_digest,
            "token_ids": inputs.tokenizer.token_ids,
            "classes": inputs.classes,
            "by_name": inputs.by_name,
            "base_config": [name for name, one in heads.items() if one.base_config],
            "base": self._base,
            "experts": self._experts,
            "head_configs": inputs.head_configs,
            "tokenizer": inputs.tokenizer.folder,
            **laid_out(self._base, variant.out_dtype, variant.shard_size),
        }

    def calibrate(self, name: str) -> None:
        """Add the calibration of a merged variant."""
        experts, settings = self._inputs.networks.experts, self._recipe.merges[name].calibrate
        merged = self._made["merge"][name]
        assert settings is not None
        assert isinstance(merged.job, MergeJob), "the recipe's schema refuses application se from the base"
        job = CalibrateJob(
            merged=merged.artifact(self._resolved.store),
            base=self._model("base"),
            experts={one: self._model(one) for one in experts},
            base_config={one for one, expert in experts.items() if expert.base_config},
            calibration={one: self._resolved.calibration(one) for one in experts},
            tokenizer=self._inputs.tokenizer.of_all(experts),
            settings=settings,
            dtype=self._recipe.dtype,
            merge=merged.job,
            name=name,
            device=self._device("calibrate"),
        )
        writes = merged.writes + sizes.travelling_states(self._resolved)
        self._add(name, job, [merged, *self._downloads("base", *experts)], merged.reads + 2 * merged.writes, writes)

    def vectors(self, name: str) -> None:
        """Add what leads from the static merge of a dynamic variant to its experts."""
        variant = self._recipe.merges[name]
        merged = self._made[variant.last_static_stage][name]
        job = VectorsJob(
            static=merged.artifact(self._resolved.store),
            models={one: self._model(one).fingerprint for one in ("base", *self._experts)},
            base=self._base,
            experts=self._experts,
            groups=layer_groups(self._base),
        )
        reads = self._weights("base", *self._experts) + len(self._experts) * merged.writes
        writes = sizes.vectors(self._inputs, variant)  # the merge itself is linked
        self._add(name, job, [merged, *self._downloads("base", *self._experts)], reads, writes)

    def route(self, name: str) -> None:
        """Add the route of a dynamic variant."""
        variant = self._recipe.merges[name]
        assert isinstance(variant.application, SeApplication)
        assert variant.origin is not None
        model = self._made["merge" if variant.origin == "base" else "vectors"][name]
        calibration, static = self._resolved.row_sets("calibration"), 0.0
        if variant.origin == "base":
            assert isinstance(variant.method, Additive), "the recipe's schema refuses other methods"
            static = variant.method.static_coefficient(variant.weight, len(calibration))
        job = RouteJob(
            model=model.artifact(self._resolved.store),
            calibration=calibration,
            application=variant.application,
            static=static,
            dtype=self._recipe.dtype,
            device=self._device("route"),
            origin=variant.origin,
        )
        self._add(name, job, [model], reads=model.writes)  # the model's files are linked, not written again

    def evaluate(self, model: str, task: str) -> None:
        """Add the scores of a model on a task."""
        self._add(f"{model}/{task}", *self._scoring(EvaluateJob, model, task, "evaluation"))

    def _scoring(
        self, kind: type[EvaluateJob], model: str, task: str, split: Split
    ) -> tuple[EvaluateJob, list[Step], int]:
        """Return the job that scores a model on the rows of a task, the steps that it needs, and the bytes it reads."""
        experts, one, merges = self._inputs.networks.experts, self._inputs.data[task], self._recipe.merges
        is_input, reads = model in self._inputs.listings, self._inputs.tokenizer
        head = task if one.task.has_own_head and experts[task].head else None
        config = None
        is_apart = is_input and model != head and task not in self._resolved.inseparable
        if head and is_apart and not experts[head].has_trunk_in_head():
            # This model stays what it is when the task's expert changes, of which it only takes the head.
            config = computation_digest(experts[head].config)
        made = self._made["download"].get(model) or self._made[self._recipe.merges[model].last_stage][model]
        job = kind(
            base=self._model("base"),
            model=self._as_run(model) if is_input else made.artifact(self._resolved.store),
            head=self._as_run(head) if head else None,
            tokenizer=reads.of(task) if is_input and isinstance(one.task, RowTask) else reads.artifact,
            task=self._resolved.task(one, split),
            rows=self._resolved.rows(task, split),
            labels=self._resolved.labels(task, one),
            dtype=self._recipe.dtype,
            depends=one.task.depends_on(),
            name=task,
            is_expert=model in experts or (model in merges and merges[model].adapter is not None),
            device=self._device("tune" if kind is TuningScoresJob else "evaluate"),
            head_config=config,
            base_config=tuple(expert.folder for expert in experts.values() if expert.base_config),
        )
        adapters = [model] if model in experts and experts[model].is_adapter else []
        return job, [made, *self._downloads("base", *([head] if head else []))], self._weights("base", *adapters)

    def evaluate_dynamic(self, name: str) -> None:
        """Add the scores of a dynamic variant on all tasks."""
        routed, data = self._made["route"][name], self._inputs.data
        evaluation = {task: one for task, one in self._resolved.row_sets("evaluation").items() if data[task].evaluation}
        job = EvaluateDynamicJob(
            model=routed.artifact(self._resolved.store),
            evaluation=evaluation,
            depends={task: one.task.depends_on() for task, one in evaluation.items()},
            device=self._device("evaluate"),
        )
        self._add(name, job, [routed], reads=routed.reads)

    def _add(self, name: str, job: Job, needs: Sequence[Step], reads: int = 0, writes: int = 0) -> None:
        placement = getattr(job, "placement", None)
        actors = placement.count if isinstance(placement, Actors) else 0
        listings = tuple(one.job.listing for one in needs if isinstance(one.job, DownloadJob))
        models = PlannedModels(listings, self._resolved.store.hub_cache)
        if isinstance(job, StatisticsJob | CrossTaskJob | EvaluateJob):
            job = replace(job, planned=models)
        key = self._resolved.store.named(Key.of(name, job))
        step = Step(name, key, tuple(one.title for one in needs), job, reads, writes, actors, models)
        maker = self._by_fingerprint.setdefault(key.fingerprint, step) if self._is_shared(job) else step
        self._made[step.stage][name], self.makers[step.title] = maker, maker.title
        if maker is step:
            self.steps.append(step)

    def _is_shared(self, job: Job) -> bool:
        """Return whether a step with the same fingerprint would make the same.

        Models of the same content lie in folders of their own, and of weights that nobody has read the content is not
        known.
        """
        return not isinstance(job, DownloadJob) and not any(one.unhashed() for one in self._inputs.listings.values())

    def _model(self, name: str) -> Artifact:
        """Return base or an expert, where its files are, or what stands for it in the vocabulary of merged models."""
        prints = {one: step.key.fingerprint for one, step in self._made["download"].items()}
        seen = self._inputs.tokenizer.seen.get(name)
        folder = self._inputs.listings[name].folder if seen is None else seen.folder
        return Artifact(fingerprint(prints[name], seen, prints), folder)

    def _as_run(self, name: str) -> Artifact:
        """Return base or an expert as it runs: its files, and whose settings it runs with."""
        files, expert = self._model(name), self._inputs.networks.experts.get(name)
        adopted = " with the base's config" if expert is not None and expert.base_config else ""
        return Artifact(f"{files.fingerprint}{adopted}", files.folder)

    def _downloads(self, *names: str) -> list[Step]:
        """Return the downloads of models, and of those that they have rows from, and what makes heads for them."""
        seen = self._inputs.tokenizer.seen
        needed = dict.fromkeys([*names, *(one for name in names if name in seen for one in seen[name].donors)])
        return [made[name] for made in (self._made["download"], self._made["heads"]) for name in needed if name in made]

    def _weights(self, *names: str) -> int:
        """Return the size of the weights of models."""
        return sum(weight_bytes(self._inputs.listings[name]) for name in names)

    def _device(self, stage: Stage) -> str:
        return "cuda" if self._recipe.resources_of(stage).num_gpus else "cpu"
