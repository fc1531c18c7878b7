"""The schema of recipes."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    InstanceOf,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sensmerge.pipeline.recipe.gate import MEAN_NORMALISED, Gate
from sensmerge.pipeline.recipe.kinds import AnyTask
from sensmerge.pipeline.recipe.methods import method_properties
from sensmerge.pipeline.recipe.resources import ActorPlacement, Resources
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.recipe.tuning import Tune, Weight, check_tune, grid_of, with_auto_weight
from sensmerge.tasks.coefficients import (
    Coefficients,
    ExplicitCoefficients,
    Lines,
    SensCoefficients,
    UniformCoefficients,
)
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.features import CalibrationSettings
from sensmerge.tasks.methods.contract import Additive, Method, keys_of, method_of
from sensmerge.tasks.methods.settings import LARGEST_WEIGHT, WEIGHT, Values, VariantSettings
from sensmerge.tasks.strict import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Dtype = Literal["float32", "bfloat16", "float16"]


class ExpertModel(Strict):
    """One expert."""

    model: str = Field(
        min_length=1, description="local folder or hub:ORG/NAME@REVISION; a checkpoint or a PEFT LoRA adapter"
    )
    config: Literal["own", "base"] = Field(
        "own",
        description="settings that the expert runs with (rotary positions, activation, window, …): own: its own, which "
        "must equal the base's; base: the base's",
    )


class StaticApplication(Strict):
    """One set of weights for all inputs."""

    kind: Literal["static"] = "static"


Application = Annotated[StaticApplication | SeApplication, Field(discriminator="kind")]


class Variant(Strict):
    """One merge: a method with its settings, its coefficients, and how they are applied.

    In a recipe, the method's name and settings are written beside the other keys. Those of linear, task_arithmetic,
    ties, dare_linear and dare_ties match mergekit 0.1.5.
    """

    method: SerializeAsAny[InstanceOf[Method]]
    weight: Weight = Field(
        1.0,
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
        description="λ: weight of every expert; explicit and sens coefficients multiply it; auto: it is tuned",
    )
    coefficients: Coefficients = Field(UniformCoefficients(), description="how much of each expert, in each layer")
    lines: Lines | None = Field(None, description="factor on all weights that grows from the first block to the last")
    application: Application = Field(
        StaticApplication(), description="one set of weights for all inputs, or coefficients for each input sample"
    )
    tune: Tune = Field(
        {},
        description="settings that are chosen by the tasks' own metrics on rows held out for it, and the values to "
        "try: weight (auto: those that are usual for the method), numbers of the method, temperature (sens). A value "
        "that the recipe gives such a setting elsewhere stays unless another is better beyond the 95 % interval",
    )
    calibrate: CalibrationSettings = Field(
        None,
        description="fit the merged weights, block after block, to the experts' features on their calibration sets; "
        "{} for the defaults; left out: no such step",
    )
    out_dtype: Dtype | None = Field(None, description="dtype of the merged weights; the base's if left out")
    shard_size: int = Field(5_000_000_000, ge=1, description="maximum size of a file of the merged model, in bytes")

    @model_validator(mode="before")
    @classmethod
    def _auto_weight(cls, data: Any) -> Any:
        return with_auto_weight(data)

    @model_validator(mode="before")
    @classmethod
    def _gather_method(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "method" not in data or isinstance(data["method"], Method):
            return data
        own = {key: value for key, value in data.items() if key in cls.model_fields and key != "method"}
        method = method_of({key: value for key, value in data.items() if key not in own})
        for key in keys_of(type(method)).keys() & cls.model_fields.keys():
            raise TypeError(f"method {method.name} has a setting {key}, as every variant has; it needs another name")
        return own | {"method": method}

    @model_serializer(mode="wrap")
    def _flat(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        method: dict[str, Any] = found.pop("method", {})
        return method | found

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Put the settings of all methods beside the other keys."""
        schema = handler.resolve_ref_schema(handler(core))
        del schema["properties"]["method"]
        schema["properties"] = method_properties(handler) | schema["properties"]
        return schema

    @model_validator(mode="after")
    def _check_se(self) -> "Variant":
        if not isinstance(self.application, SeApplication):
            return self
        if self.calibrate is not None:
            raise ValueError("calibrate needs one set of weights, which application se has not; leave one of them out")
        for key in ("out_dtype", "shard_size"):
            if key in self.model_fields_set:
                raise ValueError(f"{key} has no meaning for application se, which keeps the base as is; leave it out")
        if not isinstance(self.method, Additive):
            raise ValueError(
                f"method {self.method.name} has no application se: {self.method.no_se}; "
                "set application: {kind: static}"
            )
        self.method.check_se()
        if self.method.static_coefficient(self.weight, 2) <= 0:
            raise ValueError("application se needs coefficients to rescale; set weight and lambda above 0")
        return self

    @model_validator(mode="after")
    def _check_tune(self) -> "Variant":
        if self.tune and isinstance(self.application, SeApplication):
            raise ValueError("tune is for static merges; set the values that a static variant was tuned to")
        check_tune(self.tune, self.settings)
        return self

    @model_validator(mode="after")
    def _check_lines(self) -> "Variant":
        if self.lines is not None and not self.method.scales_with_weight():
            unnormalised = {**self.method.model_dump(by_alias=True), "normalize": False}
            way_out = "leave lines out"
            if "normalize" in keys_of(type(self.method)) and method_of(unnormalised).scales_with_weight():
                way_out = "set normalize: false, or leave lines out"
            raise ValueError(
                f"lines multiplies all experts' weights in a layer by one factor, which does not scale what method "
                f"{self.method.name} adds there as it is set; {way_out}"
            )
        return self

    @property
    def settings(self) -> VariantSettings:
        """What says how the experts are combined, before some of it is tuned."""
        return VariantSettings(self.method, self.weight, self.coefficients)

    def tuned(self, chosen: Values) -> "Variant":
        """Return the variant with the settings that were chosen."""
        settings = self.settings.having(chosen)
        return self.model_copy(update=vars(settings))

    def grid(self) -> dict[str, list[float]]:
        """Return the values to try of each setting that is tuned, ascending."""
        return grid_of(self.tune, self.method)

    def default(self) -> dict[str, Any] | None:
        """Return the values to stay with of the settings that are tuned; None where the recipe gives none of them."""
        own = {key for key, name in keys_of(type(self.method)).items() if name in self.method.model_fields_set}
        given = self.model_fields_set | own | self.coefficients.model_fields_set
        return {key: self.settings.value(key) for key in self.tune} if given & self.tune.keys() else None

    @property
    def tuning_split(self) -> Literal["tuning", "held_out"]:
        """The rows of each task that the variant is tuned on: held out if it is made of calibration rows itself."""
        reads = self.method.statistics or isinstance(self.coefficients, SensCoefficients) or self.calibrate is not None
        return "held_out" if reads else "tuning"

    @property
    def last_stage(self) -> Stage:
        """The stage whose artifact is the merged model: what is evaluated, registered and loaded."""
        if isinstance(self.application, SeApplication):
            return "route"
        return "merge" if self.calibrate is None else "calibrate"

    def params(self) -> dict[str, str]:
        """Return the settings that tell this variant from others, flat: `method`, `weight`, `coefficients.kind`, …."""
        flat: dict[str, str] = {}
        for key, value in self.model_dump(by_alias=True, exclude={"shard_size"}, exclude_none=True).items():
            if isinstance(value, dict):
                flat |= {
                    f"{key}.{inner}": json.dumps(v) if isinstance(v, dict) else str(v) for inner, v in value.items()
                }
            else:
                flat[key] = str(value)
        return flat


