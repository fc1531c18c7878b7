from typing import Any

import pytest

from sensmerge.tasks.coefficients import Coefficients, SensCoefficients, UniformCoefficients
from sensmerge.tasks.methods.contract import method_of
from sensmerge.tasks.methods.settings import VariantSettings, beyond, combinations


def settings(method: str = "task_arithmetic", coefficients: Coefficients | None = None, **own: Any) -> VariantSettings:
    return VariantSettings(method_of({"method": method, **own}), 1.0, coefficients or UniformCoefficients())


def test_settings_take_other_values_and_keep_the_rest() -> None:
    sens = SensCoefficients(kind="sens", direction="similarity")
    found = settings("ties", sens, density=0.3, rescale=True).having({"weight": 0.4, "density": 0.5, "temperature": 2})
    assert found == VariantSettings(
        method_of({"method": "ties", "density": 0.5, "rescale": True}),
        0.4,
        SensCoefficients(kind="sens", temperature=2, direction="similarity"),
    )
    assert [found.value(key) for key in ("weight", "density", "lambda", "temperature")] == [0.4, 0.5, 1.0, 2]


def test_one_number_takes_the_place_of_one_for_each_expert() -> None:
    each = {"math": 0.2, "code": 0.4}
    before = settings("ties", density=each)
    assert before.value("density") == each
    after = before.having({"density": 0.5})
    assert after.value("density") == 0.5
    assert after.having({"density": each}) == before


@pytest.mark.parametrize(
    ("method", "key", "message"),
    [
        ("task_arithmetic", "density", "found density; expected some of weight, lambda"),
        ("task_arithmetic", "temperature", "found temperature; expected some of weight, lambda"),
        ("ties", "normalize", "found normalize; expected some of lambda, density"),  # which weight does not change
        ("dare_ties", "seed", "found seed; expected some of weight, lambda, density"),
    ],
)
def test_what_cannot_be_tuned_is_refused_by_name(method: str, key: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        settings(method).value(key)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("density", 1.5, "found 1.5; density is 1.5; expected a number between 0 and 1"),
        ("temperature", 0.0, "found 0.0; input should be greater than 0"),
        ("weight", 11.0, "found 11; expected a number from -10 to 10"),
    ],
)
def test_candidates_that_a_setting_refuses(key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        settings("ties", SensCoefficients(kind="sens")).having({key: value})


@pytest.mark.parametrize(
    ("method", "own", "expected"),
    [
        ("task_arithmetic", {}, True),
        ("task_arithmetic", {"normalize": True}, False),
        ("ties", {}, False),
        ("ties", {"normalize": False}, True),
        ("linear", {}, False),
        ("linear", {"normalize": False}, True),
    ],
)
def test_which_merges_depend_on_the_weight(method: str, own: dict[str, Any], expected: bool) -> None:
    assert settings(method, **own).depends_on_weight is expected


def test_combinations_are_those_of_all_candidates() -> None:
    every = [
        {"weight": 0.1, "density": 0.5},
        {"weight": 0.1, "density": 1.0},
        {"weight": 0.2, "density": 0.5},
        {"weight": 0.2, "density": 1.0},
    ]
    grid = {"weight": [0.1, 0.2], "density": [0.5, 1.0]}
    other = {"weight": 1.0, "density": 0.5}
    assert combinations(grid, None) == combinations(grid, every[1]) == every
    assert combinations(grid, other) == [*every, other]


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        ([0.25, 0.5, 1.0], 1.0, [2.0, 4.0]),  # by the ratio of the last two
        ([0.25, 0.5, 1.0], 0.25, [0.125, 0.0625]),
        ([0.25, 0.5, 1.0], 0.5, []),
        ([0.0, 0.5, 0.75], 0.75, [1.0, 1.25]),  # by their difference, where ratios mean nothing
        ([-0.5, 0.0, 0.75], -0.5, [-1.0, -1.5]),
        ([0.0, 0.5, 0.75], 0.0, []),  # none below 0
        ([0.5, 1.0, 8.0], 8.0, []),  # 64 is more than a weight may be
        ([1.0], 1.0, []),
    ],
)
def test_a_grid_goes_on_where_the_best_is_at_its_end(values: list[float], best: float, expected: list[float]) -> None:
    assert beyond(settings(), values, best, "weight") == expected


def test_a_grid_goes_on_only_as_far_as_its_setting() -> None:
    assert beyond(settings("ties"), [0.25, 0.5, 1.0], 1.0, "density") == []
    assert beyond(settings("ties"), [0.2, 0.4], 0.4, "density") == [0.8]
    assert beyond(settings("regmean"), [0.0, 0.5, 1.0], 0.0, "weight") == []  # which takes none below 0
