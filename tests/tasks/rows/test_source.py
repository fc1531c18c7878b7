"""The digest of rows."""

from sensmerge.tasks.rows.source import rows_digest


def test_digest_is_of_content_and_order() -> None:
    rows = [{"a": 1, "b": "é"}, {"a": 2, "b": "x"}]
    assert rows_digest(rows) == rows_digest([{"b": "é", "a": 1}, {"b": "x", "a": 2}])
    assert len({rows_digest(rows), rows_digest(rows[::-1]), rows_digest(rows[:1]), rows_digest([])}) == 4
