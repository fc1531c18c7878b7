"""Settings of methods that change with depth or by filters, as recipes have them."""

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError

from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.methods.arithmetic import Linear
from sensmerge.tasks.methods.contract import METHODS
from sensmerge.tasks.methods.settings import varied
from tests.conftest import known

TIES = {"method": "ties", "density": [0.2, 0.6]}


def test_they_are_read_and_written_as_they_are() -> None:
    setting = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.5}]
    for density in ([0.2, 0.6], setting, {"math": [0.2, 0.6], "code": 0.3}):
        variant = Variant.model_validate({"method": "ties", "density": density, "lambda": 0.7})
        dumped = variant.model_dump(by_alias=True, exclude_unset=True)
        assert (dumped["density"], dumped["lambda"]) == (density, 0.7)
        assert Variant.model_validate(dumped) == variant
        assert {key.partition(".")[0] for key in variant.params()} >= {"density", "lambda", "method"}


def test_each_tensor_has_its_own_number() -> None:
    variant = Variant.model_validate(
        {
            "method": "ties",
            "density": {"math": [0.2, 0.6], "code": 0.3},
            "lambda": [{"filter": "q", "value": 2}, {"value": 1}],
        }
    )
    for tensor, depth, math, number in (("a.q", 0.0, 0.2, 2), ("a.k", 0.5, 0.4, 1), ("b.q", 1.0, 0.6, 2)):
        found = varied(variant.method, variant.varying, tensor, depth).model_dump(by_alias=True)
        assert found["density"] == {"math": pytest.approx(math), "code": 0.3}
        assert found["lambda"] == number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": [0.2, 1.6]}, "density is 1.6; expected a number between 0 and 1"),
        ({"density": {"math": [0.2], "code": [0.1, -1]}}, "density is -1.0; expected"),
        ({"density": []}, r"density: expected numbers from the first block to the last"),
        ({"density": ["much"]}, r"density: expected numbers from the first block to the last"),
        ({"normalize": [0.5, 1]}, "normalize"),
        ({"application": {"kind": "se"}}, "density: application se from the base needs one number"),
        ({"tune": {"density": [0.1, 0.2]}}, "tune.density: the setting changes from tensor to tensor"),
        ({"varying": {"density": [1]}}, "varying"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message):
        Variant.model_validate(TIES | change)


def test_numbers_that_begin_with_zero_are_tuned_as_others() -> None:
    for numbers in ([0, 1], [1, 0]):
        settings = {"method": "task_arithmetic", "lambda": numbers, "tune": {"weight": [0.5, 1]}}
        assert Variant.model_validate(settings).varying == {"lambda": numbers}


def test_values_that_do_not_go_together_are_refused_before_they_are_tried() -> None:
    settings = {"method": "della", "tune": {"epsilon": [0.1, 0.45], "density": [0.2, 0.5]}}
    with pytest.raises(ValidationError, match=r"tune: epsilon 0.45, density 0.2: .*epsilon is 0.45 where density is"):
        Variant.model_validate(settings)


class Ordered(Linear):
    """Another package's method, with a list of its own."""

    name: Literal["ordered"] = Field("ordered", alias="method")
    ranks: list[int] = Field([1], description="one per rank")
    strength: float | None = Field(None, description="a number")


def test_a_list_that_the_method_takes_is_no_change_with_depth() -> None:
    with known(METHODS, ordered=Ordered):
        variant = Variant.model_validate({"method": "ordered", "ranks": [1, 2, 3], "strength": [0.1, 0.2]})
        assert list(variant.varying) == ["strength"]
        assert variant.method.model_dump()["ranks"] == [1, 2, 3]
