"""The steps of a recipe that merges weights: what each reads, and the job that it does."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sensmerge.pipeline.plan import sizes
from sensmerge.pipeline.plan.models import weight_bytes
from sensmerge.pipeline.plan.seen import fingerprint
from sensmerge.pipeline.plan.step import Resolved, Step
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.pipeline.store.store import Key
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.coefficients import SensCoefficients
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.placement import Actors
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.task_vectors import TaskVectorsJob
from sensmerge.tasks.stages.variant import VariantJob
from sensmerge.tasks.stages.written import laid_out


class Layout:
    """Lays out the steps of a recipe that merges weights, one stage after the other."""

    def __init__(self, resolved: Resolved) -> None:
        """Begin with no steps."""
        self.steps: list[Step] = []
        self.makers: dict[str, str] = {}
        self._by_fingerprint: dict[str, Step] = {}
        self._resolved = resolved
        self._recipe = resolved.recipe
        self._inputs = resolved.inputs
        self._made: dict[str, dict[str, Step]] = defaultdict(dict)
        self._base, self._experts = self._inputs.only_weights()

    def inputs(self) -> None:
        """Add what brings the models."""
        for name in self._inputs.listings:
            self.download(name)

    def measures(self) -> None:
        """Add what merges read beside models."""
        if any(one.reads_histograms for one in self._recipe.merges.values()):
            for name in self._recipe.experts:
                self.task_vectors(name)

    def merges(self) -> None:
        """Add the merges."""
        for name in self._recipe.merges:
            self.merge(name)

    def uses(self) -> None:
        """Add what is made of merges: nothing."""

    def download(self, name: str) -> None:
        """Add the download of a model."""
        listing = self._inputs.listings[name]
        size, missing = (sum(file.size for file in files) for files in (listing.files, listing.missing()))
        self._add(name, DownloadJob(listing, self._resolved.store.hub_cache), (), size, missing)

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

    def merge(self, name: str) -> None:
        """Add the merge of a variant."""
        variant = self._recipe.merges[name]
        used, fields = self._read_by(variant)
        if variant.tune:
            used.append(self._made["tune"][name])
            fields["tuned"] = used[-1].artifact(self._resolved.store)
        job, reads, writes = self._merge_job(name, variant, fields)
        try:
            job.check_settings()
            if not isinstance(variant.coefficients, SensCoefficients):  # those come of what earlier stages find
                job.having(job.settings).weights()
        except InputError as error:
            raise InputError(f"merges.{name}: {error}") from None
        self._add(name, job, used, reads, writes)

    def _merge_job(self, name: str, variant: Variant, fields: dict[str, Any]) -> tuple[VariantJob, int, int]:
        """Return the job that merges a variant, and the bytes that it reads and writes."""
        reads = self._weights(*self._inputs.listings)
        if variant.adapter is not None:
            from sensmerge.pipeline.plan.adapters import adapter_job, written_bytes  # transformers takes seconds

            of_adapter = adapter_job(f"merges.{name}", variant, self._inputs, fields)
            return of_adapter, reads, written_bytes(self._inputs, of_adapter)
        job = MergeJob(**fields, out_dtype=variant.out_dtype, device=self._device("merge"))
        writes = sizes.merged_model(self._inputs, variant)
        return job, reads + writes, writes  # read back

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
            "head_configs": {name: one.config for name, one in heads.items()},
            "tokenizer": inputs.tokenizer.folder,
            **laid_out(self._base, variant.out_dtype, variant.shard_size),
        }

    def _add(self, name: str, job: Job, needs: Sequence[Step], reads: int = 0, writes: int = 0) -> None:
        placement = getattr(job, "placement", None)
        actors = placement.count if isinstance(placement, Actors) else 0
        key = self._resolved.store.named(Key.of(name, job))
        step = Step(name, key, tuple(one.title for one in needs), job, reads, writes, actors, self._planned(needs))
        maker = self._by_fingerprint.setdefault(key.fingerprint, step) if self._is_shared(job) else step
        self._made[step.stage][name], self.makers[step.title] = maker, maker.title
        if maker is step:
            self.steps.append(step)

    def _planned(self, needs: Sequence[Step]) -> PlannedModels:
        """Return the models that some steps download."""
        listings = tuple(one.job.listing for one in needs if isinstance(one.job, DownloadJob))
        return PlannedModels(listings, self._resolved.store.hub_cache)

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
