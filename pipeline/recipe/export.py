"""A variant as a configuration of mergekit 0.1.5: what that can say is written, all else refused by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensmerge.pipeline.recipe.mergekit import MERGES_ITS_BASE
from sensmerge.pipeline.recipe.variant import StaticApplication, Variant
from sensmerge.tasks.coefficients import Weights, row_of
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.contract import Method, keys_of
from sensmerge.tasks.methods.settings import VaryingSetting
from sensmerge.tasks.varying import Varying, number_at, varying_of

WITHOUT_BASE = ("karcher", "passthrough")
"""Methods of mergekit's to which a base would be one more model to merge."""
OURS = ("fisher", "regmean", "tsv_m", "iso_c", "iso_cts")
"""Methods that mergekit does not have."""
TASK_VECTORS = "task_vectors"
"""Whether task vectors are mixed or the experts themselves; mergekit tells it by whether there is a base."""
SEED = "seed"

Reference = str | dict[str, Any]
"""A model as mergekit names it."""


@dataclass(frozen=True)
class Made:
    """What a variant's weights are made of, once everything is chosen."""

    method: Method
    varying: Mapping[str, VaryingSetting]
    """settings of the method that change from tensor to tensor"""
    weights: Weights
    """of the experts, by layer or tensor"""
    layers: Mapping[str, Sequence[str]]
    """tensors of each layer that is merged"""
    out_dtype: str
    """torch name"""


def check_variant(key: str, variant: Variant) -> None:
    """Check that mergekit can do what a variant says.

    Args:
        key: of the variant, for messages.
        variant: the variant.

    Raises:
        InputError: it cannot, naming the setting.
    """
    if not isinstance(variant.application, StaticApplication):
        raise InputError(f"{key}.application: mergekit has nothing like se; export a variant with static application")
    if variant.calibrate is not None:
        raise InputError(f"{key}.calibrate: mergekit has nothing like it; export a variant without it")
    if variant.adapter is not None:
        raise InputError(f"{key}.adapter: mergekit writes whole weights; export a variant without it")
    if variant.method.name in OURS:
        raise InputError(f"{key}.method: mergekit has no {variant.method.name}; export a variant of another method")
    if getattr(variant.method, SEED, 0):
        raise InputError(f"{key}.{SEED}: mergekit draws random masks of its own; leave it out")


def has_base(method: Method) -> bool:
    """Return whether a configuration of a method names a base."""
    return method.name not in WITHOUT_BASE and getattr(method, TASK_VECTORS, True)


def configuration_of(
    made: Made, base: Reference, experts: Mapping[str, Reference], tokenizer: Reference | None
) -> dict[str, Any]:
    """Return the configuration that makes what a variant makes.

    All arithmetic is float32, as here. A model's number for a parameter is one number, or filters on tensors' names.

    Args:
        made: what the variant's weights are made of.
        base: the base.
        experts: the experts, by name.
        tokenizer: the model whose tokenizer the merged model gets; None: that of the first that is named.
    """
    method = made.method
    shared, own = _parameters(made, list(experts))
    models = [{"model": model} | ({"parameters": own[name]} if own[name] else {}) for name, model in experts.items()]
    found: dict[str, Any] = {"merge_method": method.name}
    if has_base(method):
        found["base_model"] = base
    if method.name in MERGES_ITS_BASE and has_base(method):
        models.insert(0, {"model": base, "parameters": {"weight": 0.0}})  # it would ask for a weight if not named
    found["models"] = models
    if shared:
        found["parameters"] = shared
    found |= {"dtype": "float32", "out_dtype": made.out_dtype}
    if tokenizer is not None:
        found["tokenizer_source"] = tokenizer
    return found


def _parameters(made: Made, experts: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the parameters of all models, and those of each expert."""
    method, shared = made.method, dict[str, Any]()
    own: dict[str, dict[str, Any]] = {name: {} for name in experts}
    if not method.no_weights:
        for name in experts:
            numbers = {
                tensor: row_of(made.weights, tensor, layer)[name]
                for layer, tensors in made.layers.items()
                for tensor in tensors
            }
            own[name]["weight"] = filtered(numbers, made.layers)
    for key, field in keys_of(type(method)).items():
        value: Any = made.varying[key] if key in made.varying else getattr(method, field)
        if key in (TASK_VECTORS, SEED) or value == type(method).model_fields[field].default:
            continue
        if isinstance(value, dict):
            for name, one in value.items():
                own[name][key] = _plain(one)
        else:
            shared[key] = _plain(value)
    return shared, own


def _plain(setting: Any) -> Any:
    """Return a setting as YAML has it."""
    if not isinstance(setting, list):
        return setting
    return [one if isinstance(one, int | float) else one.model_dump(exclude_unset=True) for one in setting]


def filtered(numbers: Mapping[str, float], layers: Mapping[str, Sequence[str]]) -> float | list[dict[str, Any]]:
    """Return tensors' numbers as one number, or as filters of which the first that a tensor's name holds counts.

    Layers come by their names with a dot behind, where no other layer's tensors hold that, and else every tensor by its
    whole name, longer ones first: no filter is in the name of a tensor that comes later in the list.

    Args:
        numbers: by tensor.
        layers: the tensors of each layer.
    """
    counts = Counter(numbers.values())
    common, _ = counts.most_common(1)[0]
    if len(counts) == 1:
        return common
    by_layer: list[dict[str, Any]] = []
    for layer, tensors in layers.items():
        own = {numbers[tensor] for tensor in tensors}
        whole = len(own) == 1 and all(tensor.startswith(f"{layer}.") for tensor in tensors)
        names = [f"{layer}."] if whole else list(tensors)
        by_layer += [{"filter": name, "value": numbers[tensors[0] if whole else name]} for name in names]
    usual = [one for one in by_layer if one["value"] != common]
    by_tensor = [{"filter": name, "value": numbers[name]} for name in sorted(numbers, key=len, reverse=True)]
    rest = {"value": common}
    candidates = [[*some, rest] for some in (usual, by_layer, by_tensor)]
    return next(one for one in candidates if _says(varying_of(one), numbers))


def _says(setting: Varying, numbers: Mapping[str, float]) -> bool:
    return all(number_at(setting, tensor, 0.0) == number for tensor, number in numbers.items())
