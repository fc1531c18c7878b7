import hashlib
import math
import os
from pathlib import Path

import pytest

from sensmerge.tasks.artifacts import (
    canonical,
    file_bytes,
    load_json,
    load_object,
    parse_json,
    read_json,
    sha256_file,
    sha256_text,
    write_json,
)
from sensmerge.tasks.errors import InputError


def test_json_comes_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ключ": "Wert"}}
    write_json(tmp_path / "x.json", {"old": 1})
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, object()])
def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path, bad: object) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", [2, bad])
    assert read_json(tmp_path / "x.json") == 1


def test_canonical_text_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": {"d": [1, 2], "c": None}}) == '{"a":{"c":null,"d":[1,2]},"b":1}'
    assert canonical({"a": {"c": None, "d": [1, 2]}, "b": 1}) == canonical({"b": 1, "a": {"d": [1, 2], "c": None}})
    assert canonical([1, 2]) != canonical([2, 1])
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": math.nan})


def test_sha256(tmp_path: Path) -> None:
    # FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_text("abc") == sha256_file(tmp_path / "file") == abc
    assert sha256_text("ü") == hashlib.sha256("ü".encode()).hexdigest()
    (tmp_path / "large").write_bytes(b"x" * 1_000_001)
    assert sha256_file(tmp_path / "large") == hashlib.sha256(b"x" * 1_000_001).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe{}", "can't decode byte"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": %s}' % (b"9" * 5000), "4300 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice in one object"),
    ],
)
def test_json_that_is_none_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json: not valid JSON \(.*{message}.*\); get the file again"):
        load_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=message):
        parse_json(content)


def test_what_may_have_no_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_bytes(b"[1]")
    assert file_bytes(tmp_path / "plain.json") == b"[1]"
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(OSError, match="not a regular file"):
            file_bytes(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: cannot be read \(not a regular file\)"):
            load_json(tmp_path / name)


def test_json_of_any_size_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"limit": [0.0, Infinity], "name": "ä"}')
    assert load_object(path) == {"limit": [0.0, float("inf")], "name": "ä"}
    path.write_text("[1]")
    assert load_json(path) == [1]
    with pytest.raises(InputError, match="holds a list; expected a JSON object"):
        load_object(path)
    os.truncate(path, 2**28 + 1)
    with pytest.raises(InputError, match="268,435,457 bytes; expected at most 268,435,456"):
        load_json(path)
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
        load_json(tmp_path / "none.json")
