"""Numbers that change with depth or by filters, against what mergekit 0.1.5's `evaluate_setting` returns."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.varying import number_at, numbers_in, varying_of

SLERP = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
NUMBERS = st.floats(-10, 10)


@pytest.mark.parametrize(
    ("setting", "tensor", "depth", "expected"),
    [  # recorded with mergekit 0.1.5: evaluate_setting(tensor, setting, depth, validate=float)
        ([0.1, 0.9], "x", 0.25, 0.30000000000000004),
        ([0, 0.3, 0.7, 1], "x", 0.5, 0.5),
        ([0, 0.3, 0.7, 1], "x", 1.0, 1.0),
        ([0.4], "x", 0.7, 0.4),
        (SLERP, "model.layers.3.self_attn.q_proj.weight", 3 / 31, 0.1935483870967742),
        (SLERP, "model.layers.3.mlp.up_proj.weight", 3 / 31, 0.8064516129032258),
        (SLERP, "model.layers.3.input_layernorm.weight", 3 / 31, 0.5),
    ],
)
def test_what_mergekit_evaluates(setting: Any, tensor: str, depth: float, expected: float) -> None:
    assert number_at(varying_of(setting), tensor, depth) == pytest.approx(expected, abs=1e-15)


@given(st.lists(NUMBERS, min_size=2, max_size=6), st.floats(0, 1))
def test_a_gradient_lies_between_its_ends(numbers: list[float], depth: float) -> None:
    found = number_at(numbers, "x", depth)
    assert min(numbers) - 1e-9 <= found <= max(numbers) + 1e-9
    assert number_at(numbers, "x", 0) == numbers[0]
    assert number_at(numbers, "x", 1) == numbers[-1]
    assert list(numbers_in(numbers)) == numbers


@given(NUMBERS, st.floats(0, 1), st.integers(1, 5))
def test_a_gradient_of_one_number_is_that_number(number: float, depth: float, count: int) -> None:
    assert number_at([number] * count, "x", depth) == pytest.approx(number)


def test_a_tensor_that_no_filter_fits_is_named() -> None:
    with pytest.raises(ValueError, match=r"no filter fits tensor model\.norm\.weight; add one for all others last"):
        number_at(varying_of([{"filter": "mlp", "value": 1}]), "model.norm.weight", 0)


@pytest.mark.parametrize("value", [[], ["a"], [{"value": []}], [{"filter": "x"}], [float("nan")], [{"x": 1}], [[1]]])
def test_what_is_neither_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected numbers from the first block to the last"):
        varying_of(value)
