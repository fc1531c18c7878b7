"""The tokens of merged models, the rows they have, and where models have them."""

from dataclasses import dataclass

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.union import Asked, Wanted, unite


@dataclass(frozen=True)
class Model:
    key: str
    rows: int
    trained: frozenset[int] | None = None


BASE, A, B = Model("base", 6), Model("experts.a", 7), Model("experts.b", 4)
MAPS = {
    "base": {"w": 0, "x": 1, "y": 2, "z": 3},
    "experts.a": {"w": 0, "x": 1, "y": 2, "z": 3, "<a>": 4, "<b>": 5},
    "experts.b": {"z": 0, "x": 1, "<b>": 2, "w": 3, "<c>": 4},
}
"""b has no row for its last token."""


def test_a_union() -> None:
    united = unite(BASE, (BASE, A, B), MAPS, Asked("union"))
    assert united.added == {"<a>": 4, "<b>": 5}
    assert united.vocabulary.rows == 6
    assert united.vocabulary.places("experts.b") == {0: 3, 1: 1, 2: 5, 3: 0}
    assert united.changes((BASE, A, B))
    assert any("'<c>' of experts.b is left out: its embedding has 4 rows" in note for note in united.notes)


@pytest.mark.parametrize(("multiple", "rows"), [(None, 6), (1, 6), (4, 8), (5, 10)])
def test_how_many_rows_there_are(multiple: int | None, rows: int) -> None:
    assert unite(BASE, (BASE, A, B), MAPS, Asked("union", multiple)).vocabulary.rows == rows


def test_what_is_said_of_the_number_of_rows() -> None:
    said = "tokenizer: embeddings of merged models have"
    for models, expected in (
        ((BASE, A, B), f"{said} the base's 6 rows; there are 7 in experts.a, 4 in experts.b"),
        ((BASE, Model("experts.a", 6)), None),
    ):
        notes = unite(BASE, models, MAPS, Asked("union")).notes
        assert [note for note in notes if note.startswith(said)] == ([expected] if expected else [])
    assert f"{said} 8 rows; those of the base have 6" in unite(BASE, (BASE, A, B), MAPS, Asked("union", 8)).notes


@pytest.mark.parametrize(("source", "rows"), [(BASE, 6), (A, 7), (B, 4)])
def test_a_named_source_keeps_its_rows(source: Model, rows: int) -> None:
    """Those that no token is of, too, unless a multiple is asked for."""
    name = source.key.removeprefix("experts.")
    united = unite(source, (BASE, A, B), MAPS, Asked(name))
    assert (united.vocabulary.rows, united.added) == (rows, {})
    assert unite(source, (BASE, A, B), MAPS, Asked(name, 1)).vocabulary.rows == len(
        [row for row in MAPS[source.key].values() if row < source.rows]
    )


def test_tokens_that_a_recipe_asks_for() -> None:
    tokens = {"<n>": Wanted("experts.a", "<a>"), "w": Wanted("experts.b", number=2, force=True), "<0>": Wanted(None)}
    united = unite(BASE, (BASE, A, B), MAPS, Asked("union", tokens=tokens))
    assert united.added == {"<a>": 4, "<b>": 5, "<n>": 6, "<0>": 7}
    rows = united.vocabulary.rows_of("base")
    assert [(one.model, one.number) for place in (6, 0, 7) for one in rows[place]] == [
        ("experts.a", 4),
        ("experts.b", 2),
    ]
    with pytest.raises(InputError, match=r"tokenizer.tokens.<n>.source: experts.b has no token '<c>'"):
        unite(BASE, (BASE, A, B), MAPS, Asked("union", tokens={"<n>": Wanted("experts.b", "<c>")}))


def test_an_adapter_lends_only_rows_that_it_trains() -> None:
    idle, busy = Model("experts.a", 6, frozenset()), Model("experts.b", 6, frozenset({4}))
    maps = {"base": MAPS["base"], "experts.a": {**MAPS["base"], "<a>": 4}, "experts.b": {**MAPS["base"], "<a>": 4}}
    united = unite(BASE, (BASE, idle, busy), maps, Asked("union"))
    assert [one.model for one in united.vocabulary.rows_of("base")[4]] == ["experts.b"]
    alone = unite(BASE, (BASE, idle), {key: maps[key] for key in ("base", "experts.a")}, Asked("union"))
    assert [one.model for one in alone.vocabulary.rows_of("base")[4]] == ["base"]
    assert not alone.changes((BASE, idle))
