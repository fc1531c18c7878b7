"""The configuration of a LoRA adapter, of which everything is understood or refused by name."""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.patterns import Pattern, TimeLimit, compile_pattern

ADAPTER_CONFIG = "adapter_config.json"

# Settings that change the applied weights in no way, beside those that `AdapterConfig` has.
_WITHOUT_EFFECT = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "lora_dropout", "runtime_config", "megatron_core"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Initialisations that leave the base's weights alone; the others (pissa, olora, …) need the base changed as well.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")

MOST = 20_000
"""Entries of a list or a mapping: more than any network has modules."""
ALL_LINEAR = "all-linear"
"""Stands for every linear layer, where a pattern may stand."""
_SECONDS = 20.0
"""For all searches of a config together."""
T = TypeVar("T")

Rank = Annotated[int, Field(ge=1, le=2**17)]
Alpha = Annotated[float, Field(ge=-(2.0**30), le=2.0**30)]
ModuleName = Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=200)]
"""Peft reads some of them as patterns; of such a name, that takes no time."""
ModuleNames = Annotated[list[ModuleName], Field(max_length=MOST)]


class AdapterConfig(BaseModel):
    """What an adapter's weights depend on; without a setting, it is as peft has it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    path: Path
    """where it stands"""
    task_type: str | None = Field(None, description="a text")
    r: Rank = Field(8, description=f"a whole number from 1 to {2**17:,}")
    lora_alpha: Alpha = Field(8, description=f"a number of at most {2**30:,}")
    use_rslora: bool = Field(False, description="true or false")
    ensure_weight_tying: bool = Field(False, description="true or false")
    rank_pattern: dict[str, Rank] | None = Field(
        None, max_length=MOST, description=f"a whole number from 1 to {2**17:,} for each of at most {MOST:,} patterns"
    )
    alpha_pattern: dict[str, Alpha] | None = Field(
        None, max_length=MOST, description=f"a number of at most {2**30:,} for each of at most {MOST:,} patterns"
    )
    target_modules: str | ModuleNames | None = Field(None, description="a pattern, or a list of modules' names")
    exclude_modules: str | ModuleNames | None = Field(None, description="a pattern, or a list of modules' names")
    modules_to_save: ModuleNames | None = Field(None, description="a list of modules' names")
    layers_to_transform: int | Annotated[list[int], Field(max_length=MOST)] | None = Field(
        None, description="a whole number, or a list of them"
    )
    layers_pattern: ModuleName | ModuleNames | None = Field(
        None, description="a name of a list of layers, or several; of others, merge the adapter with peft first"
    )

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors.

        Raises:
            InputError: a pattern that is none, or takes too long.
        """
        return self._first(self._ranks, module, self.r)

    def alpha(self, module: str) -> float:
        """Return alpha of a module; raises InputError as `rank`."""
        return self._first(self._alphas, module, self.lora_alpha)

    def naming(self, modules: Iterable[str]) -> dict[str, Any]:
        """Return the settings by which peft chooses modules, without patterns that could keep it busy.

        Args:
            modules: names of all modules of the network.

        Raises:
            InputError: a pattern that is none, takes too long, or matches no module.
        """
        keys = ("task_type", "ensure_weight_tying", "modules_to_save", "layers_to_transform", "layers_pattern")
        named = {key: getattr(self, key) for key in keys}
        targets, excluded = self.target_modules, self.exclude_modules
        if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            targets = self._alternatives("target_modules", targets, modules)
            if not targets:
                raise InputError(
                    f"{self.path}: target_modules = {shown(self.target_modules)} matches no module of the network; "
                    "the adapter was made for another base"
                )
        if isinstance(excluded, str):
            excluded = self._alternatives("exclude_modules", excluded, modules) or None
        return named | {"target_modules": targets, "exclude_modules": excluded}

    def _alternatives(self, key: str, text: str, modules: Iterable[str]) -> str:
        """Return a pattern of the names, one by one, of the modules that a pattern matches; "" without any."""
        pattern = compile_pattern(text, f"{self.path}: {key}")
        return "|".join(re.escape(name) for name in modules if pattern.matches(name, self._limit))

    def _first(self, values: Mapping[Pattern, T], module: str, otherwise: T) -> T:
        """Return the value of the first pattern that matches the end of a module's name."""
        return next((value for one, value in values.items() if one.matches(module, self._limit)), otherwise)

    def _compiled(self, key: str) -> dict[Pattern, Any]:
        # peft.utils.other.get_pattern_key
        given: Mapping[str, Any] = getattr(self, key) or {}
        return {compile_pattern(rf"(.*\.)?({one})$", f"{self.path}: {key}"): value for one, value in given.items()}

    @cached_property
    def _ranks(self) -> dict[Pattern, int]:
        return self._compiled("rank_pattern")

    @cached_property
    def _alphas(self) -> dict[Pattern, float]:
        return self._compiled("alpha_pattern")

    @cached_property
    def _limit(self) -> TimeLimit:
        return TimeLimit(_SECONDS)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return the adapter's configuration, checked to hold nothing that is not applied.

    Raises:
        InputError: another adapter type than LoRA; a setting that cannot be handled, or of a wrong type or size, by
            name.
    """
    from peft import LoraConfig  # takes its time, which recipes without adapters save

    path = folder / ADAPTER_CONFIG
    config = load_object(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {shown(config.get('peft_type'))}; only LORA adapters can be merged")
    defaults: dict[str, Any] = LoraConfig().to_dict()
    known = AdapterConfig.model_fields.keys() - {"path"}
    for key, value in config.items():
        if key in known or key in _WITHOUT_EFFECT or value == defaults.get(key) or not value:
            continue
        raise InputError(
            f"{path}: {shown(key)[1:-1]} = {shown(value)} cannot be handled; merge the adapter into its base with peft "
            "first"
        )
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_INITS:
        raise InputError(
            f"{path}: init_lora_weights = {shown(start)} changes the base's own weights; "
            "convert the adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )
    try:
        return AdapterConfig.model_validate({key: config[key] for key in known & config.keys()} | {"path": path})
    except ValidationError as error:
        key = str(error.errors(include_url=False, include_context=False)[0]["loc"][0])
        expected = AdapterConfig.model_fields[key].description
        raise InputError(f"{path}: {key} is {shown(config[key])}; expected {expected}") from None
