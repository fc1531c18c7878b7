"""Merge fine-tuned experts of one base model into one model, without training.

from sensmerge import DynamicModel
DynamicModel.load(Path("FOLDER")).predict(["What is 3 plus 4?"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensmerge.tasks.dynamic.model import DynamicModel as DynamicModel
    from sensmerge.tasks.errors import InputError as InputError
    from sensmerge.tasks.networks.generation import Decoding as Decoding
    from sensmerge.tasks.serving.static_model import StaticModel as StaticModel

_PUBLIC = {
    "Decoding": "sensmerge.tasks.networks.generation",
    "DynamicModel": "sensmerge.tasks.dynamic.model",
    "InputError": "sensmerge.tasks.errors",
    "StaticModel": "sensmerge.tasks.serving.static_model",
}
__all__ = ["Decoding", "DynamicModel", "InputError", "StaticModel"]


def __getattr__(name: str) -> Any:
    """Return a public name; torch and transformers are imported with the first that needs them."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
