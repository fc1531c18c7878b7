"""The schema of recipes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    field_validator,
    model_validator,
)

from sensmerge.pipeline.recipe.gate import MEAN_NORMALISED, Gate
from sensmerge.pipeline.recipe.kinds import AnyTask
from sensmerge.pipeline.recipe.resources import ActorPlacement, Resources
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.recipe.sweep import BEST, Swept, expanded, sweeps_of
from sensmerge.pipeline.recipe.tokenizer import TokenizerSettings
from sensmerge.pipeline.recipe.variant import Dtype, Variant
from sensmerge.tasks.coefficients import (
    ExplicitCoefficients,
    SensCoefficients,
)
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.methods.contract import METHODS
from sensmerge.tasks.methods.settings import WEIGHT
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.strict import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Two of them name a folder of the store."""


class ModelFiles(Strict):
    """A model and what of its files is read; where only `model` is given, its text may stand for the mapping."""

    model: str = Field(
        min_length=1,
        description="local folder, hub:ORG/NAME@REVISION or URL; a checkpoint or, of an expert, a LoRA adapter",
    )
    subfolder: str = Field(
        "",
        description="folder inside it that holds the model, such as unet; of a model on the hub, only that folder is "
        "downloaded",
    )
    dequantize: bool = Field(
        False, description="fp8 weights are multiplied by their scales, and read as bfloat16; only without tasks"
    )


def _as_mapping(value: Any) -> Any:
    """Return the mapping that a text stands for, which is a model and no more."""
    if isinstance(value, str) and value:
        return {"model": value}
    if isinstance(value, dict | ModelFiles):
        return value
    raise ValueError("expected a text of at least 1 character, or a mapping with model")


def _as_text(value: ModelFiles, dump: SerializerFunctionWrapHandler) -> Any:
    """Return a model as a recipe says it in the fewest words."""
    return value.model if value.model_fields_set == {"model"} else dump(value)


BaseModelFiles = Annotated[
    ModelFiles,
    BeforeValidator(_as_mapping, json_schema_input_type=Annotated[str, Field(min_length=1)] | ModelFiles),
    WrapSerializer(_as_text),
]


class ExpertModel(ModelFiles):
    """One expert."""

    config: Literal["own", "base"] = Field(
        "own",
        description="settings that the expert runs with (rotary positions, activation, window, …): own: its own, which "
        "must equal the base's; base: the base's",
    )


