"""What all models of a recipe read texts by, and what stands for those that are not merged as they are."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sensmerge.tasks.artifacts import Artifact, canonical, sha256_text

if TYPE_CHECKING:
    from sensmerge.tasks.stages.heads import HeadsJob


@dataclass(frozen=True)
class Seen:
    """A model as it is merged: in the vocabulary of merged models, or as the part of it that is merged."""

    folder: Path
    given: Path
    """folder of the model itself"""
    digest: str
    """of what makes it another model than the files that it is of"""
    donors: tuple[str, ...]
    """names of the other models that rows are taken from"""
    head: "HeadsJob | None" = None
    """what makes the head that the model lacks"""


@dataclass(frozen=True)
class Tokenizer:
    """A folder with tokenizer, chat templates and generation config."""

    folder: Path
    digest: str
    """content digest of the tokenizer's files"""
    companions_digest: str
    """content digest of these, the generation config and `token_ids`"""
    token_ids: Mapping[str, int | list[int]] = field(default_factory=dict)
    """special tokens for which configs of merged models differ from the base's"""
    seen: Mapping[str, Seen] = field(default_factory=dict)
    """what stands for base and experts in the vocabulary of merged models, or for their vision towers; empty where all
    are merged as they are"""
    readers: Mapping[str, Artifact] = field(default_factory=dict)
    """by expert, its own tokenizer with ids and chat template of merged models: by this, base and experts read the
    expert's task"""

    @property
    def artifact(self) -> Artifact:
        """What reads texts for merged models."""
        return Artifact(self.digest, self.folder)

    @property
    def made_heads(self) -> "dict[str, HeadsJob]":
        """What makes heads of experts that lack them, by expert."""
        return {name: one.head for name, one in self.seen.items() if one.head is not None}

    def as_given(self, text: str) -> str:
        """Return a text about models with the folders that the recipe names, and not those that stand for them."""
        for one in self.seen.values():
            text = text.replace(str(one.folder), str(one.given))
        return text

    def of(self, task: str) -> Artifact:
        """Return the tokenizer by which base and experts read a task."""
        return self.readers.get(task) or self.artifact

    def of_all(self, tasks: Collection[str]) -> Artifact | dict[str, Artifact]:
        """Return the tokenizer by which base and experts read all tasks, or by task where there are several."""
        return {task: self.of(task) for task in tasks} if self.readers else self.artifact


def fingerprint(own: str, seen: Seen | None, others: Mapping[str, str]) -> str:
    """Return the fingerprint of a model as it is seen.

    Args:
        own: of its files.
        seen: what stands for it; None where nothing does.
        others: fingerprints of all models.
    """
    if seen is None:
        return own
    return sha256_text(canonical([own, seen.digest, [others[name] for name in seen.donors]]))
