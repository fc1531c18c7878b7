"""Settings of networks that are not known."""

from typing import Any

import pytest

from sensmerge.tasks.checkpoints.settings import listed, stated_differences

BASE = {"model_type": "new", "hidden_size": 8, "rope": {"type": "linear", "factor": 2}, "layers": ["a", "b"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        (
            {"torch_dtype": "bfloat16", "transformers_version": "4.0", "attention_dropout": 1},
            [],
        ),
        ({"_diffusers_version": "0.1", "pretrained_cfg": {"mean": 1}, "label_names": ["x"]}, []),
        ({"hidden_size": 9}, ["hidden_size 9 (the base has 8)"]),
        ({"hidden_size": None}, ["hidden_size nothing (the base has 8)"]),
        ({"rope": {"type": "yarn", "factor": 2}}, ["rope.type 'yarn' (the base has 'linear')"]),
        ({"layers": ["a", "c"]}, ["layers.1 'c' (the base has 'b')"]),
        ({"unheard_of": 1}, ["unheard_of 1 (the base has nothing)"]),
    ],
)
def test_all_settings_count_but_remarks(changes: dict[str, Any], said: list[str]) -> None:
    assert [str(one) for one in stated_differences({**BASE, **changes}, BASE)] == said


def test_a_line_names_ten_of_them() -> None:
    unlike = stated_differences({f"k{number}": 1 for number in range(12)}, {})
    assert listed(unlike).endswith(" and 2 more")