class Recipe(Strict):
    """A base, its experts, the tasks that judge them, and the merges to make."""

    name: Name = Field(description="name of the recipe, its MLflow experiment and its registered model")
    base: BaseModelFiles = Field(
        description="the model that all experts were fine-tuned from: local folder, hub:ORG/NAME@REVISION or URL",
    )
    experts: dict[Name, ExpertModel] = Field(description="the experts, by name")
    tasks: dict[Name, AnyTask] = Field({}, description="the task of each expert, under the expert's name")
    tokenizer: TokenizerSettings = Field(
        TokenizerSettings.model_validate({}), description="where the tokenizer of merged models comes from"
    )
    merges: dict[Name, Variant] = Field(min_length=1, description="the merges to make (variants), by name")
    dtype: Dtype = Field("float32", description="dtype in which networks run")
    resources: dict[Stage, Resources] = Field({}, description="resources for the steps of each stage")
    placement: Literal["auto", "whole", "streamed"] | ActorPlacement = Field(
        "auto",
        description="how networks run in the stages statistics and cross_task. whole: on one worker; streamed: block "
        "by block on one worker; {actors: N}: with the blocks on N workers; auto: whole if a worker has the memory, "
        "otherwise streamed",
    )

    gate: Gate = Field(Gate.model_validate({}), description="how `refresh` chooses the champion")

    _sweeps: dict[str, Swept] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _expand_sweeps(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict) or "merges" not in data:
            return handler(data)
        recipe = handler(data | {"merges": expanded(data["merges"])})
        recipe._sweeps = sweeps_of(data["merges"])
        return recipe

    @property
    def sweeps(self) -> Mapping[str, Swept]:
        """The sweeps of the recipe as it was written, by entry of its merges."""
        return self._sweeps

    def disposable(self) -> dict[str, str]:
        """Return the static variants whose weights go if another one of their sweep is better, with its entry."""
        return {
            member: name
            for name, sweep in self._sweeps.items()
            for member in sweep.members
            if sweep.keep == BEST and self.merges[member].origin is None
        }

    @field_validator("tasks", "resources", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("resources", mode="before")
    @classmethod
    def _renamed_stage(cls, value: Any) -> Any:
        if isinstance(value, dict) and "sensitivity" in value:
            raise ValueError("the stage sensitivity is now called statistics; write resources.statistics")
        return value

    @field_validator("placement", mode="before")
    @classmethod
    def _known_placement(cls, value: Any) -> Any:
        count = value["actors"] if isinstance(value, dict) and set(value) == {"actors"} else None
        if value in ("auto", "whole", "streamed") or (isinstance(count, int) and count >= 1):
            return value
        found = f" (found {value})" if isinstance(value, dict) else ""
        raise ValueError(f"expected auto, whole, streamed or {{actors: N}}, N at least 1{found}")

    @field_validator("experts")
    @classmethod
    def _enough_experts(cls, experts: dict[str, ExpertModel]) -> dict[str, ExpertModel]:
        if not experts:
            raise ValueError("found 0; expected at least one expert")
        return experts

    @model_validator(mode="after")
    def _check_counts(self) -> "Recipe":
        for name, variant in self.merges.items():
            try:
                variant.method.check_experts(len(self.experts))
            except ValueError as error:
                raise ValueError(
                    f"experts: {error} by method {variant.method.name} (merges.{name}); use another method, or a "
                    "recipe of its own for it"
                ) from None
        return self

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        names = ["base", *self.experts, *self.merges]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is used twice among base, experts and merges; give each its own")
        models: dict[tuple[str, str], str] = {}
        for name, expert in self.experts.items():
            place = (expert.model, expert.subfolder)
            if place in models:
                raise ValueError(f"experts {models[place]} and {name} are the same model {expert.model}")
            models[place] = name
        for stage in ("download", "heads", "task_vectors", "vectors"):
            if self.resources_of(stage).num_gpus:
                raise ValueError(f"resources.{stage}.num_gpus: the stage uses no GPU; leave it out")
        for name, task in self.tasks.items():
            if not (task.has_calibration or task.has_tuning or task.is_scored):
                raise ValueError(f"tasks.{name}: has neither calibration nor evaluation; add one or leave the task out")
            if name not in self.experts:
                raise ValueError(
                    f"tasks.{name}: there is no expert of that name (experts: {', '.join(self.experts)}); a task and "
                    "its expert share a name"
                )
        self._check_reads()
        for name, variant in self.merges.items():
            self._check_variant(f"merges.{name}", variant)
        self._check_gate()
        self.tokenizer.check(["base", *self.experts])
        return self

    def _check_reads(self) -> None:
        if len({task.reads for task in self.tasks.values()}) > 1:
            found = ", ".join(f"{name} {task.reads}" for name, task in self.tasks.items())
            raise ValueError(f"tasks: a network reads texts or pictures, found both: {found}; make two recipes of it")

    def _check_gate(self) -> None:
        for name in self.gate.variants or ():
            if name not in self.merges:
                raise ValueError(f"gate.variants: found {name}; expected some of {', '.join(self.merges)}")
        task, _, metric = self.gate.metric.partition("/")
        if self.gate.metric != MEAN_NORMALISED and not (metric and task in self.tasks):
            raise ValueError(
                f"gate.metric: found {self.gate.metric}; expected {MEAN_NORMALISED} or TASK/METRIC with one of the "
                f"tasks {', '.join(self.tasks) or '(none)'}"
            )

    def _check_variant(self, key: str, variant: Variant) -> None:
        settings = variant.method.for_each_expert()
        if isinstance(variant.coefficients, ExplicitCoefficients):
            settings["coefficients.weights"] = variant.coefficients.weights
        for setting, value in settings.items():
            if set(value) != set(self.experts):
                raise ValueError(
                    f"{key}.{setting}: found {', '.join(sorted(value))}; expected every expert once: "
                    f"{', '.join(sorted(self.experts))}"
                )
        if self.resources_of("merge").num_gpus:
            self._check_gpu(key, variant)
        if variant.method.statistics:
            self._check_calibration(f"{key}: method {variant.method.name}")
        if variant.calibrate is not None:
            self._check_calibration(f"{key}: calibrate")
        if isinstance(variant.coefficients, SensCoefficients):
            self._check_comparable(f"{key}: coefficients sens")
        if isinstance(variant.application, SeApplication):
            self._check_comparable(f"{key}: application se")
        if variant.tune:
            self._check_tuning(key)
        try:
            for weight in variant.grid().get(WEIGHT, [variant.weight]):
                weights = self._weights_of_all_layers(variant, weight)
                if weights is not None:
                    variant.method.check_weights(weights)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None

    def _check_gpu(self, key: str, variant: Variant) -> None:
        """Refuse a merge that a GPU would not give the same bits of; its weights would depend on where it is made."""
        method = variant.method.name
        if variant.adapter is not None:
            raise ValueError(f"{key}.adapter: adapters are not merged on a GPU; leave resources.merge.num_gpus out")
        if variant.origin == "base":
            raise ValueError(
                f"{key}: application se from the base is not merged on a GPU; leave resources.merge.num_gpus out, or "
                "set application.origin: static"
            )
        if "cuda" not in variant.method.devices:
            others = ", ".join(name for name, one in METHODS.items() if "cuda" in one.devices)
            raise ValueError(
                f"{key}: method {method} does not give the same bits on a GPU as on a CPU; leave "
                f"resources.merge.num_gpus out, or merge it by a recipe of its own (methods that run on one: {others})"
            )

    def _check_tuning(self, key: str) -> None:
        for name in self.experts:
            task = self.tasks.get(name)
            if task is None or not (task.has_calibration or task.has_tuning):
                raise ValueError(f"{key}.tune needs tasks.{name}.tuning, or calibration to hold rows out of; add it")

    def _check_calibration(self, what: str) -> None:
        for name in self.experts:
            task = self.tasks.get(name)
            if task is None or not task.has_calibration:
                raise ValueError(f"{what} needs tasks.{name}.calibration; add it")

    def _check_comparable(self, what: str) -> None:
        if len(self.experts) < 2:
            raise ValueError(f"{what} compares experts, and there is one; leave it out, or add another expert")
        self._check_calibration(what)
        if len({task.head for task in self.tasks.values()}) > 1:
            kinds = {name: task.kind for name, task in self.tasks.items()}
            raise ValueError(f"{what} cannot compare classifiers with other kinds: {kinds}")

    def _weights_of_all_layers(self, variant: Variant, weight: float) -> list[float] | None:
        """Return the experts' weights (with sens coefficients, their mean); None if they differ from layer to layer."""
        numbers: list[float] = [1.0] * len(self.experts)
        if isinstance(variant.coefficients, ExplicitCoefficients):
            numbers = [
                number for number in variant.coefficients.weights.values() if not isinstance(number, dict | list)
            ]
        return [number * weight for number in numbers] if len(numbers) == len(self.experts) else None

    @property
    def reads(self) -> Reads:
        """What the networks of the recipe's tasks read."""
        return next((task.reads for task in self.tasks.values()), "texts")

    def models(self) -> dict[str, ModelFiles]:
        """Return base and experts by name."""
        return {"base": self.base, **self.experts}

    def resources_of(self, stage: Stage) -> Resources:
        """Return the resources of a stage's steps."""
        return self.resources.get(stage) or Resources.model_validate({})

    def se_variants(self) -> list[str]:
        """Return the names of the variants with application se."""
        return [name for name, variant in self.merges.items() if isinstance(variant.application, SeApplication)]

    def tuned_variants(self) -> list[str]:
        """Return the names of the variants with something left to choose."""
        return [name for name, variant in self.merges.items() if variant.tune]

    def calibrated_variants(self) -> list[str]:
        """Return the names of the variants that are calibrated."""
        return [name for name, variant in self.merges.items() if variant.calibrate is not None]

    def sens_variants(self) -> list[str]:
        """Return the names of the variants with sens coefficients."""
        return [name for name, variant in self.merges.items() if isinstance(variant.coefficients, SensCoefficients)]
