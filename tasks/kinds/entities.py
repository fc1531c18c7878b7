"""Entities in the tags of words: `B-PER I-PER O B-LOC` is a person of two words and a place.

Spans are those of conlleval and seqeval (its default mode): tags may begin with B, I, E or S, and of an entity that
does not begin with B or S only the type has to be new. seqeval itself has had no release since 2020, and scores whole
corpora; intervals need the counts of each text.
"""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np

from sensmerge.tasks.kinds.scores import Columns, Values

_TAG = re.compile(r"O|[BIES](-.*)?", re.DOTALL)
OUTSIDE = "O"

Entity = tuple[str, int, int]
"""its type, and the first and the last of its words"""


def are_entity_tags(names: Collection[str]) -> bool:
    """Return whether names of classes are `O` and tags of entities, not parts of speech, say."""
    return len(set(names) - {OUTSIDE}) > 0 and all(_TAG.fullmatch(name) for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities in the tags of a text's words, each `O` or B, I, E or S, a hyphen and a type."""
    found: set[Entity] = set()
    begin: int | None = None
    for place, (before, tag) in enumerate(pairwise([OUTSIDE, *tags, OUTSIDE])):
        new = tag[0] in "BS" or before[0] in "ESO" or tag[2:] != before[2:]
        if begin is not None and (new or tag == OUTSIDE):
            found.add((before[2:], begin, place - 1))
            begin = None
        if new and tag != OUTSIDE:
            begin = place
    return found


def f1(columns: Columns) -> Values:
    """F1 = 2·found ÷ (predicted + expected) of all texts together; 0 without any, as seqeval.

    Columns are a text's numbers of entities: those predicted that are right, predicted, and expected.
    """
    found, predicted, expected = np.moveaxis(columns.sum(axis=-2), -1, 0)
    return _share(2 * found, predicted + expected)


def share(columns: Columns) -> Values:
    """Sum of the first column ÷ sum of the second; 0 where that is 0."""
    part, whole = np.moveaxis(columns.sum(axis=-2), -1, 0)
    return _share(part, whole)


def _share(part: Values, whole: Values) -> Values:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
