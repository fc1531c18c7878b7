"""One merge of a recipe."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    InstanceOf,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sensmerge.pipeline.recipe.methods import method_properties
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.recipe.sweep import Keep, Sweep
from sensmerge.pipeline.recipe.tuning import Tune, Weight, check_tune, grid_of, with_auto_weight
from sensmerge.tasks.adapters import AdapterOutput
from sensmerge.tasks.coefficients import (
    Coefficients,
    Lines,
    SensCoefficients,
    UniformCoefficients,
)
from sensmerge.tasks.dynamic.application import OriginName, SeApplication
from sensmerge.tasks.features import CalibrationSettings
from sensmerge.tasks.methods.contract import Additive, Method, keys_of, method_of
from sensmerge.tasks.methods.settings import (
    LARGEST_WEIGHT,
    TEMPERATURE,
    WEIGHT,
    Values,
    VariantSettings,
    VaryingSetting,
    combinations,
    samples_of,
    varying_settings,
)
from sensmerge.tasks.methods.whole import changes_base
from sensmerge.tasks.strict import Strict

Dtype = Literal["float32", "bfloat16", "float16"]


_VARYING_SETTINGS: TypeAdapter[dict[str, VaryingSetting]] = TypeAdapter(dict[str, VaryingSetting])


def _magnitude(value: float | dict[str, float]) -> float:
    return sum(map(abs, value.values())) if isinstance(value, dict) else abs(value)


class StaticApplication(Strict):
    """One set of weights for all inputs."""

    kind: Literal["static"] = "static"


Application = Annotated[StaticApplication | SeApplication, Field(discriminator="kind")]


class Variant(Strict):
    """One merge: a method with its settings, its coefficients, and how they are applied.

    In a recipe, the method's name and settings are written beside the other keys. Those of methods that mergekit has
    too match mergekit 0.1.5.
    """

    method: SerializeAsAny[InstanceOf[Method]]
    varying: dict[str, Any] = Field({}, exclude=True)
    weight: Weight = Field(
        1.0,
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
        description="λ: weight of every expert; explicit and sens coefficients multiply it; auto: it is tuned; a list: "
        "a variant for each",
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
    sweep: Sweep
    keep: Keep
    calibrate: CalibrationSettings = Field(
        None,
        description="fit the merged weights, block after block, to the experts' features on their calibration sets; "
        "{} for the defaults; left out: no such step",
    )
    adapter: AdapterOutput = Field(
        None,
        description="merge LoRA adapters into a LoRA adapter of the base; {} for an exact one; left out: whole weights",
    )
    out_dtype: Dtype | None = Field(
        None, description="dtype of the merged weights; the base's if left out, of an adapter float32"
    )
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
        common = cls.model_fields.keys() - {"method", "varying"}
        own = {key: value for key, value in data.items() if key in common}
        settings = {key: value for key, value in data.items() if key not in own}
        varying = varying_settings(settings)
        # One number stands for all of them where others are checked: the largest, for 0 has a meaning of its own.
        settings |= {key: max(samples_of(setting), key=_magnitude) for key, setting in varying.items()}
        method = method_of(settings)
        for key, setting in varying.items():
            for value in samples_of(setting):  # every number is one that the method takes by itself
                method_of(settings | {key: value})
        for key in keys_of(type(method)).keys() & cls.model_fields.keys():
            raise TypeError(f"method {method.name} has a setting {key}, as every variant has; it needs another name")
        return own | {"method": method, "varying": varying}

    @model_serializer(mode="wrap")
    def _flat(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        method: dict[str, Any] = found.pop("method", {})
        varying: dict[str, Any] = _VARYING_SETTINGS.dump_python(self.varying, exclude_unset=True)
        return {**method, **varying, **found}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Put the settings of all methods beside the other keys."""
        schema = handler.resolve_ref_schema(handler(core))
        del schema["properties"]["method"], schema["properties"]["varying"]
        schema["properties"] = method_properties(handler) | schema["properties"]
        return schema

    @model_validator(mode="after")
    def _check_keep(self) -> "Variant":
        if "keep" in self.model_fields_set:
            raise ValueError("keep says whose weights of a sweep stay, and this is no sweep; leave it out")
        return self

    @model_validator(mode="after")
    def _check_se(self) -> "Variant":
        if not isinstance(self.application, SeApplication):
            return self
        if self.method.most_experts == 1:
            raise ValueError(
                f"application se chooses between experts, and method {self.method.name} has one; leave it out"
            )
        for key in ("out_dtype", "shard_size"):
            if key in self.model_fields_set:
                raise ValueError(f"{key} has no meaning for application se, which keeps the base's; leave it out")
        if self.origin == "static":
            if self.application.score == "alignment":
                raise ValueError("score alignment looks at the way from the base to the static merge; choose another")
            return self
        if self.calibrate is not None:
            raise ValueError("calibrate changes the static merge, so application se needs origin: static")
        if not isinstance(self.method, Additive):
            raise ValueError(
                f"method {self.method.name} has no application se from the base: {self.method.no_se}; "
                "set application.origin: static, or leave it out"
            )
        self.method.check_se()
        if self.method.static_coefficient(self.weight, 2) <= 0:
            raise ValueError("application se needs coefficients to rescale; set weight and lambda above 0")
        return self

    @model_validator(mode="after")
    def _check_varying(self) -> "Variant":
        for key in self.varying:
            if self.origin == "base":
                raise ValueError(f"{key}: application se from the base needs one number for all tensors; give one")
            if key in self.tune:
                raise ValueError(
                    f"tune.{key}: the setting changes from tensor to tensor; tune others, or give a number"
                )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> "Variant":
        self.settings.check_weights_used()
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

    @model_validator(mode="after")
    def _check_tune(self) -> "Variant":
        if self.tune and self.origin == "base":
            raise ValueError(
                "tune is for static merges; set application.origin: static, or the values that one was tuned to"
            )
        check_tune(self.tune, self.settings)
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> "Variant":
        if self.adapter is None:
            return self
        for key, why in (
            ("application", "se needs whole weights" if isinstance(self.application, SeApplication) else ""),
            ("calibrate", "it changes weights that no adapter of the experts holds" if self.calibrate else ""),
            ("shard_size", "an adapter is one file" if "shard_size" in self.model_fields_set else ""),
            ("method", f"{self.method.name} as it is set changes the base itself" if changes_base(self.method) else ""),
        ):
            if why:
                raise ValueError(f"adapter goes with no such {key}: {why}; leave one of them out")
        tuned = self.tune.keys() - {WEIGHT, TEMPERATURE, "lambda"}
        if self.adapter.rank is None and tuned:
            raise ValueError(f"adapter.rank is missing: tune.{min(tuned)} may need one; give a rank")
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
    def reads_histograms(self) -> bool:
        """Whether some merge of the variant, those that are tried included, reads histograms of magnitudes."""
        tried = combinations(self.grid(), self.default()) if self.tune else []
        return any(self.settings.having(values).method.reads_histograms for values in (*tried, {}))

    @property
    def tuning_split(self) -> Literal["tuning", "held_out"]:
        """The rows of each task that the variant is tuned on: held out if it is made of calibration rows itself."""
        reads = self.method.statistics or isinstance(self.coefficients, SensCoefficients) or self.calibrate is not None
        return "held_out" if reads else "tuning"

    @property
    def origin(self) -> OriginName | None:
        """The weights that the task vectors of application se start from; None for a static merge."""
        if not isinstance(self.application, SeApplication):
            return None
        by_itself = isinstance(self.method, Additive) and self.calibrate is None and not self.tune
        return self.application.origin or ("base" if by_itself else "static")

    @property
    def last_static_stage(self) -> Stage:
        """The stage whose artifact is the variant's checkpoint, if one is made."""
        return "merge" if self.calibrate is None else "calibrate"

    @property
    def last_stage(self) -> Stage:
        """The stage whose artifact is the merged model: what is evaluated, registered and loaded."""
        if isinstance(self.application, SeApplication):
            return "route"
        return self.last_static_stage

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
        if self.adapter is not None:
            flat["adapter.rank"] = str(self.adapter.rank or "exact")
        return flat
