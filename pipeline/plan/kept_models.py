"""Base and experts as they were opened, kept on this machine and believed while all that it came of is as it was.

To open them takes classes of transformers, which are seconds to import. A merge of weights alone needs no more of them
than which tensor is which, and that is small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sensmerge.pipeline.plan.kept import program
from sensmerge.pipeline.plan.models import model_digest
from sensmerge.pipeline.plan.opened import Opened, OwnHead
from sensmerge.pipeline.plan.seen import Tokenizer
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.facts import facts_folder, find_fact, keep_fact
from sensmerge.tasks.artifacts import canonical, sha256_text
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights, LoraFactors, Piece

MODELS = "models"
"""Kind of fact."""


@dataclass(frozen=True)
class _KeptFiles:
    """A `Checkpoint` whose tensors are stored as they are read."""

    folder: Path
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...]
    stem: str

    @classmethod
    def of(cls, one: Checkpoint) -> "_KeptFiles":
        return cls(one.folder, dict(one.tensors), one.notes, one.stem)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder, self.tensors, self.notes, self.stem)


@dataclass(frozen=True)
class _KeptExpert:
    """An `ExpertWeights` without its base."""

    source: _KeptFiles
    own: dict[str, str]
    low_rank: dict[str, LoraFactors]
    head: dict[str, str]
    pieces: dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class _KeptModels:
    """An `Opened`."""

    base: _KeptFiles
    weights: tuple[str, ...]
    buffers: tuple[str, ...]
    statistics: list[str]
    stored: dict[str, str]
    untied: bool
    experts: dict[str, _KeptExpert]
    tokenizer: Path
    digests: tuple[str, str]
    """of the tokenizer and of its companions"""
    token_ids: dict[str, int | list[int]]
    notes: tuple[str, ...]
    about_tokenizer: tuple[str, ...]
    heads: dict[str, OwnHead]
    classes: tuple[str, ...]


def is_plain(recipe: Recipe) -> bool:
    """Return whether a recipe merges weights, and needs no network of the models for anything."""
    return not recipe.tasks and all(one.adapter is None for one in recipe.merges.values())


def may_be_kept(recipe: Recipe, listings: Mapping[str, Listing]) -> bool:
    """Return whether models in these folders are kept; files that nobody has read since may be others by now."""
    return any(facts_folder(MODELS).glob(f"{_listed(recipe, listings)}-*.json"))


def models_name(recipe: Recipe, listings: Mapping[str, Listing]) -> str | None:
    """Return what names all that opening the models of a recipe depends on; None if files have no digests yet.

    Args:
        recipe: the recipe.
        listings: its models.
    """
    if any(listing.unhashed() for listing in listings.values()):
        return None
    contents = {name: model_digest(one) for name, one in listings.items()}
    return f"{_listed(recipe, listings)}-{sha256_text(canonical([contents, program()]))}"


def _listed(recipe: Recipe, listings: Mapping[str, Listing]) -> str:
    """Return a digest of what of this is known before weights are read."""
    files = {name: [str(one.folder), [[file.name, file.size] for file in one.files]] for name, one in listings.items()}
    # In their order, in which they are merged.
    models = [[name, one.model_dump(mode="json", by_alias=True)] for name, one in recipe.models().items()]
    return sha256_text(canonical([models, recipe.tokenizer.model_dump(mode="json", by_alias=True), files]))[:16]


def find_models(name: str) -> Opened | None:
    """Return models as they were opened, if that is kept; else None.

    Args:
        name: from `models_name`.
    """
    kept = find_fact(MODELS, name, _KeptModels)
    if kept is None:
        return None
    statistics = frozenset(kept.statistics)
    base = BaseWeights(kept.base.checkpoint(), kept.weights, kept.buffers, statistics, kept.stored, kept.untied)
    experts = {
        name: ExpertWeights(base, one.source.checkpoint(), one.own, one.low_rank, one.head, one.pieces)
        for name, one in kept.experts.items()
    }
    tokenizer = Tokenizer(kept.tokenizer, *kept.digests, kept.token_ids)
    said = kept.notes, kept.about_tokenizer
    return Opened(base, experts, tokenizer, *said, False, kept.heads, kept.classes)


def keep_models(name: str, opened: Opened) -> None:
    """Keep models as they were opened, where all are merged as they are stored.

    Args:
        name: from `models_name`, before they were opened.
        opened: what came of it.
    """
    base, tokenizer = opened.base, opened.tokenizer
    checkpoints = [base.checkpoint, *(one.source for one in opened.experts.values())]
    if opened.by_name:  # a package that reads them may be installed tomorrow
        return
    if tokenizer.folder != base.folder or tokenizer.seen or any(one.scales or one.gathered for one in checkpoints):
        return  # some of it lies in folders that belong to a store
    experts = {
        key: _KeptExpert(_KeptFiles.of(one.source), dict(one.own), dict(one.low_rank), dict(one.head), dict(one.pieces))
        for key, one in opened.experts.items()
    }
    kept = _KeptModels(
        _KeptFiles.of(base.checkpoint),
        base.weights,
        base.buffers,
        sorted(base.statistics),
        dict(base.stored),
        base.untied,
        experts,
        tokenizer.folder,
        (tokenizer.digest, tokenizer.companions_digest),
        dict(tokenizer.token_ids),
        opened.notes,
        opened.about_tokenizer,
        dict(opened.heads),
        opened.classes,
    )
    keep_fact(MODELS, name, kept)
