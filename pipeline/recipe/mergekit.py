"""A configuration of mergekit 0.1.5 as a recipe: what a recipe can say is carried over, all else refused by name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensmerge.pipeline.recipe.mergekit_tokenizer import tokenizer_of
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.methods.contract import METHODS, Method, keys_of

MERGE_METHOD = "merge_method"
"""The key by which a configuration of mergekit is told from a recipe."""
VARIANT = "merged"
"""Name of the one merge of the recipe."""
KNOWN = {MERGE_METHOD, "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source"}
KNOWN |= {"tokenizer", "chat_template", "modules"}
MERGES_ITS_BASE = ("linear", "karcher")
"""Methods to which the base is a model like any other, if it is listed."""
WITHOUT_BASE: dict[str, dict[str, Any]] = {"linear": {}, "karcher": {}, "passthrough": {}}
WITHOUT_BASE |= {"nuslerp": {"task_vectors": False}, "multislerp": {"task_vectors": False}}
"""Methods that need no `base_model`, and the settings by which they do without here."""
DTYPES = ("float32", "bfloat16", "float16")
NO_EFFECT = "int8_mask"
"""A setting of mergekit's for the type of its masks, which changes no result."""


@dataclass(frozen=True)
class _Model:
    """A model as mergekit names it: `PATH[@REVISION][+ADAPTER[@REVISION]]`."""

    path: str
    adapter: str | None = None


@dataclass(frozen=True)
class _Listed:
    """A model that is merged, and its own parameters."""

    model: _Model
    parameters: Mapping[str, Any]
    where: str
    """names it in messages"""


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Return whether a YAML mapping is a configuration of mergekit and no recipe."""
    return MERGE_METHOD in data


def recipe_name(path: Path) -> str:
    """Return a name for the recipe that a file of mergekit's is read as."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "mergekit"


