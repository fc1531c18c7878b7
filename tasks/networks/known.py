"""Whether a class of transformers reads a model."""

from pathlib import Path

from transformers import CONFIG_MAPPING

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
    if not has_config_class(folder):
        model_type = load_object(path).get("model_type")
        return f"{path} names no model_type" if model_type is None else f"transformers has no model_type {model_type!r}"
    config = load_config(folder, dequantize=True)
    try:
        network_class(config, None, folder)
    except InputError as error:
        return str(error).partition(";")[0]
    return None


def has_config_class(folder: Path) -> bool:
    """Return whether transformers has a class for a model's config."""
    path = folder / CONFIG
    model_type = load_object(path).get("model_type") if path.is_file() else None
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING
