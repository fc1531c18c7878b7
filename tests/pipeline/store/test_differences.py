"""What differs between two values is said in a few words."""

from typing import Any

import pytest

from sensmerge.pipeline.store.differences import differences

ONE, OTHER = "a" * 64, "b" * 64


def file(name: str, digest: str, size: int = 1) -> dict[str, Any]:
    return {"name": name, "size": size, "digest": f"blake3:{digest}"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, ["b.c: 2 → 3"]),
        ({"a": 1, "b": {}}, {"b": {"c": 3}}, ["a is gone", "b.c is new"]),
        ({"models": {"math": ONE}}, {"models": {"math": OTHER}}, ["models.math changed"]),
        ({"model": {"fingerprint": ONE}}, {"model": {"fingerprint": OTHER}}, ["model changed"]),
        ({"grid": [1, 2]}, {"grid": [1, 3]}, ["grid: [1, 2] → [1, 3]"]),
        (
            {"listing": {"files": [file("config.json", ONE), file("old.bin", ONE), file("w.safetensors", ONE)]}},
            {"listing": {"files": [file("config.json", ONE), file("w.safetensors", OTHER, 2), file("x.json", ONE)]}},
            ["old.bin is gone", "w.safetensors changed", "x.json is new"],
        ),
    ],
)
def test_differences(old: Any, new: Any, expected: list[str]) -> None:
    assert differences(old, new) == expected
    assert differences(old, old) == []
