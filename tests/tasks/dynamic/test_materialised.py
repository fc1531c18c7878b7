"""Parameters written out for one row of coefficients, against sums in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sensmerge.tasks.dynamic.materialised import Materialised
from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Vector, compact


def make(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, dict[int, Vector]]]:
    torch.manual_seed(0)
    parameters: dict[str, Tensor] = {
        name: torch.nn.Parameter(torch.randn(shape, dtype=dtype))
        for name, shape in (("stacked", (2, 3, 4)), ("weight", (5, 4)), ("other", (7,)))
    }
    sparse = compact(torch.randn(2, 3, 4).relu(), dtype)
    assert sparse is not None
    low = LowRank(torch.randn(2, 4, dtype=dtype), torch.randn(5, 2, dtype=dtype))
    vectors: dict[str, dict[int, Vector]] = {
        "stacked": {0: Dense(torch.randn(2, 3, 4, dtype=dtype)), 2: sparse},
        "weight": {2: low},
    }
    return parameters, vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_sums_are_rounded_once(dtype: torch.dtype, inference: bool) -> None:
    parameters, vectors = make(dtype)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    places = {name: value.data_ptr() for name, value in parameters.items()}
    row = torch.tensor([0.3, 9.0, -0.7])
    exact = {name: value.double() for name, value in before.items()}
    for name, by_expert in vectors.items():
        for expert, vector in by_expert.items():
            whole = vector.to("cpu", torch.float64).dense()
            exact[name] = exact[name] + row[expert].double() * whole
    written = Materialised(parameters, vectors)
    with torch.inference_mode(inference), written.written(row):
        for name, value in parameters.items():
            assert value.dtype == dtype
            assert torch.allclose(value.double(), exact[name], rtol=torch.finfo(dtype).eps, atol=1e-6), name
            assert torch.equal(value, before[name]) == (name == "other")
    for name, value in parameters.items():
        assert value.data_ptr() == places[name]
        assert torch.equal(value, before[name])


def test_everything_is_put_back_after_an_exception() -> None:
    parameters, vectors = make(torch.float32)
    places = {name: value.data_ptr() for name, value in parameters.items()}
    seen: list[int] = []

    def fail() -> None:
        seen.append(parameters["weight"].data_ptr())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Materialised(parameters, vectors).written(torch.ones(3)):
        fail()
    assert seen != [places["weight"]]
    assert {name: value.data_ptr() for name, value in parameters.items()} == places


def test_samples_are_grouped_by_the_experts_that_count() -> None:
    parameters, vectors = make(torch.float32)
    coefficients = torch.tensor([[1.0, 5, 0], [1, 6, 0], [0, 0, 0], [1, 0, 2], [0, 7, 0]])
    assert Materialised(parameters, vectors).together(coefficients) == [[0, 1], [2, 4], [3]]
    nothing: Any = {}
    assert Materialised(parameters, nothing).together(coefficients) == [[0, 1, 2, 3, 4]]
