"""Whether a network takes the pictures of a task, as its image processor prepares them; before anything is run."""

from collections.abc import Sequence

import torch

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import for_one_pass, skeleton
from sensmerge.tasks.networks.pictures import PIXELS, Picture


def check_pictures(key: str, places: Sequence[str], samples: Sequence[Sample], expert: Expert) -> None:
    """Check that all pictures of a task can be read, have one size, and that the expert's network takes it.

    Args:
        key: names the task (`tasks.digits`).
        places: where each row stands.
        samples: of these rows; those that are no pictures are passed over.
        expert: of the task.

    Raises:
        InputError: it is not so; it names the row.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    for place, sample in zip(places, samples, strict=True):
        picture = sample.inputs.get(PIXELS)
        if not isinstance(picture, Picture):
            return
        shape, _ = picture.read
        if first is None:
            first = place, shape
            _try(expert, shape, f"{key}: {place}")
        elif shape != first[1]:
            raise InputError(
                f"{key}: {place} has the shape {shape} behind the model's image processor, {first[0]} {first[1]}; "
                "expected one size: set size, or a crop, in a copy of its preprocessor_config.json"
            )


def _try(expert: Expert, shape: tuple[int, ...], where: str) -> None:
    """Run the network on the meta device, where nothing is computed but shapes."""
    network = for_one_pass(skeleton(expert.config, "classification", expert.folder))
    try:
        with torch.no_grad():
            network(**{PIXELS: torch.empty(1, *shape, device="meta")})
    except NotImplementedError:  # what depends on values cannot be told there
        return
    except Exception as error:  # whatever a network makes of another size
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"{where} has the shape {shape} behind the model's image processor, which {type(network).__name__} does "
            f"not take ({reason}); correct size in a copy of its preprocessor_config.json"
        ) from error


def positions_of(sample: Sample, expert: Expert) -> int:
    """Return about how many positions a network has for a picture, for estimates of memory; 0 for a text."""
    picture = sample.inputs.get(PIXELS)
    if not isinstance(picture, Picture):
        return 0
    (_, height, width), _ = picture.read
    vision = getattr(expert.config, "vision_config", expert.config)
    patch = getattr(vision, "patch_size", None) or 16
    side = patch if isinstance(patch, int) else min(patch)
    return 1 + (height // side) * (width // side)
