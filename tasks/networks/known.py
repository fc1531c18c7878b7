"""Whether a class of transformers reads a model."""

from pathlib import Path

from transformers import CONFIG_MAPPING, PretrainedConfig

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG
from sensmerge.tasks.networks.networks import load_config, network_class


def why_unknown(folder: Path) -> str | None:
    """Return why no class of transformers reads the model in a folder; None if one does, or if it is an adapter.

    Raises:
        InputError: transformers has the class, but its config is not in order.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None if (folder / ADAPTER_CONFIG).is_file() else f"{folder} has no {CONFIG}"
    if not _has_config_class(folder):
        model_type = load_object(path).get("model_type")
        return f"{path} names no model_type" if model_type is None else f"transformers has no model_type {model_type!r}"
    try:
        config = load_config(folder, dequantize=True)
    except InputError as error:
        if (lacking := lacking_package(error)) is None:
            raise
        return lacking
    try:
        network_class(config, None, folder)
    except InputError as error:
        return str(error).partition(";")[0]
    return None


def lacking_package(error: InputError) -> str | None:
    """Return that, and which, package is not installed without which a network cannot be built, if an error says so."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__
    if cause is None:
        return None
    reason = " ".join(str(cause).split()).partition(". ")[0]
    return f"the class of transformers cannot be used here ({reason})"


def known_config(folder: Path) -> PretrainedConfig | None:
    """Return a model's config; None if there is none, or no class for it that can be used here.

    Raises:
        InputError: transformers has the class, but the config is not in order.
    """
    if not _has_config_class(folder):
        return None
    try:
        return load_config(folder, dequantize=True)
    except InputError as error:
        if lacking_package(error) is None:
            raise
        return None


def _has_config_class(folder: Path) -> bool:
    path = folder / CONFIG
    model_type = load_object(path).get("model_type") if path.is_file() else None
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING
