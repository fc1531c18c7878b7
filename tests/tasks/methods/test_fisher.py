from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels.delta import Whole
from tests.tasks.methods.pieces import whole_tensor
from tests.tasks.methods.totals import write_totals

Make = Callable[..., list[TaskVector]]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPE = (7, 10)
BASE = randn(0, *SHAPE)
DELTAS = [randn(k + 1, *SHAPE) for k in range(3)]
FISHERS = [1e-9 * randn(k + 11, *SHAPE).square() for k in range(3)]
"""Means over samples."""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes experts' task vectors with their Fisher information; None for an expert without."""

    def made(
        fishers: Sequence[Tensor | None], weights: Sequence[float] = (1.0, 1.0, 1.0), samples: Sequence[int] = (5, 5, 5)
    ) -> list[TaskVector]:
        vectors = []
        for k, (fisher, count) in enumerate(zip(fishers, samples, strict=True)):
            totals = {} if fisher is None else {"tensor": fisher * count}
            folder = write_totals(tmp_path / str(k), "fisher", totals, count).folder
            vectors.append(TaskVector(f"{k}", "tensor", Whole(DELTAS[k].reshape(-1)), weights[k], statistics=folder))
        return vectors

    return made


def fisher(vectors: list[TaskVector], **settings: Any) -> Tensor:
    return whole_tensor(BASE, vectors, method_of({"method": "fisher", **settings}))


def naive(fishers: Sequence[Tensor], weights: Sequence[float], floor: float) -> Tensor:
    mean = torch.stack(list(fishers)).double().mean()
    shares = [w * (one.double() + floor * mean) for w, one in zip(weights, fishers, strict=True)]
    mixed = sum(share * delta.double() for share, delta in zip(shares, DELTAS, strict=True)) / sum(shares)
    return BASE.double() + sum(weights) / len(weights) * mixed


@pytest.mark.parametrize("floor", [1e-6, 1e-3, 10.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.8), (0.0, 1.0, 0.5)])
def test_formula(weights: tuple[float, ...], floor: float, make: Make) -> None:
    merged = fisher(make(FISHERS, weights, (5, 50, 500)), floor=floor)
    torch.testing.assert_close(merged.double(), naive(FISHERS, weights, floor), rtol=1e-4, atol=1e-5)


def test_equal_information_gives_the_mean(make: Make) -> None:
    torch.testing.assert_close(fisher(make([FISHERS[0]] * 3)), BASE + sum(DELTAS) / 3)


def test_the_only_expert_that_depends_on_an_element_has_it(make: Make) -> None:
    halves = [torch.zeros(SHAPE), torch.zeros(SHAPE), None]
    halves[0][:, :5] = 1.0
    halves[1][:, 5:] = 1.0
    expected = BASE + torch.cat([DELTAS[0][:, :5], DELTAS[1][:, 5:]], 1)
    torch.testing.assert_close(fisher(make(halves), floor=1e-7), expected, rtol=1e-5, atol=1e-5)


def test_tensors_that_no_loss_depends_on_get_the_mean(make: Make) -> None:
    weights = (0.2, 0.5, 0.8)
    expected = BASE + sum(w * delta for w, delta in zip(weights, DELTAS, strict=True)) / 3
    for nothing in (None, torch.zeros(SHAPE)):
        torch.testing.assert_close(fisher(make([nothing] * 3, weights)), expected)


def test_weights_of_zero_leave_the_base(make: Make) -> None:
    assert torch.equal(fisher(make(FISHERS, (0.0, 0.0, 0.0))), BASE)


def test_the_weight_scales_what_is_added(make: Make) -> None:
    assert method_of({"method": "fisher"}).scales_with_weight()
    once, twice = (fisher(make(FISHERS, (f * 0.3, f * 0.2, f * 0.4))) - BASE for f in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-6)


def test_settings() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        method_of({"method": "fisher", "floor": 0.0})
    with pytest.raises(ValueError, match=r"found the weight -0\.5; fisher takes means"):
        method_of({"method": "fisher"}).check_weights([0.5, -0.5])
