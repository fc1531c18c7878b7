"""The image processor that all models of a recipe are run with; merged models get it with the base's other files."""

from collections.abc import Mapping
from typing import Any

from sensmerge.pipeline.plan.models import about
from sensmerge.pipeline.plan.seen import Tokenizer
from sensmerge.pipeline.plan.tokenizer import Unopened, tokenizer_by_name
from sensmerge.pipeline.plan.zero_shot import vision_towers
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.tokenizer import TokenizerSettings
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import canonical, sha256_file, sha256_text
from sensmerge.tasks.checkpoints.settings import listed, unequal
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.pictures import PROCESSOR_FILES, has_image_processor, load_image_processor
from sensmerge.tasks.networks.tokenizers import BASE

_ABOUT = ("image_processor_type", "feature_extractor_type", "processor_class")
"""Settings of an image processor that say what it is called, and not what it does."""


def choose_processor(recipe: Recipe, models: Mapping[str, Unopened], store: Store) -> tuple[Tokenizer, list[str]]:
    """Take the base's image processor, which those of the experts have to equal.

    Args:
        recipe: the recipe, whose `tokenizer` has nothing to say here.
        models: base and experts by name.
        store: see `vision_towers`.

    Returns:
        What reads rows in place of a tokenizer, and what a user should know of it: a line each.

    Raises:
        InputError: an expert's own image processor prepares pictures in another way; the recipe speaks of a tokenizer;
            as `vision_towers`.
        FilesNeeded: as `vision_towers`.
    """
    settings = recipe.tokenizer
    if settings != TokenizerSettings.model_validate({}):
        raise InputError("tokenizer: the tasks read pictures, which need none; leave the key out")
    folders = {name: one.folder for name, one in models.items()}
    beside, notes = tokenizer_by_name(settings, folders)  # what may lie there travels as it is
    folder = folders[BASE]
    if has_image_processor(folder):
        with about(BASE):
            ours = _settings(folder)
        for name, other in folders.items():
            if name != BASE and has_image_processor(other):
                with about(f"experts.{name}"):
                    _compare(_settings(other), ours, f"experts.{name}: {other / PROCESSOR_FILES[0]}")
    digests = {name: sha256_file(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()}
    seen, beside_digest = vision_towers(recipe, models, store), beside.companions_digest
    if seen:
        beside_digest = sha256_text(canonical([beside_digest, {name: one.digest for name, one in seen.items()}]))
        notes.append("base: merged models are CLIP's vision tower, and have a head for each task beside it")
    return Tokenizer(folder, sha256_text(canonical(digests)), beside_digest, seen=seen), notes


def _settings(folder: Any) -> dict[str, Any]:
    return {key: value for key, value in load_image_processor(folder).to_dict().items() if key not in _ABOUT}


def _compare(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    unlike = [one for key in sorted({*theirs, *ours}) for one in unequal(key, theirs.get(key), ours.get(key))]
    if unlike:
        raise InputError(
            f"{where}: prepares pictures in another way than the base's: {listed(unlike)}; merged models have the "
            "base's: put that file in its place in a copy of the expert, if it answers by it as well"
        )
