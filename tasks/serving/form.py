"""What a static merge is to whoever asks it."""

from pathlib import Path
from typing import Literal

from sensmerge.tasks.checkpoints.weights import HEADS

Form = Literal["language_model", "encoder_decoder", "classifier", "picture_classifier", "trunk"]
"""What a static merge is: one whole network, or the trunk of several classifiers, whose heads lie beside it."""


def head_names(folder: Path) -> list[str]:
    """Return the tasks whose heads lie beside a merged trunk."""
    return sorted(path.name for path in (folder / HEADS).glob("*/"))
