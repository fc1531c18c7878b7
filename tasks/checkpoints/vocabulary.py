"""One vocabulary for models with different tokens: of which model's rows each row of an embedding or a head is made.

What a model has for a token that it lacks is decided as mergekit 0.1.5 does (`mergekit/tokenizer/embed.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

Token = str | int
"""The text of a token; of a row that no tokenizer has a token for, its number."""


class ModelRow(NamedTuple):
    """One row of a model's own embedding."""

    model: str
    """`base`, or the recipe key of an expert"""
    number: int


@dataclass(frozen=True)
class TokenRow:
    """What a recipe wants a token to have: in models that lack it, or in all of them."""

    row: ModelRow | None
    """None: zeros"""
    force: bool
    """whether all models have it"""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of merged models, and where every model has them."""

    ids: Mapping[Token, int]
    """token → its row in merged models"""
    rows: int
    """of merged models' embeddings; those without a token have the mean of all that have one"""
    models: Mapping[str, Mapping[Token, int]]
    """model → token → its row in that model; the base first"""
    wanted: Mapping[Token, TokenRow] = field(default_factory=dict)
    """what the recipe says of tokens"""

    def rows_of(self, model: str) -> dict[int, tuple[ModelRow, ...]]:
        """Return, for every token's row in merged models, the rows whose mean a model has there; none are zeros."""
        instead, own = self._instead, self.own_rows(model)
        return {place: own[place] or instead[token] for token, place in self.ids.items()}

    def own_rows(self, model: str) -> dict[int, tuple[ModelRow, ...]]:
        """Return, for every token's row in merged models, the row that a model itself has for it; or none."""
        own = self.models[model]
        kept = {token for token in own if not (token in self.wanted and self.wanted[token].force)}
        return {place: (ModelRow(model, own[token]),) if token in kept else () for token, place in self.ids.items()}

    @cached_property
    def _instead(self) -> dict[Token, tuple[ModelRow, ...]]:
        """What models have that lack a token: the base's row; without one, the mean of those of all that have it."""
        found: dict[Token, tuple[ModelRow, ...]] = {}
        base, *_ = self.models
        for token in self.ids:
            if token in self.wanted:
                row = self.wanted[token].row
                found[token] = () if row is None else (row,)
                continue
            having = tuple(ModelRow(model, own[token]) for model, own in self.models.items() if token in own)
            found[token] = having[:1] if having and having[0].model == base else having
        return found

    def places(self, model: str) -> dict[int, int]:
        """Return the row in merged models of every row of a model that has one."""
        return {row: self.ids[token] for token, row in self.models[model].items() if token in self.ids}

    def is_that_of(self, model: str, rows: int) -> bool:
        """Return whether a model of so many rows has every row of merged models, at its place."""
        found = self.own_rows(model)
        whole = rows == self.rows == len(found)
        return whole and all(sources == (ModelRow(model, place),) for place, sources in found.items())


def plain_vocabulary(rows: int, models: Iterable[str]) -> Vocabulary:
    """Return the vocabulary of models of one size in which rows of one number are of one token."""
    ids: dict[Token, int] = {number: number for number in range(rows)}
    return Vocabulary(ids, rows, dict.fromkeys(models, ids))
