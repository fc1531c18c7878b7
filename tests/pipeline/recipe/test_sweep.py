"""Sweeps in recipes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.pipeline.recipe.load import checked
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.sweep import Swept, expanded
from sensmerge.tasks.errors import InputError

MODELS = {"name": "r", "base": "b", "experts": {"math": {"model": "m"}, "code": {"model": "c"}}}


@pytest.mark.parametrize(
    ("entry", "members"),
    [
        (
            {"method": "ties", "sweep": {"weight": [0.2, 1], "density": [0.5]}},
            {
                "x-weight-0.2-density-0.5": {"method": "ties", "weight": 0.2, "density": 0.5},
                "x-weight-1-density-0.5": {"method": "ties", "weight": 1, "density": 0.5},
            },
        ),
        (
            {"method": "linear", "weight": [0.3, 0.7]},
            {"x-weight-0.3": {"method": "linear", "weight": 0.3}, "x-weight-0.7": {"method": "linear", "weight": 0.7}},
        ),
        (
            {"method": "dare_ties", "weight": [0.3], "sweep": {"seed": [1, 2]}},
            {f"x-weight-0.3-seed-{n}": {"method": "dare_ties", "weight": 0.3, "seed": n} for n in (1, 2)},
        ),
        (
            {"method": "ties", "coefficients": {"kind": "sens"}, "sweep": {"coefficients.temperature": [1.0, 3.0]}},
            {
                f"x-temperature-{t}": {"method": "ties", "coefficients": {"kind": "sens", "temperature": t}}
                for t in (1.0, 3.0)
            },
        ),
        (
            {"method": "ties", "sweep": {"low": {"weight": 0.2}, "plain": {}}},
            {"x-low": {"method": "ties", "weight": 0.2}, "x-plain": {"method": "ties"}},
        ),
    ],
    ids=["product", "weights", "weights and others", "inside others", "by name"],
)
def test_a_sweep_is_its_variants_in_order(entry: dict[str, Any], members: dict[str, Any]) -> None:
    found = expanded({"first": {"method": "ties"}, "x": entry, "last": {"method": "linear"}})
    assert list(found.items()) == [("first", {"method": "ties"}), *members.items(), ("last", {"method": "linear"})]


def test_a_recipe_with_a_sweep_is_the_recipe_without() -> None:
    swept = {"ta": {"method": "task_arithmetic", "out_dtype": "float16", "sweep": {"weight": [0.2, 0.4]}}}
    plain = {
        f"ta-weight-{weight}": {"method": "task_arithmetic", "out_dtype": "float16", "weight": weight}
        for weight in (0.2, 0.4)
    }
    recipe = Recipe.model_validate(MODELS | {"merges": swept})
    dumped = recipe.model_dump(by_alias=True, exclude_unset=True)
    assert dumped == Recipe.model_validate(MODELS | {"merges": plain}).model_dump(by_alias=True, exclude_unset=True)
    assert Recipe.model_validate(dumped).merges == recipe.merges
    assert recipe.sweeps == {"ta": Swept({f"ta-weight-{weight}": {"weight": weight} for weight in (0.2, 0.4)}, "all")}
    assert not Recipe.model_validate(MODELS | {"merges": plain}).sweeps


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ({"x": {"method": "ties", "sweep": {"weight": []}}}, r"merges\.x\.sweep\.weight: expected a list"),
        ({"x": {"method": "ties", "sweep": {"weight": 0.2}}}, r"merges\.x\.sweep\.weight: expected a list"),
        ({"x": {"method": "ties", "weight": []}}, r"merges\.x\.sweep\.weight: expected a list"),
        ({"x": {"method": "ties", "sweep": {}}}, r"merges\.x\.sweep: expected settings with the list"),
        ({"x": {"method": "ties", "sweep": [1]}}, r"merges\.x\.sweep: expected settings with the list"),
        ({"x": {"method": "ties", "weight": [1], "sweep": 3}}, r"merges\.x\.sweep: expected settings with the list"),
        ({"x": {"method": "ties", "sweep": {"density": [[0.1, 0.9]]}}}, r"give the variants names, as in sweep: \{low"),
        ({"x": {"method": "ties", "sweep": {"method": ["ties"]}}}, r"sweep\.method: is set beside the sweep too"),
        ({"x": {"method": "ties", "sweep": {"weight": [1] * 300}}}, r"makes 300 variants; expected at most 200"),
        ({"x": {"method": "ties", "sweep": {"weight": [1, 1]}}}, r"merges\.x: there are two variants x-weight-1"),
        ({"x-a": {}, "x": {"method": "ties", "sweep": {"a": {}}}}, r"merges\.x: there are two variants x-a"),
        ({"x": {"method": "ties", "weight": 1, "sweep": {"weight.y": [1]}}}, r"weight holds a single value"),
    ],
)
def test_what_makes_no_variants_is_named(merges: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expanded(merges)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_yaml_says_is_expanded_or_refused(value: Any) -> None:
    try:
        found = expanded({"x": {"method": "ties", "sweep": value}})
    except ValueError:
        return
    assert all("sweep" not in variant for variant in found.values())


def test_what_is_wrong_with_a_variant_names_the_entry_that_it_comes_of() -> None:
    merges = {"x": {"method": "ties", "weight": [0.2, 0.4], "denstiy": 0.5}}
    with pytest.raises(InputError, match=r"unknown key merges\.x-weight-0\.2\.denstiy; .* \(.*comes of merges\.x\)$"):
        checked({**MODELS, "merges": merges}, Path("r.yaml"))
