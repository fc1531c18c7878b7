"""Numbers by tensor as mergekit's filters."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.pipeline.recipe.export import filtered
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.varying import number_at, varying_of

TENSORS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{number}.{part}.weight" for number in (0, 1, 2, 11, 21) for part in ("mlp.up", "attn.q")),
    *(f"vision.model.layers.{number}.mlp.up.weight" for number in (1, 11)),
    "model.norm.weight",
    "norm.weight",
    "head",
]


def by_filter(setting: Any, tensor: str) -> float:
    return number_at(setting if isinstance(setting, float) else varying_of(setting), tensor, 0.5)


@given(st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=len(TENSORS), max_size=len(TENSORS)))
def test_every_tensor_has_its_own_number(values: list[float]) -> None:
    numbers = dict(zip(TENSORS, values, strict=True))
    setting = filtered(numbers, group_by_layer(TENSORS))
    assert {tensor: by_filter(setting, tensor) for tensor in TENSORS} == numbers


def test_layers_come_by_name_and_what_most_have_comes_last() -> None:
    numbers = {tensor: 0.25 if tensor.startswith("model.layers.1.") else 0.5 for tensor in TENSORS[:11]}
    assert filtered(numbers, group_by_layer(TENSORS[:11])) == [
        {"filter": "model.layers.1.", "value": 0.25},
        {"value": 0.5},
    ]


def test_one_number_is_no_filter() -> None:
    assert filtered(dict.fromkeys(TENSORS, 0.5), group_by_layer(TENSORS)) == 0.5


@pytest.mark.parametrize("odd", ["norm.weight", "model.layers.1.mlp.up.weight"])
def test_a_name_inside_another_one_is_told_from_it(odd: str) -> None:
    numbers = {tensor: 0.25 if tensor == odd else 0.5 for tensor in TENSORS}
    setting = filtered(numbers, group_by_layer(TENSORS))
    assert {tensor for tensor in TENSORS if by_filter(setting, tensor) == 0.25} == {odd}
