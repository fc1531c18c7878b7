"""Texts that are no recipes, whatever they are made for: one line each, at once, in little memory."""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.parse import MOST_BYTES, parse
from sensmerge.tasks.errors import MOST, InputError, shown
from tests.conftest import write_recipe

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name}\n  <<: [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"has 4\.9e\+08 values, repeated ones counted; expected at most 100,000"),
        (MERGE_BOMB, "values, repeated ones counted"),
        ("name: &a [*a]", "is nested too deeply; expected at most 50 levels"),
        ("[" * 60 + "]" * 60, "is nested too deeply"),
        ("[" * 100_000, "is nested too deeply"),
        ("- " * 10_000, "is nested too deeply"),
        ("name: 2026-13-45", "not valid YAML: month must be in 1..12"),
        (f"name: {'9' * 5000}", "not valid YAML: .*4300 digits"),
        ("{a: 1, b: 2, a: 3}", "not valid YAML: key 'a' stands twice"),
        ("? [a]\n: 1", "not valid YAML: .*unhashable"),
        ("name: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
        ("\x00", "not valid YAML: .*special characters are not allowed"),
        *((f"name: {value}", "not valid YAML") for value in ("!!float ''", "!!bool x", "!!timestamp zz", "!!int ''")),
        ("a: b: c", "not valid YAML: mapping values are not allowed here.* at line 1, column 5"),
        ("", "found NoneType; expected a mapping with name, base, experts, merges"),
        ("x" * 100_000, "found str; expected a mapping"),
        ("name: " + "x" * 100_000, r"name: .*at most 100 characters .found 'x+ … \(100,002 characters\)|String should"),
        ("{" + ",".join(f"k{i}: {i}" for i in range(40_000)) + "}", "name is missing"),
    ],
)
def test_one_line_each(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) <= MOST


def test_a_bomb_takes_little(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BOMB)

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))

    words = [sys.executable, "-m", "sensmerge.pipeline", "plan", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        words, capture_output=True, text=True, preexec_fn=bounded, cwd=tmp_path, env=_environment(), check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/recipe.yaml: has 4.9e+08 values")


def _environment() -> dict[str, str]:
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: is a pipe or device; expected a file with a recipe"):
        load_recipe(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"is a folder; expected a file with a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "large").write_text(" " * (MOST_BYTES + 1))
    with pytest.raises(InputError, match=r"large: has 1,048,577 bytes; expected a recipe of at most 1,048,576"):
        load_recipe(tmp_path / "large")
    (tmp_path / "latin").write_bytes(b"name: \xe4")
    with pytest.raises(InputError, match=r"latin: cannot be read \(.*utf-8.*\); expected a recipe in UTF-8"):
        load_recipe(tmp_path / "latin")
    with pytest.raises(InputError, match=r"cannot be read \(.*null.*\)"):
        load_recipe(Path("a\0b"))


def test_overrides_are_read_in_the_same_way(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, llama_recipe)
    for value, message in (
        ("2026-13-45", "month must be"),
        ("&a [*a]", "nested too deeply"),
        ("{a: 1, a: 2}", "twice"),
    ):
        with pytest.raises(InputError, match=rf"--set name={value[:3]}.*{message}".replace("{", r"\{")):
            load_recipe(path, [f"name={value}"])


@pytest.mark.parametrize("place", ["name", "experts", "merges"])
def test_names_that_no_folder_could_have(place: str, llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    long = "x" * 101
    if place == "name":
        llama_recipe["name"] = long
    else:
        llama_recipe[place][long] = next(iter(llama_recipe[place].values()))
    with pytest.raises(InputError, match="at most 100 characters") as caught:
        load_recipe(write_recipe(tmp_path, llama_recipe))
    assert len(str(caught.value)) <= MOST


@pytest.mark.parametrize("text", ['a: "\\ud800"', '"\\udfff": a', '[{a: "b\\udc00"}]'])
def test_half_a_character_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="has half a surrogate pair; write the character itself"):
        parse(text)
    assert parse('"\\U0001f600é"') == "\U0001f600é"


def test_aliases_and_merges_that_recipes_use() -> None:
    assert parse("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


@given(st.text(alphabet="ab01{}[]:,-&*<!? \n'\"|>#%@", max_size=60))
def test_any_text_gives_a_value_or_a_line(text: str) -> None:
    with suppress(InputError):
        parse(text)


def test_messages_stay_short() -> None:
    error = InputError(f"model: found {'x' * 10_000}\n expected\tless; set it lower")
    assert len(str(error)) == MOST
    assert str(error).startswith("model: found xxx")
    assert str(error).endswith("x expected less; set it lower")
    assert shown(10**5000) == "a number of more than 40 digits"
    assert shown("x" * 1000) == "'" + "x" * 79 + " … (1,002 characters)"
    assert shown(0.5) == "0.5"