def recipe_of(data: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return the recipe, as YAML has it, that merges what a configuration of mergekit merges.

    Args:
        data: the configuration.
        name: of the recipe.
        folder: what relative paths of models are relative to.

    Raises:
        InputError: what no recipe can say; names the key and a way out.
    """
    for key in data:
        if key not in KNOWN:
            raise InputError(f"unknown key {shown(key)}; expected a configuration of mergekit 0.1.5")
    if data.get("modules") is not None:
        raise InputError(
            "modules: a recipe has nothing like it; write models: if the model has one module; others cannot be merged "
            "yet"
        )
    method = data[MERGE_METHOD]
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"{MERGE_METHOD}: found {shown(method)}; expected one of {', '.join(METHODS)}")
    listed, shared = _listed(data, folder)
    base = None if data.get("base_model") is None else _model(data["base_model"], "base_model")
    merged = [one for one in listed if one.model != base or method in MERGES_ITS_BASE]
    extra: dict[str, Any] = {}
    if base is None:
        if method not in WITHOUT_BASE:
            raise InputError(f"base_model is missing: {MERGE_METHOD} {method} merges what models differ in from it")
        base, extra = merged[0].model, WITHOUT_BASE[method]
    if not merged:
        raise InputError(f"models: there is only base_model; {MERGE_METHOD} {method} merges others into it")
    names = _names([one.model for one in merged])
    experts = dict(zip(names, merged, strict=True))
    variant = {"method": method, **_settings(METHODS[method], experts, shared), **extra}
    out_dtype = data.get("out_dtype") or data.get("dtype")
    if out_dtype is not None:
        if out_dtype not in DTYPES:
            raise InputError(f"dtype: found {shown(out_dtype)}; expected one of {', '.join(DTYPES)}")
        variant["out_dtype"] = out_dtype
    return {
        "name": name,
        "base": _place(base, "base_model", folder),
        "experts": {key: {"model": _expert(one, base, folder)} for key, one in experts.items()},
        "tokenizer": tokenizer_of(data, lambda value, where: _of_tokenizer(value, where, base, experts)),
        "merges": {VARIANT: variant},
    }


def with_whole_paths(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe from `recipe_of` for a file that may lie anywhere: models on this disk by their whole paths."""

    def whole(model: str) -> str:
        return str(folder / model) if (folder / model).is_dir() else model

    experts = {name: one | {"model": whole(one["model"])} for name, one in recipe["experts"].items()}
    return dict(recipe) | {"base": whole(recipe["base"]), "experts": experts}


# Models --------------------------------------------------------------------------------------------------------------


def _listed(data: Mapping[str, Any], folder: Path) -> tuple[list[_Listed], list[Mapping[str, Any]]]:
    """Return the models that are merged, and the parameters of all of them, those that count first in front."""
    whole = [_mapping(data.get("parameters"), "parameters")]
    if data.get("slices") is None:
        entries, where = data.get("models"), "models"
    else:
        slices = data["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            raise InputError(
                "slices: only one slice, of all layers of its models, can be a recipe; models of other depths are not "
                "stacked here"
            )
        for key in slices[0].keys() - {"sources", "parameters"}:
            raise InputError(f"slices[0].{key}: a recipe has nothing like it; write it at the top")
        entries, where = slices[0].get("sources"), "slices[0].sources"
        whole.insert(0, _mapping(slices[0].get("parameters"), "slices[0].parameters"))
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise InputError(
            f"{where}: found {shown(entries)}; expected a list of models, each {{model: …, parameters: …}}"
        )
    found = []
    for number, entry in enumerate(entries):
        here = f"{where}[{number}]"
        allowed = {"model", "parameters"} | ({"layer_range"} if where != "models" else set())
        for key in entry.keys() - allowed:
            raise InputError(f"{here}.{key}: unknown key; expected {', '.join(sorted(allowed))}")
        model = _model(entry.get("model"), f"{here}.model")
        if "layer_range" in allowed:
            _check_all_layers(entry.get("layer_range"), model, f"{here}.layer_range", folder)
        found.append(_Listed(model, _mapping(entry.get("parameters"), f"{here}.parameters"), here))
    return found, whole


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {shown(value)}; expected a mapping")
    return value


def _model(value: Any, where: str) -> _Model:
    if isinstance(value, dict):
        for key in value.keys() - {"model", "lora"}:
            raise InputError(f"{where}.{key}: a recipe has nothing like it; leave it out")
        adapter = value.get("lora")
        return _Model(_path(value.get("model"), where), None if adapter is None else _path(adapter, where))
    path, plus, adapter = _path(value, where).partition("+")
    return _Model(path, adapter if plus else None)


def _path(value: Any, where: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.keys() <= {"path", "revision"}:
        revision = value.get("revision")
        return value["path"] if revision is None else f"{value['path']}@{revision}"
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: found {shown(value)}; expected a folder or the id of a model on the hub")
    return value


def _place(model: _Model, where: str, folder: Path) -> str:
    """Return what a recipe calls a model without an adapter: its folder, or where it is on the hub."""
    if model.adapter is not None:
        raise InputError(
            f"{where}: {model.path}+{model.adapter} is an adapter on another model than the base; merge it into that "
            "model first (method passthrough)"
        )
    return _on_disk_or_hub(model.path, folder)


def _on_disk_or_hub(path: str, folder: Path) -> str:
    # mergekit looks from where it is started; a recipe from its own folder.
    found = _folder(path, folder)
    if found is None and path.startswith((".", "/", "~")):
        raise InputError(f"{shown(path)}: no such folder; expected one, or a hub id")
    return f"hub:{path}" if found is None else path if found == folder / path else str(found.absolute())


def _folder(path: str, folder: Path) -> Path | None:
    """Return a model's folder; None of one that is on the hub."""
    try:
        return next((one for one in (folder / path, Path(path)) if one.is_dir()), None)
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({error.strerror}); expected a folder or a hub id") from error


def _expert(listed: _Listed, base: _Model, folder: Path) -> str:
    if listed.model.adapter is not None and listed.model.path == base.path and base.adapter is None:
        return _on_disk_or_hub(listed.model.adapter, folder)
    return _place(listed.model, f"{listed.where}.model", folder)


def _names(models: Sequence[_Model]) -> list[str]:
    """Return a name for each model, from the end of its path."""
    found: list[str] = []
    for model in models:
        last = Path((model.adapter or model.path).partition("@")[0]).name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:90] or "expert"
        taken = {*found, "base", VARIANT}
        found.append(next(one for one in _numbered(name) if one not in taken))
    return found


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _check_all_layers(found: Any, model: _Model, where: str, folder: Path) -> None:
    """Refuse a slice that leaves layers out."""
    config = _config(model, where, folder)
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    count = next((inner[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if inner and key in inner), None)
    if found != [0, count]:
        raise InputError(
            f"{where}: found {shown(found)}; expected all layers, [0, {count}]: models of other depths are not stacked "
            "here"
        )


def _config(model: _Model, where: str, folder: Path) -> dict[str, Any]:
    from sensmerge.tasks.artifacts import load_object

    local = _folder(model.path, folder)
    if local is not None:
        return load_object(local / "config.json")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = model.path.partition("@")
    try:
        return load_object(Path(hf_hub_download(repo, "config.json", revision=revision or None)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{where}: how many layers {model.path} has cannot be told ({error}); write models: without layer_range if "
            "all of them are meant"
        ) from error


# Parameters ----------------------------------------------------------------------------------------------------------


def _settings(
    method: type[Method], experts: Mapping[str, _Listed], shared: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the settings of the variant: those of its method, and its coefficients."""
    keys = keys_of(method)
    own = {key for one in experts.values() for key in one.parameters}
    found: dict[str, Any] = {}
    for key in sorted(own | {key for scope in shared for key in scope}, key=str):
        if key == NO_EFFECT:
            continue
        values = {name: _value(key, [one.parameters, *shared], method, one.where) for name, one in experts.items()}
        if key == "weight":
            found |= _weights(values, method, experts)
            continue
        if key not in keys:
            raise InputError(f"parameters.{key}: {MERGE_METHOD} {_named(method)} has no such parameter; leave it out")
        default = method.model_fields[keys[key]].default
        given = {name: default if value is None else value for name, value in values.items()}
        first = next(iter(given.values()))
        if all(value == first for value in given.values()):
            found[key] = first
        elif key in method.keys_for_each_expert():
            found[key] = given
        else:
            raise InputError(f"parameters.{key}: found other values for other models; {_named(method)} has one for all")
    if "weight" not in own and not any("weight" in scope for scope in shared) and _wants_weights(method):
        raise InputError(f"{next(iter(experts.values())).where}.parameters.weight is missing; give one to every model")
    return found


def _named(method: type[Method]) -> str:
    return next(name for name, one in METHODS.items() if one is method)


def _wants_weights(method: type[Method]) -> bool:
    """Return whether mergekit asks for weights: those of its methods that have some have no default for them."""
    return not method.no_weights and _named(method) not in ("model_stock", "sce")


def _weights(values: Mapping[str, Any], method: type[Method], experts: Mapping[str, _Listed]) -> dict[str, Any]:
    if method.no_weights:
        raise InputError(f"parameters.weight: {_named(method)} has no weights: {method.no_weights}; leave it out")
    for name, value in values.items():
        if value is None:
            raise InputError(f"{experts[name].where}.parameters.weight is missing; give one to every model")
    first = next(iter(values.values()))
    if isinstance(first, int | float) and all(value == first for value in values.values()):
        return {"weight": first}
    return {"coefficients": {"kind": "explicit", "weights": dict(values)}}


def _value(key: str, scopes: Sequence[Mapping[str, Any]], method: type[Method], where: str) -> Any:
    """Return one model's value of a parameter, as a recipe says it; None where nothing says it.

    Where no filter of one scope fits a tensor, mergekit goes on to the next scope, and then to its default.
    """
    filters: list[dict[str, Any]] = []
    for scope in scopes:
        if key not in scope:
            continue
        value = _read(scope[key], f"{where}.parameters.{key}")
        if not _are_filters(value):
            if not filters:
                return value
            filters.append({"value": value})
            return filters
        filters += value
        if filters[-1].get("filter", "*") == "*":
            return filters
    if not filters:
        return None
    default = method.model_fields[keys_of(method)[key]].default if key in keys_of(method) else None
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise InputError(f"{where}.parameters.{key}: no filter fits all tensors; add one last: {{value: NUMBER}}")
    return [*filters, {"value": default}]


def _are_filters(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _read(value: Any, where: str) -> Any:
    """Return a parameter as YAML of a recipe has it: a number, true or false, a list of numbers, or filters."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _number(value, where)
    if not any(isinstance(one, dict) for one in value):
        return [_number(one, where) for one in value]
    found: list[dict[str, Any]] = []
    for one in value:
        if not isinstance(one, dict) or "value" not in one or one.keys() - {"value", "filter"}:
            raise InputError(f"{where}: found {shown(one)}; expected {{filter: TEXT, value: NUMBER}}")
        inner = one["value"]
        read = [_number(each, where) for each in inner] if isinstance(inner, list) else _number(inner, where)
        name = one.get("filter")
        found.append({"value": read} if name in (None, "*") else {"filter": str(name), "value": read})
        if name in (None, "*"):
            break  # what comes behind it never counts
    return found


def _number(value: Any, where: str) -> Any:
    if isinstance(value, str):  # YAML reads 1e-3 as a text
        try:
            return float(value)
        except ValueError:
            raise InputError(f"{where}: found {shown(value)}; expected a number") from None
    if not isinstance(value, int | float):
        raise InputError(f"{where}: found {shown(value)}; expected a number")
    return value


# Tokenizer -----------------------------------------------------------------------------------------------------------


def _of_tokenizer(value: Any, where: str, base: _Model, experts: Mapping[str, _Listed]) -> str:
    """Return what a recipe calls a model that a tokenizer, or the row of a token, comes from."""
    model = _model(value, where)
    if model == base:
        return "base"
    for name, one in experts.items():
        if one.model == model:
            return name
    raise InputError(f"{where}: {model.path} is none of the models that are merged; name one of them")
