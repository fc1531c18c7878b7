"""The steps of a recipe with tasks: those that run networks."""

from typing import Any

from sensmerge.pipeline.plan import network_sizes, sizes
from sensmerge.pipeline.plan.layout import Layout
from sensmerge.pipeline.plan.statistics import wanted_statistics
from sensmerge.pipeline.plan.step import Split, Step
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.methods.contract import Additive
from sensmerge.tasks.networks.networks import computation_digest
from sensmerge.tasks.stages.calibrate import CalibrateJob
from sensmerge.tasks.stages.calibration import CalibrationSet
from sensmerge.tasks.stages.cross_task import CrossTaskJob
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.evaluate_dynamic import EvaluateDynamicJob
from sensmerge.tasks.stages.heads import HeadsJob
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.merge_vectors import MergeVectorsJob
from sensmerge.tasks.stages.route import RouteJob
from sensmerge.tasks.stages.statistics import StatisticsJob
from sensmerge.tasks.stages.tune import TuneJob, TuningScoresJob
from sensmerge.tasks.stages.variant import VariantJob
from sensmerge.tasks.stages.vectors import VectorsJob


class NetworkLayout(Layout):
    """Lays out the steps of a recipe with tasks."""

    def inputs(self) -> None:
        """Add what brings the models, and what makes heads for experts that lack them."""
        super().inputs()
        for name, job in self._inputs.tokenizer.made_heads.items():
            self.heads(name, job)

    def measures(self) -> None:
        """Add what merges read beside models."""
        super().measures()
        if wanted_statistics(self._recipe):
            for name in self._recipe.experts:
                self.statistics(name)
        if self._recipe.sens_variants():
            self.cross_task()
        for name in self._recipe.tuned_variants():
            self.tune(name)

    def uses(self) -> None:
        """Add what is made of merges: calibrations, dynamic models, scores."""
        recipe, data = self._recipe, self._inputs.data
        for name in recipe.calibrated_variants():
            self.calibrate(name)
        for name in recipe.se_variants():
            if recipe.merges[name].origin == "static":
                self.vectors(name)
            self.route(name)
        static = [name for name in recipe.merges if name not in recipe.se_variants()]
        scored = [name for name, one in data.items() if one.task.is_scored]
        for model in (*self._inputs.listings, *static):
            for task in scored:
                self.evaluate(model, task)
        if any(one.evaluation for one in data.values()):
            for name in recipe.se_variants():
                self.evaluate_dynamic(name)

    def heads(self, name: str, job: HeadsJob) -> None:
        """Add the head of an expert that has none."""
        tower, writes = self._made["download"][job.tower], network_sizes.made_head(self._inputs, name)
        self._add(name, job, [tower], self._weights(job.tower), writes)

    def statistics(self, name: str) -> None:
        """Add what is measured on an expert's calibration set."""
        measured, downloads = wanted_statistics(self._recipe), self._downloads("base", name)
        job = StatisticsJob(
            base=self._model("base"),
            expert=self._model(name),
            base_config=self._inputs.networks.experts[name].base_config,
            statistics=measured,
            calibration=self._calibration(name),
            tokenizer=self._inputs.tokenizer.of(name),
            dtype=self._recipe.dtype,
            name=name,
            device=self._device("statistics"),
            placement=self._resolved.placements["statistics"].placement,
            planned=self._planned(downloads),
        )
        writes = network_sizes.statistics(self._resolved, measured, self._inputs.data[name].calibration_tokens)
        self._add(name, job, downloads, network_sizes.networks(self._inputs, name), writes)

    def cross_task(self) -> None:
        """Add the distances of all experts."""
        experts = self._inputs.networks.experts
        downloads = self._downloads("base", *experts)
        job = CrossTaskJob(
            base=self._model("base"),
            experts={name: self._model(name) for name in experts},
            base_config={name for name, one in experts.items() if one.base_config},
            calibration={name: self._calibration(name) for name in experts},
            tokenizer=self._inputs.tokenizer.of_all(experts),
            dtype=self._recipe.dtype,
            heads={name: computation_digest(one.config) for name, one in experts.items()},
            device=self._device("cross_task"),
            placement=self._resolved.placements["cross_task"].placement,
            planned=self._planned(downloads),
        )
        reads = network_sizes.networks(self._inputs, *experts)
        self._add("all", job, downloads, reads, network_sizes.kept_trunks(self._resolved))

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

    def _merge_job(self, name: str, variant: Variant, fields: dict[str, Any]) -> tuple[VariantJob, int, int]:
        """Return the job that merges a variant, and the bytes that it reads and writes."""
        # Which weights a variant is made of does not depend on how samples are routed.
        if variant.origin != "base":
            return super()._merge_job(name, variant, fields)
        job = MergeVectorsJob(**fields)
        return job, self._weights(*self._inputs.listings), network_sizes.dynamic_model(self._inputs, job)

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
            calibration={one: self._calibration(one) for one in experts},
            tokenizer=self._inputs.tokenizer.of_all(experts),
            settings=settings,
            dtype=self._recipe.dtype,
            merge=merged.job,
            name=name,
            device=self._device("calibrate"),
        )
        writes = merged.writes + network_sizes.travelling_states(self._resolved)
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
        needs = [made, *self._downloads("base", *([head] if head else []))]
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
            planned=self._planned(needs),
        )
        adapters = [model] if model in experts and experts[model].is_adapter else []
        return job, needs, self._weights("base", *adapters)

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

    def _as_run(self, name: str) -> Artifact:
        """Return base or an expert as it runs: its files, and whose settings it runs with."""
        files, expert = self._model(name), self._inputs.networks.experts.get(name)
        adopted = " with the base's config" if expert is not None and expert.base_config else ""
        return Artifact(f"{files.fingerprint}{adopted}", files.folder)

    def _calibration(self, name: str) -> CalibrationSet:
        """Return what an expert is measured on."""
        task = self._inputs.data[name].task
        assert isinstance(task, RowTask), "the recipe's schema refuses statistics of other tasks"
        return CalibrationSet(task, self._resolved.rows(name, "calibration"))
