"""Vision towers of CLIP as experts: a folder in the cache stands for each whose head is made of names of classes."""

from collections.abc import Mapping
from pathlib import Path

from sensmerge.pipeline.plan.models import about
from sensmerge.pipeline.plan.seen import Seen
from sensmerge.pipeline.plan.tokenizer import Unopened
from sensmerge.pipeline.plan.vocabulary import settled
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import Artifact, canonical, sha256_text
from sensmerge.tasks.checkpoints.views import VIEWS, in_folders, view_digest
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.zero_shot import ZeroShot
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import is_adapter
from sensmerge.tasks.networks.networks import load_config
from sensmerge.tasks.networks.tokenizers import BASE
from sensmerge.tasks.networks.towers import HEAD, Clip, check_texts, fill_tower, tower_config, tower_view
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.tasks.stages.heads import HeadsJob


def vision_towers(recipe: Recipe, models: Mapping[str, Unopened], store: Store) -> dict[str, Seen]:
    """Return, by name, what stands for models in a recipe with zero-shot heads; none where it has no such head.

    A head is made by the text tower of its expert or, if that is a vision tower alone, by the base's.

    Args:
        recipe: the recipe.
        models: base and experts by name.
        store: where heads will lie, and whose cache has the folders.

    Raises:
        InputError: what is no CLIP; an adapter; neither expert nor base has a text tower, or that takes no such texts.
        FilesNeeded: tensors must be compared whose files are not here yet.
    """
    asked = {name: task.made_head for name, task in recipe.tasks.items() if task.made_head is not None}
    if not asked:
        return {}
    opened = {name: _open(name, one) for name, one in models.items()}
    jobs = {name: _head(name, one, opened, models, store) for name, one in asked.items()}
    for clip in [opened[name] for name in dict.fromkeys(job.tower for job in jobs.values())]:
        with about(clip.key):
            open_base(clip.folder, clip.checkpoint)  # a text tower that lacks something makes no heads
    return {
        name: _seen(model, opened[BASE], jobs.get(name), store)
        for name, model in opened.items()
        if model.is_whole or name in jobs
    }


def _open(name: str, model: Unopened) -> Clip:
    key = name if name == BASE else f"experts.{name}"
    with about(key):
        if is_adapter(model.folder, model.headers, key):
            raise InputError(
                f"{key}: {model.folder} is an adapter; zero_shot takes vision towers that are whole: merge it into its "
                "base first"
            )
        return Clip(key, model.checkpoint(), load_config(model.folder))


def _head(
    name: str, zero_shot: ZeroShot, opened: Mapping[str, Clip], models: Mapping[str, Unopened], store: Store
) -> HeadsJob:
    """Return what makes the head of an expert."""
    owner = name if opened[name].is_whole else BASE
    clip = opened[owner]
    if not clip.is_whole:
        raise InputError(
            f"tasks.{name}.zero_shot: needs a text tower, and {clip.key}: {clip.folder} is a vision tower alone, as "
            f"experts.{name} is; expected a whole CLIPModel as the base, of which merged models have the vision tower"
        )
    check_texts(clip.folder, clip.config, zero_shot.classes, zero_shot.templates, f"tasks.{name}.zero_shot")
    download = Key.of(owner, DownloadJob(models[owner].listing, store.hub_cache))
    return HeadsJob(Artifact(download.fingerprint, clip.folder), zero_shot, tower=owner, name=name)


def _seen(model: Clip, base: Clip, job: HeadsJob | None, store: Store) -> Seen:
    """Return what stands for a model, with the head that a job makes."""
    classes = [] if job is None else job.zero_shot.classes
    told = tower_view(model, base, len(classes))
    owner = model if model.is_whole else base
    config = tower_config(model, owner.config.projection_dim, classes)
    head = Path() if job is None else store.folder(store.named(Key.of(job.name, job)))
    folders = {model.key: str(model.folder.absolute()), BASE: str(base.folder.absolute()), HEAD: str(head)}
    view = in_folders(told, folders)
    donors = (BASE,) if any(part.folder == BASE for how in told.tensors.values() for part in how.parts) else ()
    digest = sha256_text(canonical([view_digest(told), config, job and job.identity()]))

    def fill(target: Path) -> None:
        fill_tower(model, view, config, target)

    return Seen(settled(store.hub_cache / VIEWS, fill), model.folder, digest, donors, job)
