"""Of which rows the rows of merged models are made, by the rules of mergekit 0.1.5."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sensmerge.tasks.checkpoints.views import Stretch, stretches
from sensmerge.tasks.checkpoints.vocabulary import ModelRow, TokenRow, Vocabulary

IDS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
MODELS = {"base": {"a": 0, "b": 1}, "x": {"a": 1, "b": 0, "c": 2}, "y": {"a": 0, "c": 5, "d": 3}}


def test_a_model_has_its_own_rows_and_otherwise_those_of_the_others() -> None:
    """The base's; where it lacks the token, that of the one model that has it, or the mean; zeros where none has it."""
    vocabulary = Vocabulary(IDS, 5, MODELS)  # type: ignore[arg-type]
    assert vocabulary.rows_of("base") == {
        0: (ModelRow("base", 0),),
        1: (ModelRow("base", 1),),
        2: (ModelRow("x", 2), ModelRow("y", 5)),
        3: (ModelRow("y", 3),),
        4: (),
    }
    assert vocabulary.rows_of("y")[0] == (ModelRow("y", 0),)
    assert vocabulary.rows_of("y")[1] == (ModelRow("base", 1),)
    assert vocabulary.own_rows("y")[1] == ()
    assert vocabulary.places("x") == {1: 0, 0: 1, 2: 2}


@pytest.mark.parametrize("force", [False, True])
def test_what_a_recipe_says_of_a_token(force: bool) -> None:
    """It counts for models that lack the token, or for all."""
    rule = {"c": TokenRow(ModelRow("x", 1), force), "d": TokenRow(None, force)}
    vocabulary = Vocabulary(IDS, 5, MODELS, rule)  # type: ignore[arg-type]
    assert vocabulary.rows_of("base")[2] == (ModelRow("x", 1),)
    assert vocabulary.rows_of("base")[3] == ()
    assert vocabulary.rows_of("y")[2] == (ModelRow("x", 1) if force else ModelRow("y", 5),)
    assert vocabulary.rows_of("y")[3] == (() if force else (ModelRow("y", 3),))


def test_a_vocabulary_that_is_a_model_s_own() -> None:
    models = {"base": {"a": 0, "b": 1}, "x": {"a": 0, "b": 1, "c": 2}, "y": {"a": 1, "b": 0}}
    vocabulary = Vocabulary({"a": 0, "b": 1}, 2, models)  # type: ignore[arg-type]
    assert [vocabulary.is_that_of(*one) for one in (("base", 2), ("base", 3), ("x", 3), ("y", 2))] == [
        True,
        False,
        False,
        False,
    ]


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 40)))
def test_stretches_are_the_mapping(places: dict[int, int]) -> None:
    found = stretches(places)
    assert {one.to + step: one.start + step for one in found for step in range(one.count)} == places
    for one, other in pairwise(found):
        assert (one.to + one.count, one.start + one.count) != (other.to, other.start)


def test_rows_side_by_side_are_one_stretch() -> None:
    assert stretches({0: 5, 1: 6, 2: 7, 4: 8}) == (Stretch(0, 5, 3), Stretch(4, 8, 1))
