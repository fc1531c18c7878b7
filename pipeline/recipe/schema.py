"""The schema of recipes."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FiniteFloat,
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

from sensmerge.pipeline.recipe.kinds import AnyTask
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.tasks.coefficients import Coefficients, ExplicitCoefficients, SensCoefficients, UniformCoefficients
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.features import CalibrationSettings
from sensmerge.tasks.methods.contract import METHODS, Additive, Method, keys_of, method_of
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

    In a recipe, the method's name and settings are written beside the other keys. Settings and defaults match mergekit
    0.1.5.
    """

    method: SerializeAsAny[InstanceOf[Method]]
    weight: float = Field(
        1.0, ge=-10, le=10, description="λ: weight of every expert; explicit and sens coefficients multiply it"
    )
    coefficients: Coefficients = Field(UniformCoefficients(), description="how much of each expert, in each layer")
    application: Application = Field(
        StaticApplication(), description="one set of weights for all inputs, or coefficients for each input sample"
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
        schema["properties"] = _method_properties(handler) | schema["properties"]
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


def _method_properties(handler: GetJsonSchemaHandler) -> dict[str, JsonSchemaValue]:
    """Return the JSON schemas of `method` and of the settings of all methods, by key."""
    found: dict[str, dict[str, JsonSchemaValue]] = {}
    for name, method in METHODS.items():
        for key, schema in handler.resolve_ref_schema(handler(method.__pydantic_core_schema__))["properties"].items():
            found.setdefault(key, {})[name] = schema
    properties: dict[str, JsonSchemaValue] = {"method": {"enum": list(METHODS), "description": "merge method"}}
    for key, by_method in found.items():
        if key != "method":
            properties[key] = _shared_property(by_method)
    return properties


def _shared_property(by_method: dict[str, JsonSchemaValue]) -> JsonSchemaValue:
    """Return the JSON schema of a setting that some methods have, and say which, and their defaults if they differ."""
    first, types = next(iter(by_method.values())), list[JsonSchemaValue]()
    defaults: dict[str, list[str]] = {}
    for name, one in by_method.items():
        kind = {key: value for key, value in one.items() if key not in ("default", "description", "title")}
        types += [] if kind in types else [kind]
        default = f"default: {json.dumps(one['default'])}" if "default" in one else "required"
        defaults.setdefault(default, []).append(name)
    said = [first["description"]] if "description" in first else []
    said += [f"only for {', '.join(by_method)}"] if len(by_method) < len(METHODS) else []
    if len(defaults) > 1:
        said += [f"{default} for {', '.join(names)}" for default, names in defaults.items()]
    kept = {
        key: first[key] for key in ("default", "title") if key in first and (key != "default" or len(defaults) == 1)
    }
    return kept | (types[0] if len(types) == 1 else {"anyOf": types}) | {"description": "; ".join(said)}


class Resources(Strict):
    """What one step of a stage may use, and how many steps may run at once."""

    num_cpus: float = Field(
        1,
        gt=0,
        description="CPU cores for one step; in the stages task_vectors and merge, for one layer group; in the stage "
        "calibrate, how many experts are under way at once, too",
    )
    num_gpus: float = Field(0, ge=0, description="GPUs for one step; above 0, its network runs on cuda")
    max_in_flight: int = Field(
        64,
        ge=1,
        description="how many steps may run at once; in the stages task_vectors and merge, how many layer groups",
    )


class ActorPlacement(Strict):
    """The blocks of a network are shared out among workers."""

    actors: int = Field(ge=1, description="number of workers; each gets the resources of one step of the stage")


MEAN_NORMALISED = "mean_normalised"


class Gate(Strict):
    """Which variant `refresh` proposes as champion, and how much worse than the current champion it may be."""

    metric: str = Field(
        MEAN_NORMALISED,
        description="metric that chooses the best variant: mean_normalised, or TASK/METRIC such as math/exact_match",
    )
    variants: list[str] | None = Field(
        None,
        min_length=1,
        description="variants that may become champion; default: all static ones. A dynamic one (application se) "
        "must be named here, because servers that load checkpoints cannot load it",
    )
    tolerance: FiniteFloat = Field(
        0.02,
        ge=0,
        description="share of the champion's score that a challenger may lose on a task, measured at the worse end of "
        "the 95 % interval of their difference",
    )


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
            if not (task.has_calibration or task.is_scored):
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
        weights = self._weights_of_all_layers(variant)
        try:
            if weights is not None:
                variant.method.check_weights(weights)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None

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

    def _weights_of_all_layers(self, variant: Variant) -> list[float] | None:
        """Return the experts' weights (with sens coefficients, their mean); None if they differ from layer to layer."""
        numbers: list[float] = [1.0] * len(self.experts)
        if isinstance(variant.coefficients, ExplicitCoefficients):
            numbers = [number for number in variant.coefficients.weights.values() if not isinstance(number, dict)]
        return [number * variant.weight for number in numbers] if len(numbers) == len(self.experts) else None

    def resources_of(self, stage: Stage) -> Resources:
        """Return the resources of a stage's steps."""
        return self.resources.get(stage) or Resources.model_validate({})

    def se_variants(self) -> list[str]:
        """Return the names of the variants with application se."""
        return [name for name, variant in self.merges.items() if isinstance(variant.application, SeApplication)]

    def calibrated_variants(self) -> list[str]:
        """Return the names of the variants that are calibrated."""
        return [name for name, variant in self.merges.items() if variant.calibrate is not None]

    def sens_variants(self) -> list[str]:
        """Return the names of the variants with sens coefficients."""
        return [name for name, variant in self.merges.items() if isinstance(variant.coefficients, SensCoefficients)]