class TokenizerSource(Strict):
    """The model whose tokenizer, chat template, special tokens, end tokens and generation config merged models get."""

    source: str = Field(
        "union",
        description="base or the name of an expert: take everything from that model; union: take everything from the "
        "base (or, if it has no chat template, the first expert with one) and add the others' tokens and end tokens",
    )


class Recipe(Strict):
    """A base, its experts, the tasks that judge them, and the merges to make."""

    name: Name = Field(description="name of the recipe, its MLflow experiment and its registered model")
    base: str = Field(
        min_length=1,
        description="the model that all experts were fine-tuned from: local folder or hub:ORG/NAME@REVISION",
    )
    experts: dict[Name, ExpertModel] = Field(description="the experts, by name")
    tasks: dict[Name, AnyTask] = Field({}, description="the task of each expert, under the expert's name")
    tokenizer: TokenizerSource = Field(
        TokenizerSource.model_validate({}), description="where the tokenizer of merged models comes from"
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
        if len(experts) < 2:
            raise ValueError(f"found {len(experts)}; expected at least two experts to merge")
        return experts

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        names = ["base", *self.experts, *self.merges]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is used twice among base, experts and merges; give each its own")
        models: dict[str, str] = {}
        for name, expert in self.experts.items():
            if expert.model in models:
                raise ValueError(f"experts {models[expert.model]} and {name} are the same model {expert.model}")
            models[expert.model] = name
        for stage in ("download", "task_vectors", "merge"):
            if self.resources_of(stage).num_gpus:
                raise ValueError(f"resources.{stage}.num_gpus: the stage uses no GPU; leave it out")
        for name, task in self.tasks.items():
            if not (task.has_calibration or task.has_tuning or task.is_scored):
                raise ValueError(f"tasks.{name}: has neither calibration nor evaluation; add one or leave the task out")
            if name not in self.experts:
                raise ValueError(f"tasks.{name}: there is no expert of that name; a task and its expert share a name")
        for name, variant in self.merges.items():
            self._check_variant(f"merges.{name}", variant)
        self._check_gate()
        sources = ["union", "base", *self.experts]
        if self.tokenizer.source not in sources:
            raise ValueError(f"tokenizer.source: found {self.tokenizer.source}; expected one of {', '.join(sources)}")
        return self

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
        self._check_calibration(what)
        if len({task.has_own_head for task in self.tasks.values()}) > 1:
            kinds = {name: task.kind for name, task in self.tasks.items()}
            raise ValueError(f"{what} cannot compare classifiers with other kinds: {kinds}")

    def _weights_of_all_layers(self, variant: Variant, weight: float) -> list[float] | None:
        """Return the experts' weights (with sens coefficients, their mean); None if they differ from layer to layer."""
        numbers: list[float] = [1.0] * len(self.experts)
        if isinstance(variant.coefficients, ExplicitCoefficients):
            numbers = [number for number in variant.coefficients.weights.values() if not isinstance(number, dict)]
        return [number * weight for number in numbers] if len(numbers) == len(self.experts) else None

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
